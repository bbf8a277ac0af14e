// The causal Wan transformer against the official code, call by call.
#include <gtest/gtest.h>

#include <functional>
#include <numeric>

#include "golden_wan_support.h"
#include "ops/rope.h"
#include "pipeline/wan_rollout.h"

namespace longtake {
namespace {

using namespace testing_support;
using wan::Transformer;

class GoldenWan : public GoldenDeviceTest {};

LONGTAKE_ON_BOTH_DEVICES(GoldenWan);

// "call07."
std::string call_name(int64_t index) {
  return str("call", index < 10 ? "0" : "", index, ".");
}

// Self-Forcing's rule of what a chunk reads: everything that fits `capacity` frames, its own
// included; of what came before, the first `sink` frames and the most recent ones.
CacheOptions self_forcing_cache(const WanModel& model, View clock, DType dtype, int64_t capacity,
                                int64_t sink, int64_t chunk) {
  CacheOptions options;
  options.memory = "window";
  options.sink_frames = sink;
  options.window_frames = capacity - sink - chunk;
  options.dtype = dtype;
  options.num_heads = model.config.num_heads;
  options.head_dim = model.config.head_dim();
  options.tokens_per_frame = model.frame_tokens();
  options.chunk_frames = chunk;
  options.clock = clock;
  return options;
}

// Keys [S, heads, channels] of layer 0, by the call that made them and their frame.
using KeysByCall = std::map<std::pair<int64_t, int64_t>, Tensor>;

// The frames that a call read, in order, are those that the official code read, each as the same
// call made it and as far away in time. `keys` are all that layer 0 read, the chunk's own last, and
// `known` learns those; first_frame is that of the queries. A GPU reads the history in an order of
// its own: there each is looked for among those not found yet.
void check_visible(WanModel& model, int64_t call, int64_t first_frame, View keys,
                   KeysByCall& known) {
  const std::string at = call_name(call);
  if (model.golden.find(at + "visible") == nullptr) return;
  const Tensor visible =
      read_golden(model.golden, at + "visible");  // [n, 3]: call, frame, position
  const int64_t tokens = model.frame_tokens();
  ASSERT_EQ(visible.dim(0) * tokens, keys.dim(0));
  const auto* entry = visible.data<int32_t>();
  const int64_t query_position = golden_int(model.golden, at + "qpos", 0);
  const auto frame_of = [&](int64_t f) { return keys.rows(f * tokens, (f + 1) * tokens); };
  std::vector<int64_t> unseen(static_cast<size_t>(visible.dim(0)));
  std::iota(unseen.begin(), unseen.end(), 0);
  for (int64_t f = 0; f < visible.dim(0); ++f, entry += 3) {
    if (entry[0] == call) known[{call, entry[1]}] = clone(frame_of(f));
    const auto made = known.find({entry[0], entry[1]});
    ASSERT_NE(made, known.end()) << "frame " << entry[1] << " of call " << entry[0];
    // A key is read `position - query_position` frames from the queries.
    const int64_t moved_by = entry[2] - query_position + first_frame - entry[1];
    const Tensor expected = clone(made->second);
    const TimeRotation rotation(model.config.time_pairs(), wan::kTheta, moved_by);
    const int64_t head_dim = model.config.head_dim();
    for (int64_t i = 0; i < expected.numel(); i += head_dim)
      rotation.apply(expected.data<float>() + i);
    auto found = unseen.begin();
    if (model.ctx.device().kind == DeviceKind::kCuda)
      found = std::min_element(unseen.begin(), unseen.end(), [&](int64_t a, int64_t b) {
        return distance(expected, frame_of(a)).relative_l2 <
               distance(expected, frame_of(b)).relative_l2;
      });
    expect_near(str("read ", f, ", frame ", entry[1], " of call ", entry[0]), expected,
                frame_of(*found), {1e-5, 1e-6});
    unseen.erase(found);
  }
}

// Replays every call of a Self-Forcing run from its stored input.
class Replay {
 public:
  Replay(WanModel& model, DType dtype, const Bound& bound) : model_(model), bound_(bound) {
    const auto run = nlohmann::json::parse(golden().metadata().at("run"));
    constexpr int64_t kReleased = 21;  // frames of attention in the released models
    const int64_t capacity = run.value("local", run.value("cap", kReleased));
    sink_ = run.value("sink", 0);
    clock_ = Tensor::zeros(model.ctx.device(), DType::kI64, {1});
    const auto cache =
        self_forcing_cache(model, clock_, dtype, capacity, sink_, run.value("nfpb", 3));
    layers_.resize(static_cast<size_t>(model.config.num_layers));
    for (LayerState& layer : layers_) layer.memory.cache = make_cache(model.ctx, cache);
    const Tensor text = on_device(model.ctx, read_golden_f32(golden(), "text"));
    transformer().set_text(model.ctx, text, layers_);
  }

