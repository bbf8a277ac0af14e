// Schedule, camera path, sessions and their statistics, on the tiny model.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "base/error.h"
#include "device/buffer.h"
#include "metrics/attention.h"
#include "metrics/error_bound.h"
#include "models/world/model.h"
#include "ops/image.h"
#include "ops/linear.h"
#include "pipeline/calibration.h"
#include "pipeline/comparison.h"
#include "pipeline/rollout.h"
#include "pipeline/scenario.h"
#include "pipeline/schedule.h"
#include "pipeline/session.h"
#include "pipeline/stats.h"
#include "pipeline/step_cache.h"
#include "pipeline/walk.h"
#include "runtime_support.h"

namespace longtake {
namespace {

using namespace testing_support;
using Pixels = std::vector<uint8_t>;

Pixels copy_of(View rgb) {
  return {rgb.data<uint8_t>(), rgb.data<uint8_t>() + rgb.numel()};
}

SessionOptions tiny_options(const std::string& memory = "full") {
  SessionOptions options;
  options.prompt = "a winter land with a red tower .";
  options.seed = 11;
  options.method =
      parse_method(memory == "full"     ? "dense"
                   : memory == "window" ? "window:4"
                   : memory == "prompt_buckets"
                       ? "tempcache:exact-frames=1:self-attention=annsa:buckets=prompt:density=0.6:"
                         "dense-steps=none:dense-layers=none"
                       : "tempcache:exact-frames=2:memory-budget=640");
  return options;
}

// A diagonal way, 8 pixels a frame on each axis.
CameraPosition camera_of(int64_t frame) {
  return {1400 + 8 * frame, 1480 + 8 * frame};
}

std::vector<Pixels> play(Session& session, int64_t frames) {
  std::vector<Pixels> out;
  for (int64_t i = 0; i < frames; ++i)
    out.push_back(copy_of(session.step(camera_of(session.next_frame()))));
  return out;
}

TEST(Schedule, FallsFromNoiseToClean) {
  const auto levels = noise_levels(4, 2.5);
  ASSERT_EQ(levels.size(), 5U);
  EXPECT_DOUBLE_EQ(levels.front(), 1.0);
  EXPECT_DOUBLE_EQ(levels.back(), 0.0);
  EXPECT_DOUBLE_EQ(levels[2], 2.5 * 0.5 / (1 + 1.5 * 0.5));
  EXPECT_EQ(noise_levels(2, 1.0), (std::vector<double>{1.0, 0.5, 0.0}));
}

TEST(Walk, FirstFrameIsAtTheStartAndShortWaysRepeat) {
  Walk walk(overworld::parse_actions("d W"), {100, 200});
  std::vector<std::pair<int64_t, int64_t>> seen;
  for (int i = 0; i < 4; ++i) {
    const CameraPosition at = walk.next();
    seen.emplace_back(at.x, at.y);
  }
  EXPECT_EQ(seen, (std::vector<std::pair<int64_t, int64_t>>{
                      {100, 200}, {104, 200}, {104, 192}, {108, 192}}));
  Walk later(walk.actions(), {0, 0}, walk.next_action());
  later.continue_from({108, 192});
  EXPECT_EQ(later.next().y, walk.next().y);
}

TEST(Walk, TheTourReturns) {
  CameraPosition at{};
  for (const auto action : gentle_tour()) {
    at.x += step_of(action).x;
    at.y += step_of(action).y;
  }
  EXPECT_EQ(at.x, 0);
  EXPECT_EQ(at.y, 0);
}

TEST(Method, ReadsBackWhatItSpells) {
  EXPECT_EQ(parse_method("dense").to_string(),
            "memory=full:self-attention=dense:cross-attention=dense:step-cache=none:steps=0");
  EXPECT_EQ(parse_method("window:37").to_string(),
            "memory=window:sink-frames=1:window-frames=37:memory-budget=0:self-attention=dense:"
            "cross-attention=dense:step-cache=none:steps=0");
  for (const char* text :
       {"tempcache", "tempcache-quant:merge-threshold=0.25:exact-frames=2", "memory=window:steps=2",
        "tempcache:merge-rule=paper", "annsa:buckets=prompt:dense-layers=0+3",
        "annca-quant:prompt-rule=match", "all", "teacache:step-threshold=0.5",
        "teacache:step-polynomial=0.125/-2/3e-07", "tempcache:layer-shares=0.5/1.5",
        "tempcache:layer-shares=auto", "window:memory-budget=64MiB:sink-frames=0"}) {
    const std::string spelled = parse_method(text).to_string();
    EXPECT_EQ(parse_method(spelled).to_string(), spelled) << text;
  }
  const Method paper = parse_method("tempcache:merge-threshold=0.8:merge-rule=paper");
  EXPECT_EQ(paper.memory.tempcache.merge_threshold, 0.8) << "the order typed does not matter";
  EXPECT_EQ(parse_method("tempcache:merge-rule=paper").memory.tempcache.merge_threshold,
            kPaperThreshold);
}

TEST(Method, NamesWhatIsWrong) {
  const auto message = [](const std::string& text) {
    try {
      parse_method(text);
    } catch (const Error& error) {
      EXPECT_EQ(error.kind(), ErrorKind::kUsage);
      return std::string(error.what());
    }
    return std::string("no error");
  };
  EXPECT_EQ(message("windows").rfind("method: expected dense | window", 0), 0U);
  EXPECT_EQ(message("dense:7"), "method \"dense:7\": expected key=value, found \"7\"");
  EXPECT_EQ(message("window:0x"),
            "window-frames: expected a number in 0..2147483647, found \"0x\"");
  EXPECT_EQ(message("dense:colour=red").rfind("method option: expected one of memory, ", 0), 0U);
  EXPECT_EQ(message("tempcache:ann=tree"), "ann: expected lsh or quant, found \"tree\"");
  EXPECT_EQ(message("dense:exact-frames=3"),
            "exact-frames: expected memory=tempcache beside it, found memory=full");
  EXPECT_EQ(message("tempcache:merge-rule=paper:merge-key=mean"),
            "merge-key: expected merge-rule=nats beside it, found merge-rule=paper");
  EXPECT_EQ(message("window:max-error=2"),
            "max-error: expected memory=tempcache beside it, found memory=window");
  EXPECT_EQ(message("tempcache:merge-rule=paper:max-error=2"),
            "max-error: expected merge-rule=nats beside it, found merge-rule=paper");
  EXPECT_EQ(message("tempcache:layer-shares=1//2"),
            "layer-shares: expected auto, even or numbers in 1e-06..1e+06 such as 0.5/1.5, found "
            "\"1//2\"");
  EXPECT_EQ(message("flowcache:step-polynomial=1"),
            "step-polynomial: expected step-cache=teacache beside it, found step-cache=flowcache");
  EXPECT_EQ(message("tempcache:merge-threshold=nan").rfind("merge-threshold: expected", 0), 0U);
}

TEST(Method, SharesABudgetOverLayers) {
  ModelSizes sizes;
  sizes.num_layers = 2;
  sizes.num_heads = 2;
  sizes.head_dim = 16;
  sizes.frame_tokens = 64;
  const auto shares = [&](const std::string& text) {
    return cache_options(parse_method(text), sizes, DType::kF32, 0).layer_shares;
  };
  EXPECT_EQ(shares("tempcache:memory-budget=1024:layer-shares=1/3"),
            (std::vector<double>{0.5, 1.5}));
  for (const char* alike : {"tempcache:memory-budget=1024", "tempcache:layer-shares=1/3",
                            "tempcache:memory-budget=1024:layer-shares=auto"})
    EXPECT_TRUE(shares(alike).empty()) << alike;
  try {
    shares("tempcache:memory-budget=1024:layer-shares=1/2/3");
    ADD_FAILURE();
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(), "layer-shares: expected 2 of them, one a layer, found 3");
  }
}

TEST(Method, NamesDenseParts) {
  const auto named = [](const std::string& text, int64_t num_layers) {
    Method method = parse_method(text);
    if (method.num_steps == 0) method.num_steps = 4;
    method = name_dense_parts(method, num_layers);
    return method.get("dense-steps") + " " + method.get("dense-layers");
  };
  EXPECT_EQ(named("annsa", 8), "3 0+1") << "30 % of 4 and of 8";
  EXPECT_EQ(named("annsa:steps=10", 1), "7+8+9 none");
  EXPECT_EQ(named("annsa:dense-steps=3+0+3:dense-layers=none", 8), "0+3 none");
  EXPECT_EQ(parse_method("annsa").get("dense-layers"), "auto");
  EXPECT_THROW(parse_method("annsa:dense-steps=0.3"), Error);
  EXPECT_THROW(parse_method("annsa:dense-layers=0++1"), Error);
  try {
    named("annsa:dense-layers=0+8", 8);
    ADD_FAILURE();
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(), "dense-layers: expected indices in 0..7, found 8");
  }
}

