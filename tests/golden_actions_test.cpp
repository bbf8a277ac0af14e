// The causal Wan transformer with action modules, Matrix-Game 2, against the official code.
#include <gtest/gtest.h>

#include "golden_wan_support.h"
#include "ops/copy.h"
#include "ops/elementwise.h"
#include "pipeline/wan_actions.h"
#include "pipeline/wan_rollout.h"

namespace longtake {
namespace {

using namespace testing_support;

std::string call_name(int64_t index) {
  return str("call", index < 10 ? "0" : "", index, ".");
}

// Axes a and b of a matrix of rows exchanged: [A, B, row] -> [B, A, row].
Tensor exchanged(View x, int64_t a, int64_t b, const Shape& shape) {
  Tensor out(Device{}, DType::kF32, shape);
  const int64_t row = x.numel() / (a * b);
  for (int64_t i = 0; i < a; ++i) {
    for (int64_t j = 0; j < b; ++j)
      std::copy_n(x.data<float>() + (i * b + j) * row, row, out.data<float>() + (j * a + i) * row);
  }
  return out;
}

// The run's model, what it is shown, and what is pressed.
class GameModel {
 public:
  explicit GameModel(Device device, DType compute = DType::kF32)
      : ctx(device, 2), golden(golden_path("mg2.safetensors")), dtype(compute) {
    const auto sizes = nlohmann::json::parse(golden.metadata().at("config"));
    height = sizes.at("latent_hw").at(0);
    width = sizes.at("latent_hw").at(1);
    context_frames = sizes.at("local");
    weights = Checkpoint(golden_path("mg2.weights.safetensors"));
    config = wan::transformer_config(
        weights, sizes.at("dim").get<int64_t>() / sizes.at("num_heads").get<int64_t>());
    // The sizes that the engine reads off the weights are those of the run.
    EXPECT_EQ(config.num_layers, sizes.at("num_layers"));
    EXPECT_EQ(config.ffn_dim, sizes.at("ffn_dim"));
    EXPECT_EQ(config.text_dim, sizes.at("clip_dim"));
    EXPECT_EQ(config.actions.num_layers, 1);
    EXPECT_EQ(config.actions.num_heads, sizes.at("heads_num"));
    EXPECT_EQ(config.actions.keyboard_keys, sizes.at("keyboard"));
    EXPECT_EQ(config.actions.embed_dim, sizes.at("hidden"));
    EXPECT_EQ(config.actions.has_mouse, sizes.at("mouse"));
    WeightTable table(weights, &ctx);
    transformer.emplace(config, compute, DType::kF32, table);
    table.finish();
    image = by_frame("cond_concat");
    for (const char* name : {"keyboard", "mouse"}) {
      const Tensor stored = read_golden(golden, name);
      auto& to = name[0] == 'k' ? rows.keyboard : rows.mouse;
      to.assign(stored.data<float>(), stored.data<float>() + stored.numel());
    }
  }

  // A stored tensor [C, F, H, W] as [F, C, H, W].
  Tensor by_frame(const std::string& name) const {
    const Tensor stored = read_golden(golden, name);
    const View x = stored;
    return exchanged(x, x.dim(0), x.dim(1), {x.dim(1), x.dim(0), x.dim(2), x.dim(3)});
  }

  WanOptions options() const {
    WanOptions out = matrix_game_options(context_frames);
    out.steps = {1000};
    out.height = height;
    out.width = width;
    out.dtype = dtype;
    return out;
  }

  int64_t chunk_frames() const { return options().chunk_frames; }

  // What the chunk at first_frame is made under.
  void fill(int64_t first_frame, wan::Controls& controls) {
    ActionWindows(ctx, config, rows, controls).fill(ctx, first_frame, controls);
    const View part = image.view().rows(first_frame, first_frame + controls.num_frames());
    copy(ctx, part, controls.image);
    ctx.synchronize();
  }