  int64_t run_all() {
    int64_t count = 0;
    while (golden().find(call_name(count) + "meta") != nullptr) run_call(count++);
    return count;
  }

  void run_call(int64_t index) {
    const std::string at = call_name(index);
    SCOPED_TRACE(at);
    const int64_t first_frame = golden_int(golden(), at + "meta", 0);
    if (index > 0) keep_keys_of(index - 1, first_frame);
    Context& ctx = model_.ctx;
    set_clock(ctx, clock_, first_frame);
    const Tensor x = on_device(ctx, read_golden_f32(golden(), at + "x"));
    const int64_t num_frames = x.dim(0);
    const auto levels = levels_of(index, num_frames);
    const RopeTable rope = model_.rope(ctx, first_frame, num_frames);
    ReadRecorder recorder(ctx, sink_, model_.frame_tokens());
    const wan::Pass pass{
        .levels = levels, .rope = rope, .layers = layers_, .reading = {}, .observer = &recorder};
    const Tensor flow(ctx.device(), DType::kF32, x.shape());
    transformer().flow(ctx, x, pass, flow);
    if (golden().find(at + "flow") != nullptr)
      expect_near("flow", read_golden_f32(golden(), at + "flow"), on_host(ctx, flow), bound_);
    if (golden().find(at + "x0") != nullptr) {
      const Tensor x0(ctx.device(), DType::kF32, x.shape());
      schedule_.to_clean(ctx, timestep_, x, flow, x0);
      expect_near("x0", read_golden_f32(golden(), at + "x0"), on_host(ctx, x0), bound_);
    }
    check_reads(index, first_frame, recorder);
    check_inner(index, recorder);
  }

 private:
  const Checkpoint& golden() const { return model_.golden; }

  const Transformer& transformer() const { return *model_.transformer; }

  std::vector<const wan::Level*> levels_of(int64_t index, int64_t num_frames) {
    const Tensor t = read_golden(golden(), call_name(index) + "t");
    std::vector<const wan::Level*> out;
    for (int64_t f = 0; f < num_frames; ++f) {
      timestep_ = t.data<float>()[std::min(f, t.dim(0) - 1)];
      auto [level, is_new] = levels_.try_emplace(timestep_);
      if (is_new) level->second = transformer().level(model_.ctx, timestep_);
      out.push_back(&level->second);
    }
    return out;
  }

  // A call's keys stay when the next one is about other frames.
  void keep_keys_of(int64_t index, int64_t next_frame) {
    const int64_t first_frame = golden_int(golden(), call_name(index) + "meta", 0);
    if (first_frame == next_frame) return;
    const Tensor x = on_device(model_.ctx, read_golden_f32(golden(), call_name(index) + "x"));
    const auto levels = levels_of(index, x.dim(0));
    set_clock(model_.ctx, clock_, first_frame);
    const RopeTable rope = model_.rope(model_.ctx, first_frame, x.dim(0));
    transformer().commit(model_.ctx, x,
                         {.levels = levels, .rope = rope, .layers = layers_, .reading = {}},
                         {first_frame, x.dim(0)});
    model_.ctx.synchronize();
  }