class SessionTest : public testing::TestWithParam<std::tuple<DType, std::string>> {
 protected:
  void SetUp() override {
    if (dtype() == DType::kBF16 && !bf16_products_supported()) GTEST_SKIP() << "no bf16 products";
  }

  DType dtype() const { return std::get<0>(GetParam()); }

  SessionOptions options() const { return tiny_options(std::get<1>(GetParam())); }

  Context ctx_;
};

TEST_P(SessionTest, SameSeedSameBitsAndOtherSeedOtherFrames) {
  const auto model = world::load_model(ctx_, kTinyModel, dtype());
  Session first(ctx_, model, options());
  Session second(ctx_, model, options());
  const auto frames = play(first, 4);
  EXPECT_EQ(frames, play(second, 4));
  SessionOptions reseeded = options();
  reseeded.seed = 12;
  Session third(ctx_, model, reseeded);
  EXPECT_NE(frames[0], play(third, 1)[0]);
}

TEST_P(SessionTest, ResumedRunEqualsTheUninterruptedOne) {
  const ScratchFolder scratch;
  const std::string state = scratch / "state";
  const auto model = world::load_model(ctx_, kTinyModel, dtype());
  Session whole(ctx_, model, options());
  const auto expected = play(whole, 9);

  Session before(ctx_, model, options());
  play(before, 5);
  before.save(state, {{"actions", "d*3"}});
  const SavedSession saved = read_saved_session(state);
  EXPECT_EQ(saved.next_frame, 5);
  EXPECT_EQ(saved.notes.at("actions"), "d*3");
  EXPECT_EQ(saved.camera->x, camera_of(4).x);

  Session after(ctx_, model, saved.options);
  after.load(state);
  const auto found = play(after, 4);
  for (size_t i = 0; i < found.size(); ++i)
    EXPECT_EQ(found[i], expected[5 + i]) << "frame " << 5 + i;
}

