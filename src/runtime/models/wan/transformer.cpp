#include "models/wan/transformer.h"

#include <array>

#include "base/error.h"
#include "nn/time_sinusoid.h"
#include "ops/copy.h"
#include "ops/elementwise.h"
#include "ops/norm.h"
#include "ops/patchify.h"
#include "ops/rope_grid.h"

namespace longtake::wan {
namespace {

constexpr int64_t kPatchArea = kPatch * kPatch;

// The head's outputs are stored pixel by pixel, channels inside; unpatchify wants channels outside.
std::vector<int64_t> head_rows(int64_t channels) {
  std::vector<int64_t> order;
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t pixel = 0; pixel < kPatchArea; ++pixel) order.push_back(pixel * channels + c);
  }
  return order;
}

constexpr float kImageNormEps = 1e-5F;

// What the player does joins the tokens behind a layer's cross attention.
class ActionInsert final : public LayerInsert {
 public:
  ActionInsert(const ActionModule& module, const Controls& controls, ActionMemory& memory,
               DType residual, bool commits)
      : module_(module),
        controls_(controls),
        memory_(memory),
        residual_(residual),
        commits_(commits) {}

  void run(Context& ctx, View x) const override {
    module_.run(ctx, controls_, memory_, residual_, commits_, x);
  }

 private:
  const ActionModule& module_;
  const Controls& controls_;
  ActionMemory& memory_;
  DType residual_;
  bool commits_;
};

// Frame `index` of [F, C, H, W].
View frame_of(View frames, int64_t index) {
  return frames.rows(index, index + 1).reshape({frames.dim(1), frames.dim(2), frames.dim(3)});
}

}  // namespace

void ImageEmbedding::list(WeightTable& table, int64_t in, int64_t out) {
  const std::string at = "img_emb.proj.";
  table.tensor(at + "0.weight", {in}, norm_in_weight);
  table.tensor(at + "0.bias", {in}, norm_in_bias);
  mlp.activation = Activation::kGelu;
  table.linear(at + "1", in, in, DType::kF32, mlp.up);
  table.linear(at + "3", out, in, DType::kF32, mlp.down);
  table.tensor(at + "4.weight", {out}, norm_out_weight);
  table.tensor(at + "4.bias", {out}, norm_out_bias);
}

void ImageEmbedding::forward(Context& ctx, View tokens, View out) const {
  const Workspace::Scope scope(ctx.workspace());
  const View in = ctx.workspace().take(DType::kF32, tokens.shape());
  const View wide = ctx.workspace().take(DType::kF32, out.shape());
  layer_norm(ctx, tokens, norm_in_weight, norm_in_bias, kImageNormEps, /*scale_plus_one=*/false,
             in);
  mlp.forward(ctx, in, wide);
  layer_norm(ctx, wide, norm_out_weight, norm_out_bias, kImageNormEps, /*scale_plus_one=*/false,
             out);
}

std::vector<std::string> check_weights(const TransformerConfig& config, const Checkpoint& file) {
  WeightTable table(file, nullptr);
  Transformer(config, DType::kF32, DType::kF32, table);
  return table.problems();
}

Transformer::Transformer(const TransformerConfig& config, DType compute, DType residual,
                         WeightTable& table)
    : config_(config), compute_(compute), residual_(residual) {
  const int64_t dim = config.dim;
  // What runs once per prompt or timestep stays f32: its cost does not show, its error would.
  table.linear("patch_embedding", dim, config.in_channels * kPatchArea, compute, patch_embedding_,
               {.stored = Shape{dim, config.in_channels, 1, kPatch, kPatch}, .row_order = {}});
  if (config.reads_image)
    image_embedding_.emplace().list(table, config.text_dim, dim);
  else
    text_embedding_.list(table, "text_embedding", config.text_dim, dim, dim, DType::kF32);
  time_embedding_.activation = Activation::kSilu;
  time_embedding_.list(table, "time_embedding", config.freq_dim, dim, dim, DType::kF32);
  table.linear("time_projection.1", kModulations * dim, dim, DType::kF32, time_projection_);
  const DitSizes sizes{dim, config.num_heads, config.head_dim(), config.ffn_dim, kEps};
  layers_.resize(static_cast<size_t>(config.num_layers));
  for (size_t n = 0; n < layers_.size(); ++n)
    layers_[n].list(table, str("blocks.", n, "."), sizes, {1, kModulations, dim}, compute);
  actions_.resize(static_cast<size_t>(config.actions.num_layers));
  for (size_t n = 0; n < actions_.size(); ++n)
    actions_[n].list(table, str("blocks.", n, ".action_model."), dim, config.actions, compute);
  table.tensor("head.modulation", {1, 2, dim}, head_modulation_);
  table.linear("head.head", config.out_channels * kPatchArea, dim, compute, head_,
               {.stored = {}, .row_order = head_rows(config.out_channels)});
}