  Context ctx;
  Checkpoint golden, weights;
  DType dtype;
  wan::TransformerConfig config;
  int64_t height = 0, width = 0, context_frames = 0;
  std::optional<wan::Transformer> transformer;
  Tensor image;
  ActionRows rows;
};

class GoldenActions : public GoldenDeviceTest {};

LONGTAKE_ON_BOTH_DEVICES(GoldenActions);

// Every call from its stored input: what comes out, and what is remembered by then.
class GameReplay {
 public:
  GameReplay(GameModel& model, const Bound& bound)
      : model_(model), bound_(bound), recorder_(model.ctx, 0, tokens()) {
    const int64_t chunk = model.chunk_frames();
    CacheOptions cache;
    cache.memory = "window";
    cache.sink_frames = 0;
    cache.window_frames = model.context_frames - chunk;
    cache.dtype = model.dtype;
    cache.num_heads = model.config.num_heads;
    cache.head_dim = model.config.head_dim();
    cache.tokens_per_frame = tokens();
    cache.chunk_frames = chunk;
    clock_ = clock_at(model.ctx, 0);
    cache.clock = clock_;
    layers_.resize(static_cast<size_t>(model.config.num_layers));
    for (LayerState& layer : layers_) layer.memory.cache = make_cache(model.ctx, cache);
    controls_ = wan::make_controls(model.ctx, model.config, model.dtype, clock_, chunk,
                                   model.context_frames - chunk, model.height, model.width);
    const Tensor context = on_device(model.ctx, read_golden(model.golden, "visual_context"));
    model.transformer->set_text(model.ctx, context, layers_);
  }

  int64_t run_all() {
    int64_t count = 0;
    while (model_.golden.find(call_name(count) + "meta") != nullptr) run_call(count++);
    check_last_reads();
    return count;
  }

 private:
  int64_t tokens() const { return model_.height * model_.width / (wan::kPatch * wan::kPatch); }

  void run_call(int64_t index) {
    const std::string at = call_name(index);
    SCOPED_TRACE(at);
    const int64_t first_frame = golden_int(model_.golden, at + "meta", 0);
    const Tensor x = on_device(model_.ctx, model_.by_frame(at + "x"));
    const float t = read_golden(model_.golden, at + "t").data<float>()[0];
    const wan::Level level = model_.transformer->level(model_.ctx, t);
    const std::vector<const wan::Level*> levels(static_cast<size_t>(x.view().dim(0)), &level);
    set_clock(model_.ctx, clock_, first_frame);
    set_rope(model_.ctx, controls_);
    model_.fill(first_frame, controls_);
    RopeTable rope = model_.transformer->make_rope(model_.ctx, x.view().dim(0) * tokens());
    model_.transformer->set_rope(model_.ctx, clock_, model_.height / wan::kPatch,
                                 model_.width / wan::kPatch, rope);
    const wan::Pass pass{.levels = levels,
                         .rope = rope,
                         .layers = layers_,
                         .reading = {},
                         .observer = &recorder_,
                         .controls = &controls_};
    const Tensor flow(model_.ctx.device(), DType::kF32, x.shape());
    model_.transformer->flow(model_.ctx, x, pass, flow);
    expect_near("flow", model_.by_frame(at + "flow"), on_host(model_.ctx, flow), bound_);
    check_memories(index, first_frame);
    if (t == 0) model_.transformer->commit(model_.ctx, x, pass, {first_frame, x.view().dim(0)});
  }

  // What the module of layer 0 reads: the newest frames, as many as there are.
  void check_memories(int64_t index, int64_t first_frame) {
    const std::string at = call_name(index);
    const int64_t all = model_.context_frames;
    const int64_t there = std::min(all, first_frame + controls_.num_frames());
    EXPECT_EQ(golden_int(model_.golden, at + "meta", 4), there);
    EXPECT_EQ(golden_int(model_.golden, at + "meta", 5), there);
    const auto check = [&](const std::string& name, const Tensor& found, int64_t places) {
      const Tensor expected = read_golden_f32(model_.golden, at + name);
      const Tensor on_its_device(model_.ctx.device(), DType::kF32, found.shape());
      convert(model_.ctx, found, on_its_device);
      const Tensor wide = on_host(model_.ctx, on_its_device);
      const Shape shape{there, places, found.view().dim(2), found.view().dim(3)};
      expect_near(name, exchanged(expected, places, there, shape),
                  wide.view().rows(all - there, all), bound_);
    };
    const wan::ActionMemory& memory = controls_.memories.at(0);
    check("mouse_cache.k", memory.mouse.k, tokens());
    check("mouse_cache.v", memory.mouse.v, tokens());
    check("keyboard_cache.k", memory.keyboard.k, 1);
    check("keyboard_cache.v", memory.keyboard.v, 1);
  }