TEST_P(SessionTest, SteadyStepAllocatesNothing) {
  const auto model = world::load_model(ctx_, kTinyModel, dtype());
  SessionOptions roomy = options();
  roomy.expected_frames = 16;
  Session session(ctx_, model, roomy);
  play(session, 6);  // kernels are built, the workspace has grown, the window is full
  const uint64_t before = num_buffer_allocations();
  play(session, 6);
  EXPECT_EQ(num_buffer_allocations(), before);
}

INSTANTIATE_TEST_SUITE_P(All, SessionTest,
                         testing::Combine(testing::Values(DType::kF32, DType::kBF16),
                                          testing::Values("full", "window", "tempcache",
                                                          "prompt_buckets")),
                         [](const auto& param) {
                           return std::string(name_of(std::get<0>(param.param))) + "_" +
                                  std::get<1>(param.param);
                         });

TEST(Session, WindowEqualsFullWhileItHoldsEverything) {
  Context ctx;
  const auto model = world::load_model(ctx, kTinyModel, DType::kF32);
  Session full(ctx, model, tiny_options("full"));
  Session window(ctx, model, tiny_options("window"));
  const auto a = play(full, 7);
  const auto b = play(window, 7);
  for (size_t i = 0; i <= 4; ++i)
    EXPECT_EQ(a[i], b[i]) << i;  // 1 + 3 frames of history and its own
  EXPECT_NE(a[6], b[6]);
  EXPECT_DOUBLE_EQ(full.last_chunk().density, 1.0);
  EXPECT_DOUBLE_EQ(window.last_chunk().density, 5.0 / 7.0);
  EXPECT_EQ(window.last_chunk().cache_entries, 4 * 128);
}

