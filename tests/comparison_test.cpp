// Comparisons and calibrations, on the tiny model.
#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "base/error.h"
#include "metrics/attention.h"
#include "models/world/model.h"
#include "pipeline/background.h"
#include "pipeline/calibration.h"
#include "pipeline/comparison.h"
#include "pipeline/scenario.h"
#include "runtime_support.h"

namespace longtake {
namespace {

using namespace testing_support;

// Methods that read all that dense attention reads: whatever the instruments then find is their own
// mistake.
TEST(Comparison, MethodsEqualToDenseScoreFully) {
  Context ctx;
  const auto model = world::load_model(ctx, kTinyModel, DType::kF32);
  Scenario scenario;
  scenario.prompt = "a winter land with a red tower .";
  scenario.cameras.resize(7);
  std::vector<NamedMethod> methods;
  for (const char* name : {"dense", "window:100", "annsa-lsh:density=1:dense-layers=none",
                           "annca-quant:prompt-density=1", "annca-lsh:prompt-density=0.2",
                           "steps=4:step-cache=flowcache:step-threshold=1000"})
    methods.push_back({name, parse_method(name)});
  ComparisonOptions options;
  options.free_running = false;
  options.probe_every = options.score_every = options.score_stride = 1;
  const ComparisonResult result = compare(
      ctx, model, {scenario}, methods, options, [] { return false; }, [](const auto&) {});
  for (size_t m = 1; m < methods.size(); ++m) {
    const MethodResult& row = result.methods[m];
    const bool equal = m < 4;  // in the latent too; the others read the same history otherwise
    if (equal) {
      EXPECT_LT(row.lockstep_l2.value(), 1e-5) << row.name;
    } else {
      EXPECT_GT(row.lockstep_l2.value(), 1e-5) << row.name;
    }
    const bool may_leave_out = m < 3;
    for (const AttentionScore& sum : row.layers) {
      const AttentionScore score = sum.mean();
      ASSERT_EQ(sum.count > 0, may_leave_out) << row.name;
      if (!may_leave_out) continue;
      for (const double figure : {score.recall, score.oracle, score.overlap, score.density})
        EXPECT_NEAR(figure, 1, 1e-6) << row.name;
      EXPECT_LT(score.error, 1e-6) << row.name;
    }
    for (const AttentionScore& sum : row.prompt_layers) {
      ASSERT_EQ(sum.count > 0, methods[m].method.sparse_prompt) << row.name;
      if (sum.count == 0) continue;
      const AttentionScore score = sum.mean();
      EXPECT_EQ(score.recall > 1 - 1e-6, equal) << row.name;
      EXPECT_GE(score.oracle + 1e-9, score.recall) << row.name;
      EXPECT_NEAR(score.density, equal ? 1 : 2.0 / 7, equal ? 1e-6 : 0.1) << row.name;
    }
  }
}

Scenario walking(int64_t num_frames, uint64_t seed) {
  Scenario scenario;
  scenario.name = str("walking ", seed);
  scenario.prompt = "a winter land with a red tower .";
  scenario.seed = seed;
  for (int64_t frame = 0; frame < num_frames; ++frame)
    scenario.cameras.push_back({1400 + 8 * frame, 1480});
  return scenario;
}

std::vector<NamedMethod> named(const std::vector<std::string>& names) {
  std::vector<NamedMethod> methods;
  for (const std::string& name : names) methods.push_back({name, parse_method(name)});
  return methods;
}

ComparisonResult play(Context& ctx, const world::Model& model,
                      const std::vector<Scenario>& scenarios,
                      const std::vector<NamedMethod>& methods, const ComparisonOptions& options) {
  return compare(
      ctx, model, scenarios, methods, options, [] { return false; }, [](const auto&) {});
}

// Every figure that is no time, as bits.
std::vector<double> figures_of(const ComparisonResult& result) {
  std::vector<double> out;
  for (const MethodResult& row : result.methods) {
    for (const Mean& mean :
         {row.lockstep_psnr, row.lockstep_ssim, row.lockstep_l2, row.psnr, row.ssim, row.early_psnr,
          row.density, row.cache_bytes, row.cache_entries, row.cache_growth})
      out.push_back(mean.count() > 0 ? mean.value() : -1);
    for (const auto& layers : {row.layers, row.prompt_layers}) {
      for (const AttentionScore& score : layers)
        out.insert(out.end(), {score.recall, score.oracle, score.overlap, score.error});
    }
    for (const auto& series : {row.series.psnr, row.series.lockstep_psnr, row.series.cache_bytes}) {
      for (const Mean& mean : series) out.push_back(mean.count() > 0 ? mean.value() : -1);
    }
    out.push_back(static_cast<double>(row.merged_keys));
  }
  return out;
}

TEST(Comparison, JobsChangeNoFigure) {
  Context ctx({}, 1);
  const auto model = world::load_model(ctx, kTinyModel, DType::kF32);
  const std::vector<Scenario> scenarios = {walking(9, 3), walking(7, 4), walking(8, 5)};
  const auto methods = named({"dense", "window:3", "tempcache-lsh:exact-frames=1",
                              "annsa-quant:density=0.3:dense-layers=none", "annca-lsh"});
  ComparisonOptions options;
  options.probe_every = 2;
  options.score_every = 1;
  const ComparisonResult alone = play(ctx, model, scenarios, methods, options);
  options.jobs = 4;
  const ComparisonResult beside = play(ctx, model, scenarios, methods, options);
  EXPECT_EQ(alone.num_scenarios, 3);
  EXPECT_EQ(beside.num_scenarios, 3);
  EXPECT_EQ(beside.jobs, 4);
  ASSERT_EQ(beside.methods[2].scenarios.size(), 3U);
  EXPECT_EQ(beside.methods[2].scenarios[1].psnr, alone.methods[2].scenarios[1].psnr);
  EXPECT_EQ(beside.scenarios[1], "walking 4");
  const auto expected = figures_of(alone), found = figures_of(beside);
  ASSERT_EQ(expected.size(), found.size());
  EXPECT_EQ(std::memcmp(expected.data(), found.data(), expected.size() * sizeof(double)), 0);
  EXPECT_GT(beside.methods[1].chunk_ms, 0);
}

TEST(Background, DoesAllThatItWasGiven) {
  for (const int threads : {0, 1, 3}) {
    SCOPED_TRACE(threads);
    std::atomic<int> done = 0;
    Background background(threads);
    for (int i = 0; i < 300; ++i)
      background.add([&] {
        if (++done % 100 == 0) background.add([&] { ++done; });
      });
    background.finish();
    EXPECT_GE(done, 302);
    background.add([] { throw Error("a job"); });
    EXPECT_THROW(background.finish(), Error);
    const int before = done;
    background.add([&] { ++done; });
    EXPECT_THROW(background.finish(), Error);
    EXPECT_EQ(done, before) << "dropped";
  }
}

// A failure in one of the workers is the comparison's.
TEST(Comparison, AWorkersErrorIsHandedOn) {
  Context ctx({}, 1);
  const auto model = world::load_model(ctx, kTinyModel, DType::kF32);
  Scenario bad = walking(4, 3);
  bad.prompt = "";
  ComparisonOptions options;
  options.jobs = 2;
  EXPECT_THROW(play(ctx, model, {walking(4, 1), bad}, named({"dense", "window:3"}), options),
               Error);
}

TEST(Comparison, MethodsThatKeepEverythingMayStopEarlier) {
  Context ctx({}, 1);
  const auto model = world::load_model(ctx, kTinyModel, DType::kF32);
  const auto methods = named({"dense", "window:3", "annca-lsh"});
  ComparisonOptions options;
  options.probe_every = 2;
  options.full_frames = 6;
  const ComparisonResult result = play(ctx, model, {walking(12, 3)}, methods, options);
  const auto played = [&](size_t m) {
    int64_t count = 0;
    for (const Mean& mean : result.methods[m].series.ms) count += mean.count();
    return count;
  };
  EXPECT_EQ(played(0), 6);
  EXPECT_EQ(played(1), 12);
  EXPECT_EQ(played(2), 6);
  EXPECT_EQ(result.methods[1].psnr.count(), 6) << "as far as dense went";
  EXPECT_EQ(result.methods[1].lockstep_psnr.count(), 2) << "frames 2 and 4";
  // Dense holds one page more with every frame, a full window none.
  EXPECT_GT(result.methods[0].cache_growth.value(), 0);
  EXPECT_EQ(result.methods[1].cache_growth.value(), 0);
  EXPECT_GT(result.methods[1].speed_up, 0);
}

Scenario standing_still(int64_t num_frames) {
  Scenario scenario;
  scenario.name = "standing still";
  scenario.prompt = "a winter land with a red tower .";
  scenario.cameras.resize(static_cast<size_t>(num_frames));
  return scenario;
}

Calibration calibrate_tiny(Context& ctx, const world::Model& model, const std::string& method) {
  CalibrationOptions options;
  options.method = parse_method(method);
  options.probe_every = 6;  // frame 6 and no other
  options.query_stride = 8;
  return calibrate(
      ctx, model, {standing_still(8)}, options, [] { return false; }, [](const auto&) {});
}

TEST(Calibration, WhatStandsOutStaysDense) {
  using Parts = std::vector<int64_t>;
  EXPECT_EQ(dense_parts({0.003, 0.003, 0.004, 0.026}), Parts({3}));
  EXPECT_EQ(dense_parts({0.003, 0.003, 0.004, 0.006}), Parts()) << "not twice the median";
  EXPECT_EQ(dense_parts({9, 1, 1, 7, 1, 1, 1, 1}), Parts({0, 3}));
  EXPECT_EQ(dense_parts({9, 1, 1, 7, 1, 8, 1, 1}), Parts({0, 5})) << "no more than 30 %";
  EXPECT_EQ(dense_parts({0, 0, 0, 0}), Parts());
  EXPECT_EQ(dense_parts({1}), Parts());
}

TEST(Calibration, MeasuresWhatAComparisonDoes) {
  Context ctx;
  const auto model = world::load_model(ctx, kTinyModel, DType::kF32);
  const Calibration found = calibrate_tiny(ctx, model, "annsa-quant:density=0:steps=3");
  EXPECT_EQ(found.num_probes, 1);
  ASSERT_EQ(found.steps.size(), 3U);
  ASSERT_EQ(found.layers.size(), 2U);
  std::string steps;  // that the layers were measured without
  for (size_t i = 0; i < 3; ++i) {
    if (found.steps[i].dense) steps += str(steps.empty() ? "" : "+", i);
  }
  if (steps.empty()) steps = "none";
  const std::string sparse = "annsa-quant:density=0:steps=3:dense-steps=";
  std::vector<NamedMethod> methods;
  for (const std::string& name :
       {std::string("dense:steps=3"), sparse + "1+2:dense-layers=none",
        sparse + "0+2:dense-layers=none", sparse + "0+1:dense-layers=none",
        sparse + steps + ":dense-layers=1", sparse + steps + ":dense-layers=0"})
    methods.push_back({name, parse_method(name)});
  ComparisonOptions options;
  options.free_running = false;
  options.probe_every = 6;
  options.score_every = options.score_stride = 1;
  const ComparisonResult expected = compare(
      ctx, model, {standing_still(8)}, methods, options, [] { return false; }, [](const auto&) {});
  std::vector<CalibratedPart> parts = found.steps;
  parts.insert(parts.end(), found.layers.begin(), found.layers.end());
  for (size_t i = 0; i < parts.size(); ++i) {
    EXPECT_GT(parts[i].error, 0);
    EXPECT_NEAR(parts[i].error, expected.methods[i + 1].lockstep_l2.value(), 1e-9) << i;
  }
  for (const auto& heads : found.heads) {
    ASSERT_EQ(heads.size(), 1U);
    EXPECT_GT(heads[0].recall, 0.3);
    EXPECT_LT(heads[0].recall, 1);
    EXPECT_GE(heads[0].oracle, heads[0].recall);
  }
}

TEST(Calibration, NothingIsLostWhereEverythingIsRead) {
  Context ctx;
  const auto model = world::load_model(ctx, kTinyModel, DType::kF32);
  const Calibration found = calibrate_tiny(ctx, model, "annsa-lsh:density=1");
  for (const auto& parts : {found.steps, found.layers}) {
    for (const CalibratedPart& part : parts) EXPECT_EQ(part.error, 0);
  }
  for (const auto& heads : found.heads) EXPECT_NEAR(heads[0].recall, 1, 1e-6);
}

TEST(Calibration, TellsWhatLayersNeedAndHowStepsChange) {
  Context ctx;
  const auto model = world::load_model(ctx, kTinyModel, DType::kF32);
  const auto& sizes = model.config.transformer;
  const Calibration found = calibrate_tiny(ctx, model, "annsa-lsh:steps=3");
  ASSERT_EQ(found.tempcache_groups.size(), static_cast<size_t>(sizes.num_layers));
  // Of eight frames one is the sink and four are exact.
  for (const double groups : found.tempcache_groups) {
    EXPECT_GE(groups, static_cast<double>(sizes.frame_tokens()));
    EXPECT_LE(groups, static_cast<double>(3 * sizes.frame_tokens()));
  }
  EXPECT_EQ(found.teacache_polynomial.size(), 5U);
}

TEST(Calibration, IsReadBackAndFillsWhatIsOpen) {
  const ScratchFolder scratch;
  Context ctx;
  const auto model = world::load_model(ctx, kTinyModel, DType::kF32);
  Calibration written;
  written.model_fingerprint = 0x123456789abcdef0;
  written.method = parse_method("annsa").to_string();
  written.num_probes = 7;
  written.steps = {{0.125, false}, {0.25, true}};
  written.layers = {{0.5, true}, {1e-3, false}};
  written.heads = {{{0.5, 0.75}}, {{0.25, 1}}};
  const std::string path = scratch / "calibration.json";
  const std::string text = written.to_json();
  write_text(path, text);
  const auto read = [&] {
    return read_calibration(path, model.config.transformer, 0x123456789abcdef0);
  };
  EXPECT_EQ(read().to_json(), text);
  Method without = parse_method("tempcache:layer-shares=auto:step-cache=teacache");
  apply(read(), 2, without);
  EXPECT_EQ(without.get("layer-shares") + " " + without.get("step-polynomial"), "even none");

  written.tempcache_groups = {300, 0.5};
  written.teacache_polynomial = {0.25, -1.5};
  write_text(path, written.to_json());
  EXPECT_EQ(read().to_json(), written.to_json());
  for (const auto& [method, expected] : {std::pair("layer-shares=auto", "300/1 0.25/-1.5"),
                                         std::pair("layer-shares=1/2", "1/2 0.25/-1.5"),
                                         std::pair("step-polynomial=none", "even none")}) {
    Method out = parse_method(str("tempcache:step-cache=teacache:", method));
    apply(read(), 2, out);
    EXPECT_EQ(out.get("layer-shares") + " " + out.get("step-polynomial"), expected);
  }
  write_text(path, text);

  const auto applied = [&](const std::string& method) {
    Method out = parse_method(method);
    apply(read(), 2, out);
    return out.get("dense-steps") + " " + out.get("dense-layers");
  };
  EXPECT_EQ(applied("annsa"), "1 0");
  EXPECT_EQ(applied("annsa:dense-steps=0:dense-layers=none"), "0 none");
  EXPECT_EQ(applied("annsa:steps=4"), "auto 0") << "its steps are not these";

  const auto message = [&](const std::string& changed) {
    write_text(path, changed);
    try {
      read();
    } catch (const Error& error) {
      EXPECT_EQ(error.kind(), ErrorKind::kInput);
      EXPECT_EQ(std::string(error.what()).rfind(path, 0), 0U) << error.what();
      return std::string(error.what());
    }
    return std::string("no error");
  };
  const auto with = [&](const std::string& from, const std::string& to) {
    std::string changed = text;
    return changed.replace(changed.find(from), from.size(), to);
  };
  EXPECT_NE(message("{").find("valid JSON"), std::string::npos);
  EXPECT_NE(message("{}").find("kind: expected a string, found no such key"), std::string::npos);
  EXPECT_NE(message(with("-calibration", "-state")).find("found \"longtake-state\""),
            std::string::npos);
  EXPECT_NE(
      message(with("123456789abcdef0", "0")).find("of these weights (longtake calibrate makes"),
      std::string::npos);
  EXPECT_NE(message(with("\"version\": 1", "\"version\": 2")).find("1..1, found 2"),
            std::string::npos);
  EXPECT_NE(message(with("\"num_steps\": 2", "\"num_steps\": 3"))
                .find("steps: expected a list of 3 objects, found array of 2"),
            std::string::npos);
  EXPECT_NE(message(with("true", "1")).find("steps[1].dense: expected true or false, found 1"),
            std::string::npos);
  EXPECT_NE(message(with("density=0.25", "density=2"))
                .find("method: density: expected a number in 0..1, found \"2\""),
            std::string::npos);
  EXPECT_NE(message(with("0.75", "75")).find("heads[0].oracle: expected a number"),
            std::string::npos);
  EXPECT_NE(message(with("\"probes\"", "\"tempcache_groups\": [1], \"probes\""))
                .find("tempcache_groups: expected 2 numbers, found 1"),
            std::string::npos);
}

}  // namespace
}  // namespace longtake
