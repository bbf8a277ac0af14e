// What the tests of the core share: guarded tensors, random inputs, comparison with double results.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#include "base/dtype.h"
#include "base/philox.h"
#include "build_config.h"
#include "device/context.h"
#include "device/cuda_device.h"
#include "tensor/tensor.h"

namespace longtake::test {

// The devices that this build's ops have twins for.
inline std::vector<DeviceKind> device_kinds() {
  if constexpr (kHasCuda) return {DeviceKind::kCpu, DeviceKind::kCuda};
  return {DeviceKind::kCpu};
}

inline const char* name_of(DeviceKind kind) {
  return kind == DeviceKind::kCpu ? "cpu" : "cuda";
}

// True when there is a GPU that the engine runs on.
inline bool has_gpu() {
  try {
    const Context ctx(Device{DeviceKind::kCuda, 0}, 1);
    return true;
  } catch (const Error&) {
    return false;
  }
}

// A copy on the CPU.
inline Tensor on_host(View view) {
  Tensor out({}, view.dtype(), view.shape());
  if (view.empty()) return out;
  if (view.device().kind == DeviceKind::kCpu) {
    std::memcpy(out.view().raw(), view.raw(), view.bytes());
  } else if constexpr (kHasCuda) {
    cuda::copy_bytes_now(view.raw(), out.view().raw(), view.bytes(), cuda::Direction::kToHost);
  }
  return out;
}

// A tensor full of NaN between two guard zones; a kernel that forgets an element or writes outside
// is found.
class Guarded {
 public:
  Guarded(Device device, DType dtype, const Shape& shape)
      : bytes_(shape.numel() * static_cast<int64_t>(size_of(dtype))) {
    const Tensor host({}, DType::kU8, {bytes_ + 2 * kGuard});
    std::memset(host.view().raw(), 0xff, host.bytes());  // NaN as f32 and as bf16
    for (const int64_t zone : {int64_t{0}, kGuard + bytes_})
      std::memset(host.view().raw() + zone, kPattern, kGuard);
    all_ = host.to(device);
    view_ = View(all_.view().raw() + kGuard, dtype, device, shape);
  }

  Guarded(DType dtype, const Shape& shape) : Guarded({}, dtype, shape) {}

  ~Guarded() {
    const Tensor host = on_host(all_);
    const auto* bytes = host.data<uint8_t>();
    for (int64_t i = 0; i < kGuard; ++i) {
      if (bytes[i] != kPattern || bytes[kGuard + bytes_ + i] != kPattern) {
        ADD_FAILURE() << "guard zone overwritten at byte " << i;
        break;
      }
    }
  }

  operator View() const { return view_; }

  View view() const { return view_; }

 private:
  static constexpr int64_t kGuard = 256;
  static constexpr int kPattern = 0x5a;
  int64_t bytes_;
  Tensor all_;
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

inline std::vector<double> values(View anywhere) {
  const Tensor host = on_host(anywhere);
  const View view = host;
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
  const Tensor first = on_host(a);
  const Tensor second = on_host(b);
  return a.bytes() == b.bytes() &&
         std::memcmp(first.view().raw(), second.view().raw(), a.bytes()) == 0;
}

// Tests of ops, written once for all devices; those of a GPU are skipped where there is none.
template <typename Param>
class OnDevice : public testing::TestWithParam<Param> {
 protected:
  virtual DeviceKind kind() const = 0;

  void SetUp() override {
    if (kind() == DeviceKind::kCuda && !has_gpu()) GTEST_SKIP() << "no NVIDIA GPU on this machine";
    ctx_.emplace(Device{kind(), 0}, 2);
  }

  Context& ctx() { return *ctx_; }

  Device device() const { return ctx_->device(); }

  bool on_cpu() const { return kind() == DeviceKind::kCpu; }

  Tensor random(DType dtype, const Shape& shape, uint32_t stream, float spread = 1.0F) {
    return random_tensor(dtype, shape, stream, spread).to(device());
  }

 private:
  std::optional<Context> ctx_;
};

}  // namespace longtake::test

namespace longtake {

using test::expect_close;
using test::Guarded;
using test::random_tensor;
using test::values;

}  // namespace longtake