TEST(Session, AGivenFrameIsRemembered) {
  Context ctx;
  const auto model = world::load_model(ctx, kTinyModel, DType::kF32);
  const Tensor grey = Tensor::zeros(Device{}, DType::kU8, {128, 256, 3});
  std::memset(grey.data<uint8_t>(), 128, grey.bytes());
  Session plain(ctx, model, tiny_options());
  Session primed(ctx, model, tiny_options());
  primed.remember(grey, camera_of(0));
  EXPECT_EQ(primed.next_frame(), 1);
  play(plain, 1);
  EXPECT_NE(play(plain, 1), play(primed, 1));
}

TEST(StepCache, AddsUpRelativeChanges) {
  Context ctx;
  const std::vector<std::vector<float>> tokens = {
      {1, -1}, {1, -1.5F}, {0, -1.5F}, {0, -1.5F}, {9, 9}};
  const auto runs = [&](double threshold) {
    StepCache cache(ctx, {StepReuse::kFlowCache, threshold, {}}, {1, 2});
    std::string ran;
    for (int chunk = 0; chunk < 2; ++chunk) {
      cache.begin_chunk(5);
      for (std::vector<float> x : tokens) {
        const View view(x.data(), DType::kF32, Device{}, {1, 2});
        ran += cache.must_run(ctx, view, view) ? 'x' : '.';
        EXPECT_EQ(cache.ran(), ran.back() == 'x');
      }
    }
    EXPECT_EQ(ran.substr(0, 5), ran.substr(5)) << "nothing is carried into another chunk";
    return ran.substr(0, 5);
  };
  // Changes of steps 1, 2, 3: .5 / 2, 1 / 2.5, 0.
  EXPECT_EQ(runs(0), "xxxxx");
  EXPECT_EQ(runs(0.25), "xxx.x");
  EXPECT_EQ(runs(0.65), "x.x.x");
  EXPECT_EQ(runs(0.66), "x...x");
}

TEST(StepCache, ReadsChangesThroughAPolynomial) {
  Context ctx;
  const std::vector<std::vector<float>> times = {{4, 0}, {4, 2}, {4, 5}, {9, 9}};
  const auto runs = [&](std::optional<std::vector<double>> polynomial, double threshold) {
    StepCache cache(ctx, {StepReuse::kTeaCache, threshold, std::move(polynomial)}, {1, 2});
    std::string ran;
    cache.begin_chunk(4);
    for (std::vector<float> time : times) {
      const View view(time.data(), DType::kF32, Device{}, {2});
      ran += cache.must_run(ctx, view, view) ? 'x' : '.';
    }
    return ran;
  };
  // Both changes are .5; the polynomial makes .1 + .5 of each.
  for (const auto& none : {std::optional<std::vector<double>>(), {std::vector<double>()}}) {
    EXPECT_EQ(runs(none, 0.5), "xxxx");
    EXPECT_EQ(runs(none, 0.51), "x.xx");
  }
  EXPECT_EQ(runs({{0.1, 0, 2}}, 0.59), "xxxx");
  EXPECT_EQ(runs({{0.1, 0, 2}}, 0.61), "x.xx");
  EXPECT_EQ(runs({{-1}}, 1e-9), "x..x") << "a change is not below 0";
}

