// What the tests of the core share: guarded tensors, random inputs, comparison with double results.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "base/dtype.h"
#include "base/philox.h"
#include "device/context.h"
#include "tensor/tensor.h"

namespace longtake::test {

// A tensor full of NaN between two guard zones; a kernel that forgets an element or writes outside
// is found.
class Guarded {
 public:
  Guarded(DType dtype, const Shape& shape)
      : bytes_(static_cast<size_t>(shape.numel()) * size_of(dtype)),
        buffer_({}, bytes_ + 2 * kGuard) {
    std::memset(buffer_.data(), kPattern, kGuard);
    std::memset(buffer_.data() + kGuard, 0xff, bytes_);  // NaN as f32 and as bf16
    std::memset(buffer_.data() + kGuard + bytes_, kPattern, kGuard);
    view_ = View(buffer_.data() + kGuard, dtype, {}, shape);
  }

  ~Guarded() {
    for (size_t i = 0; i < kGuard; ++i) {
      const bool intact = buffer_.data()[i] == std::byte{kPattern} &&
                          buffer_.data()[kGuard + bytes_ + i] == std::byte{kPattern};
      if (!intact) {
        ADD_FAILURE() << "guard zone overwritten at byte " << i;
        break;
      }
    }
  }

  operator View() const { return view_; }

  View view() const { return view_; }

 private:
  static constexpr size_t kGuard = 256;
  static constexpr int kPattern = 0x5a;
  size_t bytes_;
  Buffer buffer_;
  View view_;
};

// Standard normals times `spread`, rounded to dtype; `stream` tells tensors apart.
inline Tensor random_tensor(DType dtype, const Shape& shape, uint32_t stream, float spread = 1.0F) {
  Tensor wide({}, DType::kF32, shape);
  fill_normal(42, stream, 0, wide.data<float>(), wide.numel());
  for (int64_t i = 0; i < wide.numel(); ++i) wide.data<float>()[i] *= spread;
  if (dtype == DType::kF32) return wide;
  Tensor out({}, dtype, shape);
  for (int64_t i = 0; i < wide.numel(); ++i) out.data<bf16>()[i] = bf16(wide.data<float>()[i]);
  return out;
}

inline std::vector<double> values(View view) {
  std::vector<double> out;
  for (int64_t i = 0; i < view.numel(); ++i)
    out.push_back(view.dtype() == DType::kF32
                      ? static_cast<double>(view.data<float>()[i])
                      : static_cast<double>(static_cast<float>(view.data<bf16>()[i])));
  return out;
}

// Half a unit in the last place of 1.
inline double epsilon(DType dtype) {
  return dtype == DType::kF32 ? 0x1p-24 : 0x1p-9;
}

// Relative L2 distance at most `bound`, and no element further away than 16 `bound` of the largest:
// errors of rounding are spread, a wrong element is not.
inline void expect_close(View actual, const std::vector<double>& expected, double bound) {
  const std::vector<double> found = values(actual);
  ASSERT_EQ(found.size(), expected.size());
  double difference = 0;
  double norm = 0;
  double largest = 0;
  double worst = 0;
  size_t where = 0;
  for (size_t i = 0; i < found.size(); ++i) {
    ASSERT_TRUE(std::isfinite(found[i])) << "element " << i << " is " << found[i];
    const double d = std::fabs(found[i] - expected[i]);
    difference += d * d;
    norm += expected[i] * expected[i];
    largest = std::fmax(largest, std::fabs(expected[i]));
    if (d > worst) {
      worst = d;
      where = i;
    }
  }
  EXPECT_LE(std::sqrt(difference), bound * std::sqrt(norm)) << "relative L2 distance";
  EXPECT_LE(worst, 16 * bound * largest)
      << "element " << where << ": " << found[where] << ", expected " << expected[where];
}

inline bool same_bits(View a, View b) {
  return a.bytes() == b.bytes() && std::memcmp(a.raw(), b.raw(), a.bytes()) == 0;
}

}  // namespace longtake::test

namespace longtake {

using test::expect_close;
using test::Guarded;
using test::random_tensor;
using test::values;

}  // namespace longtake