  // The keys read are those that the official code read: same frames, same order, same values.
  void check_reads(int64_t index, int64_t first_frame, const ReadRecorder& recorder) {
    const std::string at = call_name(index);
    const Rows& rows = recorder.rows.at(0);
    check_visible(model_, index, first_frame, rows.k, keys_);
    for (const auto& [layer, read] : recorder.rows) {
      std::string cache = str(at, "cache.", layer, ".");
      const bool is_last = golden().find(call_name(index + 1) + "meta") == nullptr;
      if (golden().find(cache + "k") == nullptr && is_last) cache = str("cache.", layer, ".");
      if (golden().find(cache + "k") == nullptr) continue;
      expect_near(cache + "k", read_golden_f32(golden(), cache + "k"), read.k, bound_);
      expect_near(cache + "v", read_golden_f32(golden(), cache + "v"), read.v, bound_);
    }
  }

  void check_inner(int64_t index, const ReadRecorder& recorder) {
    for (const auto& [layer, stream] : recorder.streams) {
      const std::string name = str("call", index, ".inner.block", layer, ".out");
      if (golden().find(name) == nullptr) continue;
      const Tensor expected = read_golden_f32(golden(), name);
      expect_near(name, expected.view().reshape(stream.shape()), stream, bound_);
    }
  }

  WanModel& model_;
  Bound bound_;
  int64_t sink_ = 0;
  Tensor clock_;
  wan::Schedule schedule_;
  std::vector<LayerState> layers_;
  std::map<float, wan::Level> levels_;
  float timestep_ = 0;  // of the newest frame of the latest call
  KeysByCall keys_;
};

TEST_P(GoldenWan, SelfForcingCallsF32) {
  for (const char* file :
       {"sf_rollout", "sf_loop", "sf_init", "sf_evict_sink0", "sf_evict_sink2"}) {
    SCOPED_TRACE(file);
    WanModel model(device(), file, DType::kF32, DType::kF32);
    Replay replay(model, DType::kF32, kCallF32);
    EXPECT_GT(replay.run_all(), 0);
    print_tally(file);
  }
}

TEST_P(GoldenWan, SelfForcingCallsBF16) {
  if (on_gpu()) GTEST_SKIP() << "the GPU's bf16 pages have heads of 64 or 128 channels, these 32";
  if (!bf16_products_supported()) GTEST_SKIP() << "no bf16 products on this machine";

  struct Case {
    const char* file;
    DType residual;
    Bound bound;
  };

  for (const Case& c : {Case{"sf_rollout_bf16", DType::kBF16, kCallBF16},
                        Case{"sf_rollout", DType::kF32, kResidualF32}}) {
    SCOPED_TRACE(c.file);
    WanModel model(device(), c.file, DType::kBF16, c.residual);
    Replay replay(model, DType::kBF16, c.bound);
    EXPECT_GT(replay.run_all(), 0);
    print_tally(c.file);
  }
}

// Heads of 128 channels, and a timestep of its own for every frame of a call.
TEST_P(GoldenWan, LargeHeadsAndATimestepPerFrame) {
  WanModel model(device(), "dit_hd128", DType::kF32, DType::kF32);
  Replay replay(model, DType::kF32, kCallF32);
  EXPECT_GT(replay.run_all(), 0);
  print_tally("dit_hd128");
}

TEST_P(GoldenWan, LargeHeadsBF16) {
  if (!on_gpu() && !bf16_products_supported()) GTEST_SKIP() << "no bf16 products on this machine";
  WanModel model(device(), "dit_hd128", DType::kBF16, DType::kF32);
  Replay replay(model, DType::kBF16, kResidualF32);
  EXPECT_GT(replay.run_all(), 0);
  print_tally("dit_hd128, bf16");
}

// Stored noise: re-noise draws are numbered through a run, step after step of chunk after chunk.
NoiseSource stored_noise(WanModel& model, int64_t chunk_frames, int64_t num_steps,
                         int64_t first_frame = 0) {
  return [=, &model](const NoiseDraw& draw, View out) {
    const int64_t frame = draw.first_frame - first_frame;
    const int64_t index = frame / chunk_frames * (num_steps - 1) + draw.step - 1;
    const Tensor stored =
        read_golden(model.golden, draw.step == 0 ? "noise" : str("renoise.", index));
    copy(model.ctx, draw.step == 0 ? stored.view().rows(frame, frame + out.dim(0)) : stored.view(),
         out);
  };
}

TEST_P(GoldenWan, SelfForcingLoops) {
  for (const char* file :
       {"sf_rollout", "sf_loop", "sf_init", "sf_evict_sink0", "sf_evict_sink2"}) {
    SCOPED_TRACE(file);
    WanModel model(device(), file, DType::kF32, DType::kF32);
    const auto run = nlohmann::json::parse(model.golden.metadata().at("run"));
    WanOptions options = self_forcing_options();
    options.steps = run.at("steps").get<std::vector<int64_t>>();
    options.shift = run.at("shift");
    options.chunk_frames = run.at("nfpb");
    options.context_frames = run.value("local", run.value("cap", options.context_frames));
    options.sink_frames = run.value("sink", 0);
    options.height = model.height;
    options.width = model.width;
    const Tensor text = read_golden(model.golden, "text");
    const Tensor expected = read_golden(model.golden, "latents");
    ChunkRollout rollout(model.ctx, *model.transformer, text, options);
    const Tensor found(device(), DType::kF32, expected.shape());
    int64_t begin = 0;
    if (model.golden.find("initial_latent") != nullptr) {
      const Tensor initial = read_golden(model.golden, "initial_latent");
      rollout.remember(model.ctx, initial);
      begin = rollout.num_frames();
      copy(model.ctx, initial, found.view().rows(0, begin));
    }
    const auto noise = stored_noise(model, options.chunk_frames,
                                    static_cast<int64_t>(options.steps.size()), begin);
    for (int64_t f = begin; f < expected.dim(0); f += options.chunk_frames)
      rollout.next_chunk(model.ctx, noise, found.view().rows(f, f + options.chunk_frames));
    expect_near("latents", expected, on_host(model.ctx, found), kLoopF32);
    print_tally(file);
  }
}

// What layer 0 read, pass after pass.
class ReadLog final : public PassObserver {
 public:
  ReadLog(WanModel& model, int64_t sink_frames) : model_(model), sink_frames_(sink_frames) {}