TEST(StepCache, FitsPolynomials) {
  std::vector<double> x, y;
  for (int i = 0; i < 40; ++i) {
    x.push_back(0.02 * i);
    y.push_back(0.25 - x.back() + 3 * std::pow(x.back(), 4));
  }
  const std::vector<double> found = fit_polynomial(x, y, 4);
  const double expected[] = {0.25, -1, 0, 0, 3};
  ASSERT_EQ(found.size(), 5U);
  for (size_t i = 0; i < 5; ++i) EXPECT_NEAR(found[i], expected[i], 1e-9) << i;
  // Two different x bear a line, whose ends are means.
  const std::vector<double> two = {1, 1, 2}, values = {1, 3, 5};
  const std::vector<double> line = fit_polynomial(two, values, 4);
  ASSERT_EQ(line.size(), 2U);
  EXPECT_NEAR(change_at(line, 1), 2, 1e-12);
  EXPECT_NEAR(change_at(line, 2), 5, 1e-12);
  EXPECT_EQ(change_at(line, -9), 0);
  EXPECT_TRUE(fit_polynomial({}, {}, 4).empty());
}

TEST(StepCache, SkipsOnlyWhatTheThresholdAllows) {
  Context ctx;
  const auto model = world::load_model(ctx, kTinyModel, DType::kF32);
  const auto run = [&](const std::string& method, int64_t* steps_run) {
    SessionOptions options = tiny_options();
    options.method = parse_method(method);
    Session session(ctx, model, options);
    const auto frames = play(session, 4);
    *steps_run = session.last_chunk().steps_run;
    return frames;
  };
  int64_t all = 0, exact = 0, most = 0;
  const auto dense = run("dense:steps=4", &all);
  EXPECT_EQ(all, 4);
  for (const char* cache : {"teacache", "flowcache"}) {
    const std::string method = str("steps=4:step-cache=", cache, ":step-threshold=");
    EXPECT_EQ(run(method + "0", &exact), dense);
    EXPECT_EQ(exact, 4);
    EXPECT_NE(run(method + "1000", &most), dense);
    EXPECT_EQ(most, 2) << "the first and the last step";
    // The step that would have chosen of the prompt is skipped: the next one must choose.
    int64_t both = 0;
    run(method + "1000:cross-attention=annca:dense-steps=0", &both);
    EXPECT_EQ(both, 2);
  }
}

// The history of one rollout serves any selection: what is chosen anew plays like a rollout made
// so.
TEST(Rollout, ChangesItsSelection) {
  Context ctx;
  const auto model = world::load_model(ctx, kTinyModel, DType::kF32);
  const Tensor text =
      model.text_encoder.encode(ctx, model.vocabulary.tokenize("a winter land with a red tower ."));
  const Method dense = parse_method("steps=3");
  const Method sparse = parse_method(
      "steps=3:self-attention=annsa:cross-attention=annca:density=0:dense-steps=1:dense-layers=0");
  Rollout changed(ctx, model, text, dense, 8), made(ctx, model, text, sparse, 8);
  const auto& sizes = model.config.transformer;
  const Shape latent{sizes.latent_channels, sizes.latent_height, sizes.latent_width};
  const Tensor z({}, DType::kF32, latent), other({}, DType::kF32, latent);
  const auto play = [&](Rollout& rollout, int64_t frame, View out) {
    rollout.begin_frame(ctx, frame, 1400, 1480);
    rollout.denoise(ctx, 11, out);
  };
  for (int64_t frame = 0; frame < 5; ++frame) {
    play(changed, frame, z);
    made.begin_frame(ctx, frame, 1400, 1480);
    for (Rollout* rollout : {&changed, &made}) rollout->remember(ctx, z);
  }
  const auto bits = [](View view) {
    return std::vector<float>(view.data<float>(), view.data<float>() + view.numel());
  };
  play(changed, 5, z);
  const auto before = bits(z);
  play(made, 5, other);
  EXPECT_NE(before, bits(other));
  changed.set_selection(ctx, sparse);
  play(changed, 5, z);
  EXPECT_EQ(bits(z), bits(other));
  EXPECT_LT(changed.density(), 1);
  EXPECT_EQ(changed.method().get("dense-steps"), "1");
  changed.set_selection(ctx, dense);
  play(changed, 5, z);
  EXPECT_EQ(bits(z), before);
  EXPECT_EQ(changed.density(), 1);
}

