// Parity data made with the official code: the folder that LONGTAKE_GOLDENS names. Its README says
// what each file holds; tests take sizes and seeds from the files.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <string>

#include "base/error.h"
#include "io/checkpoint.h"
#include "tensor/tensor.h"

namespace longtake::testing_support {

inline std::string golden_folder() {
  const char* folder = std::getenv("LONGTAKE_GOLDENS");
  return folder == nullptr ? "" : folder;
}

inline std::string golden_path(const std::string& name) {
  return golden_folder() + "/" + name;
}

// ctest looks for this message to report the test as skipped.
class GoldenTest : public testing::Test {
 protected:
  void SetUp() override {
    if (golden_folder().empty())
      GTEST_SKIP() << "LONGTAKE_GOLDENS is not set: no parity data, nothing compared";
    ASSERT_TRUE(std::filesystem::is_directory(golden_folder())) << golden_folder();
  }
};

// A tensor of the file in its own type.
inline Tensor read_golden(const Checkpoint& file, const std::string& name) {
  const StoredTensor* stored = file.find(name);
  if (stored == nullptr) throw Error(file.path() + ": expected " + name + ", found no such tensor");
  Tensor out(Device{}, stored->dtype, stored->shape);
  read_tensor(*stored, out);
  return out;
}

// How far `found` is from `expected`, both f32 of one shape.
struct Distance {
  double max_over_rms = INFINITY;  // largest absolute difference / root mean square of `expected`
  double relative_l2 = INFINITY;
};

inline Distance distance(View expected, View found) {
  if (!(expected.shape() == found.shape()) || expected.dtype() != DType::kF32 ||
      found.dtype() != DType::kF32)
    return {};
  double worst = 0;
  double difference = 0;
  double norm = 0;
  for (int64_t i = 0; i < expected.numel(); ++i) {
    const double e = expected.data<float>()[i];
    const double d = found.data<float>()[i] - e;
    worst = std::fmax(worst, std::isnan(d) ? INFINITY : std::abs(d));
    difference += d * d;
    norm += e * e;
  }
  return {worst / std::sqrt(norm / static_cast<double>(expected.numel())),
          std::sqrt(difference / norm)};
}

// The bounds of the parity data's README.
struct Bound {
  double max_over_rms;
  double relative_l2;
};

inline constexpr Bound kActivationF32{1e-4, 1e-5};
inline constexpr Bound kCallF32{1e-3, 1e-4};
inline constexpr Bound kLoopF32{1e-2, 1e-3};
inline constexpr Bound kCallBF16{INFINITY, 2e-2};

inline constexpr Bound kResidualF32{INFINITY, 1.5e-2};  // bf16 with an f32 stream, against f32

// What expect_near has seen, for tests to say how much was compared and how near it was.
struct Tally {
  int count = 0;
  double worst = 0;  // relative L2
};

inline Tally tally;

inline void print_tally(const char* what) {
  std::printf("%s: %d tensors compared, relative L2 at most %.1e\n", what, tally.count,
              tally.worst);
  tally = {};
}

inline void expect_near(const std::string& what, View expected, View found, const Bound& bound) {
  ASSERT_EQ(expected.shape().to_string(), found.shape().to_string()) << what;
  const Distance d = distance(expected, found);
  ++tally.count;
  tally.worst = std::fmax(tally.worst, d.relative_l2);
  EXPECT_TRUE(d.max_over_rms <= bound.max_over_rms && d.relative_l2 <= bound.relative_l2)
      << what << ": expected max / rms " << bound.max_over_rms << " and relative L2 "
      << bound.relative_l2 << ", found " << d.max_over_rms << " and " << d.relative_l2;
}

}  // namespace longtake::testing_support
