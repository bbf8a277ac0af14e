// Comparisons on a GPU: what the instruments find there, where caches are copied to the host, is
// what they find on the CPU.
#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "gpu_support.h"
#include "metrics/attention.h"
#include "models/world/model.h"
#include "pipeline/comparison.h"
#include "pipeline/scenario.h"
#include "runtime_support.h"

namespace longtake {
namespace {

using testing_support::kTinyModel;

class DeviceComparison : public testing::Test {
 protected:
  void SetUp() override { cuda::skip_without_gpu(); }
};

Scenario walking(int64_t num_frames) {
  Scenario scenario;
  scenario.name = "walking";
  scenario.prompt = "a winter land with a red tower .";
  scenario.seed = 3;
  for (int64_t frame = 0; frame < num_frames; ++frame)
    scenario.cameras.push_back({1400 + 8 * (frame % 8), 1480});
  return scenario;
}

std::vector<NamedMethod> named(const std::vector<std::string>& names) {
  std::vector<NamedMethod> methods;
  for (const std::string& name : names) methods.push_back({name, parse_method(name)});
  return methods;
}

ComparisonResult play(Device device, DType dtype, int64_t frames,
                      const std::vector<NamedMethod>& methods, bool free_running) {
  Context ctx(device, 2);
  const auto model = world::load_model(ctx, kTinyModel, dtype);
  ComparisonOptions options;
  options.free_running = free_running;
  options.probe_every = 2;
  options.score_every = 1;
  options.score_stride = 8;
  return compare(
      ctx, model, {walking(frames)}, methods, options, [] { return false; }, [](const auto&) {});
}

AttentionScore over(const std::vector<AttentionScore>& layers) {
  AttentionScore sum;
  for (const AttentionScore& layer : layers) sum.add(layer);
  return sum.mean();
}

TEST_F(DeviceComparison, MethodsEqualToDenseScoreFully) {
  const auto methods = named({"dense", "window:100", "annsa-lsh:density=1:dense-layers=none",
                              "annca-lsh:prompt-density=1", "tempcache-lsh:merge-threshold=0"});
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    const ComparisonResult result = play({DeviceKind::kCuda, 0}, dtype, 12, methods, true);
    for (size_t m = 1; m < methods.size(); ++m) {
      SCOPED_TRACE(result.methods[m].name + " in " + name_of(dtype));
      EXPECT_EQ(result.methods[m].lockstep_psnr.count(), 5);
      EXPECT_LT(result.methods[m].lockstep_l2.value(), dtype == DType::kF32 ? 1e-3 : 2e-2);
      for (const AttentionScore& sum : result.methods[m].layers) {
        ASSERT_EQ(sum.count > 0, m != 3) << "AnnCA leaves out nothing here";
        if (sum.count == 0) continue;
        const AttentionScore score = sum.mean();
        for (const double figure : {score.recall, score.oracle, score.overlap, score.density})
          EXPECT_NEAR(figure, 1, 1e-6);
        EXPECT_LT(score.error, 1e-2);
      }
      for (const AttentionScore& sum : result.methods[m].prompt_layers) {
        if (!methods[m].method.sparse_prompt) continue;
        ASSERT_GT(sum.count, 0);
        EXPECT_NEAR(sum.mean().recall, 1, 1e-6);
      }
    }
  }
}

// With history and members that differ from dense ones, to what rounding and the GPU's exact
// products in place of estimates leave.
TEST_F(DeviceComparison, ScoresAreTheCpus) {
  const auto methods =
      named({"dense", "window:4", "tempcache-lsh:exact-frames=1",
             "tempcache-quant:exact-frames=1:memory-budget=768",
             "tempcache-lsh:exact-frames=1:memory-budget=768:budget-shares=need",
             "annsa-quant:density=0.3:dense-layers=none", "annca-quant", "all-lsh:exact-frames=1"});
  const ComparisonResult cpu = play({}, DType::kF32, 14, methods, false);
  const ComparisonResult gpu = play({DeviceKind::kCuda, 0}, DType::kF32, 14, methods, false);
  for (size_t m = 1; m < methods.size(); ++m) {
    SCOPED_TRACE(gpu.methods[m].name);
    const bool selects = methods[m].method.sparse_self;
    const AttentionScore expected = over(cpu.methods[m].layers),
                         found = over(gpu.methods[m].layers);
    const bool leaves_out = gpu.methods[m].layers.front().count > 0;
    ASSERT_EQ(leaves_out, cpu.methods[m].layers.front().count > 0);
    EXPECT_NEAR(found.recall, expected.recall, selects ? 0.1 : 0.01);
    EXPECT_NEAR(found.oracle, expected.oracle, selects ? 0.1 : 0.01);
    EXPECT_NEAR(found.overlap, expected.overlap, selects ? 0.1 : 0.02);
    EXPECT_NEAR(found.density, expected.density, selects ? 0.1 : 0.02);
    EXPECT_TRUE(!leaves_out || selects || std::isnan(found.bound)) << "not known there";
    EXPECT_NEAR(gpu.methods[m].lockstep_psnr.value(), cpu.methods[m].lockstep_psnr.value(), 3);
    if (!methods[m].method.sparse_prompt) continue;
    EXPECT_NEAR(over(gpu.methods[m].prompt_layers).recall,
                over(cpu.methods[m].prompt_layers).recall, 0.1);
  }
}

}  // namespace
}  // namespace longtake