// The tiny model asks for at least 3 steps where there is no history, and 2 elsewhere.
TEST(Rollout, TakesMoreStepsWithoutHistory) {
  Context ctx;
  const auto model = world::load_model(ctx, kTinyModel, DType::kF32);
  const Tensor text = model.text_encoder.encode(ctx, model.vocabulary.tokenize("a red tower ."));
  const auto& sizes = model.config.transformer;
  const Tensor z({}, DType::kF32, {sizes.latent_channels, sizes.latent_height, sizes.latent_width});
  const auto play = [&](Rollout& rollout, int64_t frame) {
    rollout.begin_frame(ctx, frame, 1400, 1480);
    rollout.denoise(ctx, 11, z);
    EXPECT_EQ(rollout.steps_run(), rollout.frame_steps());
    const double density = rollout.density();
    rollout.remember(ctx, z);
    return std::pair(rollout.steps_run(), density);
  };
  Rollout own(ctx, model, text, parse_method("dense"), 8);
  EXPECT_EQ(play(own, 0), std::pair(int64_t{3}, 1.0));
  EXPECT_EQ(play(own, 1), std::pair(int64_t{2}, 1.0));
  EXPECT_EQ(own.method().get("steps"), "2");
  Rollout more(ctx, model, text, parse_method("steps=5"), 8);
  EXPECT_EQ(play(more, 0).first, 5);
  EXPECT_EQ(play(more, 1).first, 5);
  // Of 2 steps the last is dense; of 3 the last, too, for it is what the second half begins with.
  Rollout sparse(ctx, model, text,
                 parse_method("self-attention=annsa:dense-steps=1:dense-layers=none"), 8);
  play(sparse, 0);
  sparse.begin_frame(ctx, 1, 1400, 1480);
  EXPECT_EQ(sparse.last_sparse_step(), 0);
  Rollout first(ctx, model, text,
                parse_method("self-attention=annsa:dense-steps=1:dense-layers=none"), 8);
  first.begin_frame(ctx, 0, 1400, 1480);
  EXPECT_EQ(first.last_sparse_step(), 1);
  // A history that begins with a picture from elsewhere is one.
  Rollout primed(ctx, model, text, parse_method("dense"), 8);
  primed.begin_frame(ctx, 0, 1400, 1480);
  primed.remember(ctx, z);
  EXPECT_EQ(play(primed, 1).first, 2);
}

// Looks into attention over a merged cache, beside the whole history of the same frames.
class BoundCheck final : public PassObserver {
 public:
  BoundCheck(const Rollout& full, const Rollout& merged, int64_t frame)
      : full_(full), merged_(merged), frame_(frame) {}

  void on_self_attention(int64_t layer, const AttentionRead& read) override {
    constexpr int64_t kStride = 32;
    const KvCache& all = *full_.layers()[static_cast<size_t>(layer)].memory.cache;
    const KvCache& own = *merged_.layers()[static_cast<size_t>(layer)].memory.cache;
    const int64_t tokens = read.q.dim(0);
    const auto scale = 1.0F / std::sqrt(static_cast<float>(read.kv.head_dim));
    for (int64_t head = 0; head < read.kv.num_heads(); ++head)
      members_.push_back(own.members(head, frame_ * tokens));
    std::vector<PageList> lists;
    for (int64_t head = 0; head < read.kv.num_heads(); ++head) {
      const auto at = static_cast<size_t>(head);
      PageList list(all.view().heads[at].begin(),
                    all.view().heads[at].begin() + all.num_history_pages(head));
      list.insert(list.end(), read.kv.heads[at].begin() + own.num_history_pages(head),
                  read.kv.heads[at].end());
      lists.push_back(std::move(list));
    }
    const auto score = score_attention(read.q, {read.kv.dtype, read.kv.head_dim, lists}, read.kv,
                                       nullptr, members_, scale, kStride);
    const auto count = static_cast<double>(score.count);
    const double moved = 1 - score.overlap / count;
    const double bound = moved_mass_bound(read.q, own, frame_, scale, kStride) / count;
    EXPECT_LE(moved, bound) << "layer " << layer;
    EXPECT_LT(bound, 0.95) << "layer " << layer << ": a bound that says something";
    most_moved_ = std::max(most_moved_, moved);
    members_.clear();
  }