  void on_self_attention(int64_t layer, const AttentionRead& read) override {
    if (layer == 0)
      passes.push_back(unpack(model_.ctx, read.kv, sink_frames_, model_.frame_tokens()));
  }

  std::vector<Rows> passes;

 private:
  WanModel& model_;
  int64_t sink_frames_;
};

// Keys of one frame without their rotation, on the CPU.
Tensor without_rotation(const WanModel& model, View keys, int64_t frame) {
  Context host({}, 1);
  const RopeTable turns = model.rope(host, frame, 1);
  for (int64_t i = 0; i < turns.sin.numel(); ++i) turns.sin.data<float>()[i] *= -1;
  Tensor out(Device{}, DType::kF32, keys.shape());
  rope(host, keys, turns.cos, turns.sin, out);
  return out;
}

// Every layer's history after `call` against the official cache: the sink, and as much of the
// newest frames as we keep. raw_frames: how many frames of the official cache are not rotated.
void check_caches(WanModel& model, const WanRollout& rollout, int64_t call,
                  int64_t first_sink_frame, int64_t sink_frames, int64_t raw_frames) {
  const int64_t tokens = model.frame_tokens();
  for (size_t layer = 0; layer < rollout.layers().size(); ++layer) {
    const std::string name = str(call_name(call), "cache.", layer, ".");
    if (model.golden.find(name + "k") == nullptr) return;
    const Rows found = unpack(model.ctx, rollout.layers()[layer].memory.cache->view(), sink_frames,
                              model.frame_tokens());
    const Tensor k = read_golden(model.golden, name + "k");
    const Tensor v = read_golden(model.golden, name + "v");
    const int64_t held = found.k.dim(0) / tokens;
    const int64_t official = k.dim(0) / tokens;
    for (int64_t f = 0; f < held; ++f) {
      const bool is_sink = f < sink_frames;
      const int64_t other = is_sink ? f : official - held + f;
      const int64_t frame = is_sink ? first_sink_frame + f : rollout.num_frames() - held + f;
      const auto part = [&](View rows, int64_t at) {
        return rows.rows(at * tokens, (at + 1) * tokens);
      };
      const Tensor ours = other < raw_frames ? without_rotation(model, part(found.k, f), frame)
                                             : clone(part(found.k, f));
      expect_near(str(name, "k, frame ", f), part(k, other), ours, kLoopF32);
      expect_near(str(name, "v, frame ", f), part(v, other), part(found.v, f), kLoopF32);
    }
  }
}

TEST_P(GoldenWan, LongLiveWithPromptSwitches) {
  for (const char* file : {"longlive", "longlive_early_switch", "longlive_infinity"}) {
    SCOPED_TRACE(file);
    WanModel model(device(), file, DType::kF32, DType::kF32);
    const auto run = nlohmann::json::parse(model.golden.metadata().at("run"));
    WanOptions options = longlive_options(run.at("infinity"));
    options.steps = run.at("steps").get<std::vector<int64_t>>();
    options.chunk_frames = run.at("nfpb");
    options.context_frames = run.at("local");
    options.sink_frames = run.at("sink");
    options.keeps_sink = run.at("global_sink");
    options.height = model.height;
    options.width = model.width;
    const auto switches = run.at("switch").get<std::vector<int64_t>>();
    const auto num_steps = static_cast<int64_t>(options.steps.size());
    const Tensor expected = read_golden(model.golden, "latents");
    const Tensor found(device(), DType::kF32, expected.shape());
    const auto noise = stored_noise(model, options.chunk_frames, num_steps);
    // One chunk after the other; `check` is called after each, and after a switch of the prompt.
    const auto play = [&](ChunkRollout& rollout, const std::function<void()>& check) {
      int64_t prompt = 0;
      for (int64_t f = 0; f < expected.dim(0); f += options.chunk_frames) {
        if (std::find(switches.begin(), switches.end(), f) != switches.end()) {
          rollout.switch_prompt(model.ctx, read_golden(model.golden, str("text.", ++prompt)));
          check();
        }
        rollout.next_chunk(model.ctx, noise, found.view().rows(f, f + options.chunk_frames));
        check();
      }
      expect_near("latents", expected, on_host(model.ctx, found), kLoopF32);
    };
    const Tensor text = read_golden(model.golden, "text.0");
    ChunkRollout rollout(model.ctx, *model.transformer, text, options);
    ReadLog log(model, options.sink_frames);
    rollout.observe(&log);
    const int64_t all_raw = run.at("infinity") ? expected.dim(0) : 0;
    KeysByCall known;
    const auto check_latest = [&] {
      check_caches(model, rollout, static_cast<int64_t>(log.passes.size()) - 1, 0,
                   options.sink_frames, all_raw);
    };
    play(rollout, check_latest);
    for (size_t i = 0; i < log.passes.size(); ++i) {
      const auto call = static_cast<int64_t>(i);
      const int64_t first_frame = golden_int(model.golden, call_name(call) + "meta", 0);
      check_visible(model, call, first_frame, log.passes[i].k, known);
    }
    EXPECT_EQ(model.golden.find(call_name(static_cast<int64_t>(log.passes.size())) + "meta"),
              nullptr);
    // And once more without anybody who looks, replayed where the device replays.
    ChunkRollout replayed(model.ctx, *model.transformer, text, options);
    play(replayed, [] {});
    print_tally(file);
  }
}

TEST_P(GoldenWan, RollingForcing) {
  WanModel model(device(), "rolling_forcing", DType::kF32, DType::kF32);
  const auto run = nlohmann::json::parse(model.golden.metadata().at("run"));
  WanOptions options = rolling_forcing_options();
  options.steps = run.at("steps").get<std::vector<int64_t>>();
  options.height = model.height;
  options.width = model.width;
  const int64_t num_chunks = run.at("blocks");
  const auto num_steps = static_cast<int64_t>(options.steps.size());
  const Tensor expected = read_golden(model.golden, "latents");
  const Tensor found(device(), DType::kF32, expected.shape());
  const Tensor text = read_golden(model.golden, "text");
  RollingRollout rollout(model.ctx, *model.transformer, text, options, num_chunks);
  ReadLog log(model, options.sink_frames);
  rollout.observe(&log);
  const NoiseSource noise = [&](const NoiseDraw& draw, View out) {
    const int64_t chunk = draw.first_frame / options.chunk_frames;
    // The draw that follows step - 1 of a chunk is made in the window chunk + step - 1.
    char name[32];
    std::snprintf(name, sizeof name, "renoise.w%02d.b%02d", static_cast<int>(chunk + draw.step - 1),
                  static_cast<int>(chunk));
    const Tensor stored = read_golden(model.golden, draw.step == 0 ? "noise" : name);
    copy(model.ctx,
         draw.step == 0 ? stored.view().rows(draw.first_frame, draw.first_frame + out.dim(0))
                        : stored.view(),
         out);
  };
  // Official calls are two a window, noisy and clean. While the first chunk is not finished its
  // clean pass leaves nothing behind, and we leave it out.
  KeysByCall known;
  size_t seen = 0;
  for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
    const int64_t first_frame = chunk * options.chunk_frames;
    rollout.next_chunk(model.ctx, noise,
                       found.view().rows(first_frame, first_frame + options.chunk_frames));
    const int64_t window = chunk + num_steps - 1;
    std::vector<int64_t> calls = {2 * window, 2 * window + 1};
    for (int64_t w = 0; chunk == 0 && w < window; ++w) calls.insert(calls.end() - 2, 2 * w);
    ASSERT_EQ(log.passes.size(), seen + calls.size());
    for (const int64_t call : calls)
      check_visible(model, call, first_frame, log.passes[seen++].k, known);
    check_caches(model, rollout, calls.back(), 0, options.sink_frames, options.sink_frames);
  }
  expect_near("latents", expected, on_host(model.ctx, found), kLoopF32);
  // And once more without anybody who looks, replayed where the device replays.
  RollingRollout replayed(model.ctx, *model.transformer, text, options, num_chunks);
  for (int64_t f = 0; f < expected.dim(0); f += options.chunk_frames)
    replayed.next_chunk(model.ctx, noise, found.view().rows(f, f + options.chunk_frames));
  expect_near("latents, replayed", expected, on_host(model.ctx, found), kLoopF32);
  print_tally("rolling_forcing");
}

// One call of two that differ in the adapter.
Tensor flow_with(Device device, const std::string& lora) {
  WanModel model(device, "lora", DType::kF32, DType::kF32, lora);
  const Tensor x = on_device(model.ctx, read_golden(model.golden, "x"));
  const Tensor clock = Tensor::zeros(device, DType::kI64, {1});
  const Tensor t = read_golden(model.golden, "t");
  std::vector<LayerState> layers(static_cast<size_t>(model.config.num_layers));
  for (LayerState& layer : layers)
    layer.memory.cache = make_cache(
        model.ctx, self_forcing_cache(model, clock, DType::kF32, x.dim(0) + 1, 0, x.dim(0)));
  const Tensor text = on_device(model.ctx, read_golden(model.golden, "text"));
  model.transformer->set_text(model.ctx, text, layers);
  std::vector<wan::Level> levels;
  std::vector<const wan::Level*> level_of_frame;
  for (int64_t f = 0; f < x.dim(0); ++f)
    levels.push_back(model.transformer->level(model.ctx, t.data<float>()[f]));
  for (const wan::Level& level : levels) level_of_frame.push_back(&level);
  const RopeTable rope = model.rope(model.ctx, 0, x.dim(0));
  const Tensor flow(device, DType::kF32, x.shape());
  model.transformer->flow(model.ctx, x,
                          {.levels = level_of_frame, .rope = rope, .layers = layers, .reading = {}},
                          flow);
  return on_host(model.ctx, flow);
}

TEST_P(GoldenWan, LowRankUpdatesAreMerged) {
  const Checkpoint golden(golden_path("lora.safetensors"));
  expect_near("with", read_golden(golden, "flow"), flow_with(device(), golden_path("lora.pt")),
              kCallF32);
  expect_near("without", read_golden(golden, "flow_without_lora"), flow_with(device(), ""),
              kCallF32);
  print_tally("lora");
}

TEST_P(GoldenWan, ScheduleIsExact) {
  Context ctx(device(), 1);
  const Checkpoint golden(golden_path("scheduler.safetensors"));
  const auto lists = nlohmann::json::parse(golden.metadata().at("lists"));
  for (const float shift : {5.0F, 8.0F}) {
    const wan::Schedule schedule(shift);
    const std::string at = str("shift", shift, ".");
    const auto expect_table = [&](const std::string& name, std::span<const float> found) {
      const Tensor expected = read_golden(golden, at + name);
      ASSERT_EQ(expected.numel(), static_cast<int64_t>(found.size())) << name;
      for (size_t i = 0; i < found.size(); ++i)
        EXPECT_FLOAT_EQ(expected.data<float>()[i], found[i]) << at << name << " " << i;
    };
    expect_table("sigmas", schedule.sigmas());
    expect_table("timesteps", schedule.timesteps());
    for (const auto& [name, list] : lists.items())
      expect_table("warped." + name, schedule.warp(list.get<std::vector<int64_t>>()));
    const Tensor t = read_golden(golden, "query.t");
    const Tensor index = read_golden(golden, at + "query.index_f64");
    const Tensor x0 = read_golden(golden, "x0");
    for (int64_t i = 0; i < t.numel(); ++i) {
      const float timestep = t.data<float>()[i];
      EXPECT_EQ(schedule.sigma(timestep),
                schedule.sigmas()[static_cast<size_t>(index.data<int32_t>()[i])])
          << timestep;
      const auto part = [&](const std::string& name) {
        return clone(read_golden(golden, name).view().rows(i, i + 1));
      };
      const auto there = [&](const std::string& name) { return on_device(ctx, part(name)); };
      const Tensor found = there("x0");
      schedule.add_noise(ctx, timestep, found, there("eps"), found);
      expect_near("add_noise", part(at + "add_noise.f32"), on_host(ctx, found), {1e-6, 1e-6});
      schedule.to_clean(ctx, timestep, there("xt"), there("v"), found);
      expect_near("to_clean", part(at + "flow_to_x0.f32"), on_host(ctx, found), {1e-6, 1e-6});
    }
  }
  print_tally("scheduler");
}

// rope.hd128.f2h2w3s0: two frames of 2 x 3 tokens from frame 0 on.
TEST_P(GoldenWan, RotationIsThatOfTheOfficialTables) {
  const Checkpoint golden(golden_path("scheduler.safetensors"));
  int count = 0;
  for (const StoredTensor& stored : golden.tensors()) {
    int head_dim = 0, frames = 0, rows = 0, columns = 0, start = 0, end = 0;
    if (std::sscanf(stored.name.c_str(), "rope.hd%d.f%dh%dw%ds%d.in%n", &head_dim, &frames, &rows,
                    &columns, &start, &end) != 5 ||
        end != static_cast<int>(stored.name.size()) || head_dim % 16 != 0)
      continue;
    Context ctx(device(), 1);
    const Tensor x = on_device(ctx, read_golden(golden, stored.name));
    wan::TransformerConfig config;
    config.num_heads = x.dim(1);
    config.dim = x.dim(1) * head_dim;
    const Checkpoint none;
    WeightTable table(none, nullptr);
    const Transformer transformer(config, DType::kF32, DType::kF32, table);
    RopeTable turns = transformer.make_rope(ctx, x.dim(0));
    const Tensor clock = clock_at(ctx, start);
    transformer.set_rope(ctx, clock, rows, columns, turns);
    const Tensor out(device(), DType::kF32, x.shape());
    rope(ctx, x, turns.cos, turns.sin, out);
    const std::string name = stored.name.substr(0, stored.name.size() - 2) + "out";
    expect_near(name, read_golden(golden, name), on_host(ctx, out), {1e-5, 1e-6});
    ++count;
  }
  EXPECT_GT(count, 0);
  print_tally("rope");
}

}  // namespace
}  // namespace longtake