void Transformer::set_text(Context& ctx, View text, std::span<LayerState> layers,
                           int64_t last_count) const {
  if (!image_embedding_)
    return set_prompts(ctx, text, text_embedding_, compute_, layers_, layers, last_count);
  const Workspace::Scope scope(ctx.workspace());
  const View embedded = ctx.workspace().take(compute_, {text.dim(0), config_.dim});
  image_embedding_->forward(ctx, text, embedded);
  for (size_t n = 0; n < layers_.size(); ++n)
    layers_[n].set_prompt(ctx, embedded, layers[n].prompt, last_count);
}

Level Transformer::level(Context& ctx, double timestep) const {
  const Workspace::Scope scope(ctx.workspace());
  const int64_t dim = config_.dim;
  const Tensor host_sinusoid({}, DType::kF32, {1, config_.freq_dim});
  const View sinusoid = ctx.workspace().take(DType::kF32, host_sinusoid.shape());
  const View e = ctx.workspace().take(DType::kF32, {1, dim});
  const View e0 = ctx.workspace().take(DType::kF32, {1, kModulations * dim});
  const View activated = ctx.workspace().take(DType::kF32, {1, dim});
  time_sinusoid(timestep, kTheta, host_sinusoid);
  copy(ctx, host_sinusoid, sinusoid);
  time_embedding_.forward(ctx, sinusoid, e);
  silu(ctx, e, activated);
  linear(ctx, activated, *time_projection_, Activation::kNone, e0);

  Level level{Tensor(ctx.device(), DType::kF32, {config_.num_layers, kModulations, dim}),
              Tensor(ctx.device(), DType::kF32, {2, dim})};
  for (size_t n = 0; n < layers_.size(); ++n) {
    const auto at = static_cast<int64_t>(n);
    axpby(ctx, 1, layers_[n].modulation, 1, e0.reshape({1, kModulations, dim}),
          level.layers.view().rows(at, at + 1));
  }
  const View head = head_modulation_.view().reshape({2, dim});
  for (int64_t i = 0; i < 2; ++i)
    axpby(ctx, 1, row(head, i), 1, e.reshape({dim}), row(level.head, i));
  return level;
}

RopeTable Transformer::make_rope(Context& ctx, int64_t tokens) const {
  const Shape shape{tokens, config_.head_dim() / 2};
  return {Tensor(ctx.device(), DType::kF32, shape), Tensor(ctx.device(), DType::kF32, shape)};
}

void Transformer::set_rope(Context& ctx, View clock, int64_t rows, int64_t columns,
                           RopeTable& rope) const {
  rope_grid(ctx, clock,
            {.rows = rows,
             .columns = columns,
             .time_pairs = config_.time_pairs(),
             .space_pairs = config_.space_pairs(),
             .theta = kTheta},
            rope.cos, rope.sin);
}

void Transformer::embed(Context& ctx, View x, const Controls* controls, View tokens) const {
  const Workspace::Scope scope(ctx.workspace());
  const int64_t num_frames = x.dim(0);
  const View patches =
      ctx.workspace().take(compute_, {tokens.dim(0), config_.in_channels * kPatchArea});
  const View joined =
      controls != nullptr
          ? ctx.workspace().take(DType::kF32, {config_.in_channels, x.dim(2), x.dim(3)})
          : View();
  for (int64_t f = 0; f < num_frames; ++f) {
    View frame = frame_of(x, f);
    if (controls != nullptr) {
      copy(ctx, frame, joined.rows(0, x.dim(1)));
      copy(ctx, frame_of(controls->image, f), joined.rows(x.dim(1), config_.in_channels));
      frame = joined;
    }
    patchify(ctx, frame, kPatch, frame_rows(patches, f, num_frames));
  }
  linear(ctx, patches, *patch_embedding_, Activation::kNone, tokens);
}