  double most_moved() const { return most_moved_; }

 private:
  const Rollout& full_;
  const Rollout& merged_;
  int64_t frame_;
  std::vector<std::vector<int32_t>> members_;
  double most_moved_ = 0;
};

// The embedded model out over an unseen map and back.
TEST(MovedMassBound, HoldsOnTheEmbeddedModel) {
  constexpr int64_t kOut = 8, kFrames = 2 * kOut;
  Context ctx(Device{}, 1);
  const auto model = world::load_model(ctx, "models/world", DType::kF32);
  const auto& sizes = model.config.transformer;
  const Scenario scenario = map_scenarios(610000, 1, Route::kExact, kOut)[0];
  const Tensor text = model.text_encoder.encode(ctx, model.vocabulary.tokenize(scenario.prompt));
  Rollout full(ctx, model, text, parse_method("dense"), kFrames);
  Rollout merged(ctx, model, text,
                 parse_method("tempcache:exact-frames=1:merge-bias=ages:merge-threshold=0.3"),
                 kFrames);
  for (const LayerState& layer : merged.layers()) layer.memory.cache->trace_members();
  const Tensor z({}, DType::kF32, {sizes.latent_channels, sizes.latent_height, sizes.latent_width});
  const Tensor velocity({}, DType::kF32, z.shape());
  const Tensor pixels({}, DType::kF32, {sizes.frame_height(), sizes.frame_width(), 3});
  Pixels rgb(static_cast<size_t>(pixels.view().numel()));
  for (int64_t frame = 0; frame <= kFrames; ++frame) {
    const int64_t shown = frame < kOut ? frame : std::max<int64_t>(0, 2 * kOut - 1 - frame);
    const CameraPosition camera = scenario.cameras[static_cast<size_t>(shown)];
    scenario.render_truth(shown, rgb);
    from_rgb(ctx, View(rgb.data(), DType::kU8, Device{}, pixels.shape()), pixels);
    model.autoencoder.encode(ctx, pixels, z);
    for (Rollout* rollout : {&full, &merged}) {
      rollout->begin_frame(ctx, frame, camera.x, camera.y);
      if (frame < kFrames) rollout->remember(ctx, z);
    }
    if (frame == 2) merged.velocity(ctx, 1, z, velocity);  // its queries are known from here on
  }
  BoundCheck check(full, merged, kFrames);
  merged.velocity(ctx, 2, z, velocity, &check);
  EXPECT_GT(check.most_moved(), 1e-3);
}

TEST(Session, LooksIntoErrorsNowAndThen) {
  Context ctx(Device{}, 1);
  const auto model = world::load_model(ctx, kTinyModel, DType::kF32);
  SessionOptions options = tiny_options("tempcache");
  options.watch_every = 3;
  Session session(ctx, model, options);
  Session unwatched(ctx, model, tiny_options("tempcache"));
  for (int64_t frame = 0; frame < 8; ++frame) {
    EXPECT_EQ(copy_of(session.step(camera_of(frame))), copy_of(unwatched.step(camera_of(frame))));
    const auto& errors = session.last_chunk().errors;
    EXPECT_TRUE(unwatched.last_chunk().errors.empty());
    if (frame % 3 != 0) {
      EXPECT_TRUE(errors.empty());
      continue;
    }
    ASSERT_EQ(static_cast<int64_t>(errors.size()), model.config.transformer.num_layers);
    for (size_t n = 0; n + 1 < errors.size(); ++n) {
      // 0 is the sink; 1 starts the groups when 3 is committed; 2 is the first that merges.
      const bool merges = frame > 3;
      EXPECT_EQ(errors[n].commit_error > 1e-5, merges)
          << frame << ' ' << n << ": " << errors[n].commit_error;
      EXPECT_LE(errors[n].moved_mass_bound, merges ? 1 : 0);
    }
    EXPECT_TRUE(std::isnan(errors.back().commit_error));
  }
}

