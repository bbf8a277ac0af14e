// Parity data made with the official code: the folder that LONGTAKE_GOLDENS names. Its README says
// what each file holds; tests take sizes and seeds from the files.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "base/error.h"
#include "device/context.h"
#include "io/checkpoint.h"
#include "io/safetensors.h"
#include "nn/weight_table.h"
#include "ops/copy.h"
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

// The same on the CPU and on a GPU, which is skipped where there is none.
class GoldenDeviceTest : public GoldenTest, public testing::WithParamInterface<DeviceKind> {
 protected:
  void SetUp() override {
    GoldenTest::SetUp();
    if (IsSkipped()) return;
    try {
      Context(device(), 1);
    } catch (const Error& error) {
      GTEST_SKIP() << error.what();
    }
  }

  static Device device() { return {GetParam(), 0}; }

  static bool on_gpu() { return GetParam() == DeviceKind::kCuda; }
};

#define LONGTAKE_ON_BOTH_DEVICES(fixture)                                     \
  INSTANTIATE_TEST_SUITE_P(                                                   \
      Devices, fixture, testing::Values(DeviceKind::kCpu, DeviceKind::kCuda), \
      [](const auto& p) { return p.param == DeviceKind::kCpu ? std::string("Cpu") : "Cuda"; })

// A tensor of the same elements on the context's device, or on the CPU.
inline Tensor on_device(Context& ctx, View x) {
  Tensor out(ctx.device(), x.dtype(), x.shape());
  copy(ctx, x, out);
  return out;
}

inline Tensor on_host(Context& ctx, View x) {
  Tensor out(Device{}, x.dtype(), x.shape());
  copy(ctx, x, out);
  return out;
}

// A tensor of the file in its own type.
inline Tensor read_golden(const Checkpoint& file, const std::string& name) {
  const StoredTensor* stored = file.find(name);
  if (stored == nullptr) throw Error(file.path() + ": expected " + name + ", found no such tensor");
  Tensor out(Device{}, stored->dtype, stored->shape);
  read_tensor(*stored, out);
  return out;
}

// The weight formula of the parity data, for tensors that are not stored.
using FormulaException =
    std::function<void(const std::string& name, double& offset, double& scale)>;

inline void fill_by_formula(const std::string& name, uint64_t seed, View out,
                            const FormulaException& exception = nullptr) {
  constexpr uint64_t kGolden = 0x9E3779B97F4A7C15ULL;
  uint64_t key = 0xcbf29ce484222325ULL;
  for (const char c : name) key = (key ^ static_cast<uint8_t>(c)) * 0x100000001b3ULL;
  key ^= seed * kGolden;
  const std::string last = name.substr(name.rfind('.') + 1);
  double offset = 0;
  double scale =
      std::sqrt(3.0 * static_cast<double>(out.dim(0)) / static_cast<double>(out.numel()));
  if (last == "modulation") {
    scale = 0.3;
  } else if (last == "gamma" || (last == "weight" && out.shape().rank() == 1)) {
    offset = 1;
    scale = 0.25;
  } else if (last == "bias") {
    scale = 0.1;
  }
  if (exception) exception(name, offset, scale);
  for (int64_t i = 0; i < out.numel(); ++i) {
    uint64_t z = key + (static_cast<uint64_t>(i) + 1) * kGolden;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ULL;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBULL;
    z ^= z >> 31;
    const double r = static_cast<double>(z >> 40) * 0x1p-23 - 1;
    out.data<float>()[i] = static_cast<float>(offset + scale * r);
  }
}

// "formula, seed 102" -> 102
inline uint64_t formula_seed(const Checkpoint& golden) {
  const std::string& text = golden.metadata().at("weights");
  constexpr std::string_view kSeed = "seed ";
  return std::stoull(text.substr(text.find(kSeed) + kSeed.size()));
}

// Weights that are not stored, as a file at `path`; the values that are stored of them are checked.
inline Checkpoint formula_weights(const Checkpoint& golden,
                                  const std::vector<WeightTable::Wanted>& wanted, uint64_t seed,
                                  const std::string& path, const std::string& prefix = "",
                                  const FormulaException& exception = nullptr) {
  std::vector<Tensor> tensors;
  std::vector<NamedView> named;
  for (const auto& [name, shape] : wanted) {
    tensors.emplace_back(Device{}, DType::kF32, shape);
    fill_by_formula(prefix + name, seed, tensors.back(), exception);
    named.push_back({name, tensors.back()});
    const Tensor check = read_golden(golden, "check." + prefix + name);
    for (int64_t i = 0; i < check.numel(); ++i)
      EXPECT_EQ(check.data<float>()[i], tensors.back().data<float>()[i]) << prefix << name;
  }
  write_safetensors(path, named, {});
  return Checkpoint(path);
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