void Transformer::run_layers(Context& ctx, const Pass& pass, int64_t count,
                             std::optional<ChunkPosition> commit, View tokens) const {
  const Workspace::Scope scope(ctx.workspace());
  Stream stream(ctx, tokens, compute_, residual_);
  FrameModulations frames[2];  // a layer's last gate waits for the next one
  for (int64_t n = 0; n < count; ++n) {
    const auto at = static_cast<size_t>(n);
    LayerPass layer_pass = make_layer_pass(pass, n, commit, tokens, frames[n % 2]);
    std::optional<ActionInsert> insert;
    if (at < actions_.size())
      layer_pass.before_ffn = &insert.emplace(
          actions_[at], *pass.controls, pass.controls->memories[at], residual_, commit.has_value());
    layers_[at].run(ctx, layer_pass, pass.layers[at], stream);
  }
  stream.complete();
}

LayerPass Transformer::make_layer_pass(const Pass& pass, int64_t layer,
                                       std::optional<ChunkPosition> commit, View tokens,
                                       FrameModulations& frames) const {
  const size_t num_frames = pass.levels.size();
  LONGTAKE_CHECK(num_frames <= frames.size(), num_frames, " frames");
  for (size_t f = 0; f < num_frames; ++f)
    frames[f] =
        pass.levels[f]->layers.view().rows(layer, layer + 1).reshape({kModulations, config_.dim});
  const int64_t frame_tokens = tokens.dim(0) / static_cast<int64_t>(num_frames);
  const std::span<const Bucket> buckets =
      layer > 0 ? pass.layers[static_cast<size_t>(layer - 1)].prompt.latest_buckets()
                : std::span<const Bucket>();
  return {.index = layer,
          .modulation = std::span(frames).first(num_frames),
          .rope = pass.rope,
          .residual = residual_,
          .unread_tokens = pass.unread_frames * frame_tokens,
          .buckets = buckets,
          .sparse = pass.sparse,
          .prompt = pass.prompt,
          .commit = commit,
          .observer = pass.observer};
}

View Transformer::begin(Context& ctx, View x, const Pass& pass) const {
  const auto num_frames = static_cast<int64_t>(pass.levels.size());
  LONGTAKE_CHECK((pass.controls != nullptr) == !actions_.empty() &&
                     (pass.controls == nullptr || pass.controls->num_frames() == num_frames),
                 "controls for ", num_frames, " frames");
  const int64_t channels = pass.controls != nullptr ? config_.out_channels : config_.in_channels;
  LONGTAKE_CHECK(x.dim(0) == num_frames && x.dim(1) == channels && x.dim(2) % kPatch == 0 &&
                     x.dim(3) % kPatch == 0,
                 x.shape().to_string(), " for ", num_frames, " frames");
  const int64_t frame_tokens = x.dim(2) / kPatch * (x.dim(3) / kPatch);
  const View tokens = ctx.workspace().take(DType::kF32, {num_frames * frame_tokens, config_.dim});
  embed(ctx, x, pass.controls, tokens);
  for (LayerState& layer : pass.layers) layer.memory.cache->set_reading(ctx, pass.reading);
  return tokens;
}

void Transformer::flow(Context& ctx, View x, const Pass& pass, View flow) const {
  const Workspace::Scope scope(ctx.workspace());
  const View tokens = begin(ctx, x, pass);
  run_layers(ctx, pass, config_.num_layers, std::nullopt, tokens);
  const View h = ctx.workspace().take(compute_, tokens.shape());
  const View patches =
      ctx.workspace().take(DType::kF32, {tokens.dim(0), config_.out_channels * kPatchArea});
  const int64_t num_frames = x.dim(0);
  for (int64_t f = 0; f < num_frames; ++f) {
    const View head = pass.levels[static_cast<size_t>(f)]->head;
    layer_norm(ctx, frame_rows(tokens, f, num_frames), /*scale=*/row(head, 1),
               /*shift=*/row(head, 0), kEps, /*scale_plus_one=*/true, frame_rows(h, f, num_frames));
  }
  linear(ctx, h, *head_, Activation::kNone, patches);
  for (int64_t f = 0; f < num_frames; ++f)
    unpatchify(ctx, frame_rows(patches, f, num_frames), kPatch, frame_of(flow, f));
}

void Transformer::commit(Context& ctx, View x, const Pass& pass, ChunkPosition position) const {
  const Workspace::Scope scope(ctx.workspace());
  const View tokens = begin(ctx, x, pass);
  const int64_t last = config_.num_layers - 1;
  run_layers(ctx, pass, last, position, tokens);
  FrameModulations frames;
  layers_.back().commit(ctx, make_layer_pass(pass, last, position, tokens, frames),
                        pass.layers.back(), tokens);
}

}  // namespace longtake::wan