TEST(Session, RefusesBadPrompts) {
  Context ctx;
  const auto model = world::load_model(ctx, kTinyModel, DType::kF32);
  SessionOptions options = tiny_options();
  for (const std::string& prompt : {std::string(" \n"), [] {
                                      std::string text;
                                      for (int i = 0; i < 385; ++i) text += "red ";
                                      return text;
                                    }()}) {
    options.prompt = prompt;
    try {
      Session(ctx, model, options);
      ADD_FAILURE() << prompt.size();
    } catch (const Error& error) {
      EXPECT_EQ(error.kind(), ErrorKind::kUsage);
      EXPECT_EQ(std::string(error.what()).rfind("prompt: expected", 0), 0U) << error.what();
    }
  }
}

TEST(Session, RefusesAStateOfAnotherKind) {
  const ScratchFolder scratch;
  const std::string state = scratch / "state";
  Context ctx;
  const auto model = world::load_model(ctx, kTinyModel, DType::kF32);
  Session session(ctx, model, tiny_options());
  play(session, 2);
  session.save(state, {});
  const auto message = [&](const SessionOptions& options, const std::string& path) {
    try {
      Session other(ctx, model, options);
      other.load(path);
    } catch (const Error& error) {
      EXPECT_EQ(error.kind(), ErrorKind::kInput) << error.what();
      return std::string(error.what());
    }
    return std::string("no error");
  };
  EXPECT_NE(message(tiny_options("window"), state).find("memory: expected window, found full"),
            std::string::npos);
  SessionOptions reseeded = tiny_options();
  reseeded.seed = 1;
  EXPECT_NE(message(reseeded, state).find("seed: expected 1, found 11"), std::string::npos);
  EXPECT_NE(message(tiny_options(), std::string(kTinyModel) + "/model.safetensors").find("kind"),
            std::string::npos);
  const std::string whole = read_text(state);
  write_text(state, whole.substr(0, whole.size() / 2));
  EXPECT_NE(message(tiny_options(), state).find("truncated"), std::string::npos);
}

// Keys named in docs/stats.md: the text between backticks in the first column of each table.
std::vector<std::set<std::string>> documented_keys() {
  std::vector<std::set<std::string>> tables;
  std::istringstream lines(read_text("docs/stats.md"));
  for (std::string line; std::getline(lines, line);) {
    if (line.rfind("| key |", 0) == 0) tables.emplace_back();
    if (line.rfind("| `", 0) != 0) continue;
    const std::string cell = line.substr(0, line.find('|', 1));
    for (size_t at = cell.find('`'); at != std::string::npos; at = cell.find('`', at)) {
      const size_t end = cell.find('`', at + 1);
      tables.back().insert(cell.substr(at + 1, end - at - 1));
      at = end + 1;
    }
  }
  return tables;
}

TEST(Stats, JsonHasTheDocumentedKeys) {
  RunStats stats;
  stats.prompt = "broken \xff text";
  stats.chunks.resize(2);
  const auto json = nlohmann::json::parse(stats.to_json());
  const auto keys_of = [](const nlohmann::json& object) {
    std::set<std::string> keys;
    for (const auto& [key, value] : object.items()) keys.insert(key);
    return keys;
  };
  const auto documented = documented_keys();
  ASSERT_EQ(documented.size(), 2U);
  EXPECT_EQ(keys_of(json), documented[0]);
  EXPECT_EQ(keys_of(json["chunks"][1]), documented[1]);
}

}  // namespace
}  // namespace longtake