  void check_last_reads() {
    for (const auto& [layer, read] : recorder_.rows) {
      const std::string cache = str("final.cache.", layer, ".");
      expect_near(cache + "k", read_golden_f32(model_.golden, cache + "k"), read.k, bound_);
      expect_near(cache + "v", read_golden_f32(model_.golden, cache + "v"), read.v, bound_);
    }
  }

  GameModel& model_;
  Bound bound_;
  std::vector<LayerState> layers_;
  Tensor clock_;
  wan::Controls controls_;
  ReadRecorder recorder_{model_.ctx, /*sink_frames=*/0, tokens()};
};

TEST_P(GoldenActions, CallsAndMemoriesF32) {
  GameModel model(device());
  EXPECT_GT(GameReplay(model, kCallF32).run_all(), 0);
  print_tally("mg2");
}

TEST_P(GoldenActions, CallsAndMemoriesBF16) {
  if (on_gpu()) GTEST_SKIP() << "the GPU's bf16 pages have heads of 64 or 128 channels, these 32";
  if (!bf16_products_supported()) GTEST_SKIP() << "no bf16 products on this machine";
  GameModel model(device(), DType::kBF16);
  EXPECT_GT(GameReplay(model, kResidualF32).run_all(), 0);
  print_tally("mg2 in bf16");
}

// The module of layer 0 alone, from its stored inputs.
TEST_P(GoldenActions, TheModuleAlone) {
  GameModel model(device());
  wan::ActionModule module;
  WeightTable table(model.weights, &model.ctx);
  module.list(table, "blocks.0.action_model.", model.config.dim, model.config.actions, DType::kF32);
  const int64_t chunk = model.chunk_frames();
  const Tensor clock = clock_at(model.ctx, 0);
  wan::Controls controls =
      wan::make_controls(model.ctx, model.config, DType::kF32, clock, chunk,
                         model.context_frames - chunk, model.height, model.width);
  int64_t call = 0;
  for (; model.golden.find(call_name(call) + "meta") != nullptr; ++call) {
    const std::string at = call_name(call);
    const int64_t first_frame = golden_int(model.golden, at + "meta", 0);
    set_clock(model.ctx, clock, first_frame);
    set_rope(model.ctx, controls);
    model.fill(first_frame, controls);
    const Tensor x = on_device(model.ctx, read_golden(model.golden, at + "action.in"));
    const bool is_clean = read_golden(model.golden, at + "t").data<float>()[0] == 0;
    module.run(model.ctx, controls, controls.memories[0], DType::kF32, is_clean, x);
    expect_near(at + "out", read_golden(model.golden, at + "action.out"), on_host(model.ctx, x),
                kActivationF32);
  }
  EXPECT_GT(call, 0);
  print_tally("action module");
}

// A rollout that remembers the stored clean chunks makes of the next one's noise what the official
// pass over it makes, at every place in the video.
TEST_P(GoldenActions, RolloutGoesOnFromWhatItRemembers) {
  GameModel model(device());
  const WanOptions options = model.options();
  const int64_t chunk = options.chunk_frames;
  const Tensor context = read_golden(model.golden, "visual_context");
  int64_t begin = 0;
  for (int64_t call = 0; model.golden.find(call_name(call) + "meta") != nullptr; call += 2) {
    SCOPED_TRACE(call);
    ChunkRollout rollout(model.ctx, *model.transformer, context, options);
    for (int64_t past = 1; past < call; past += 2) {
      model.fill(rollout.num_frames(), *rollout.controls());
      rollout.remember(model.ctx, model.by_frame(call_name(past) + "x"));
    }
    const Tensor x = model.by_frame(call_name(call) + "x");
    const Tensor noise = on_device(model.ctx, x);
    model.fill(rollout.num_frames(), *rollout.controls());
    const Tensor found(model.ctx.device(), DType::kF32, x.shape());
    rollout.next_chunk(
        model.ctx, [&](const NoiseDraw&, View out) { copy(model.ctx, noise, out); }, found);
    const Tensor expected = model.by_frame(call_name(call) + "flow");
    Context cpu(Device{}, 1);
    wan::Schedule().to_clean(cpu, 1000, x, expected, expected);
    expect_near("latents", expected, on_host(model.ctx, found), kLoopF32);
    begin += chunk;
    EXPECT_EQ(rollout.num_frames(), begin);
  }
  EXPECT_GT(begin, 0);
  print_tally("mg2 rollout");
}

}  // namespace
}  // namespace longtake
