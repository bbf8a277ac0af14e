#include "models/world/transformer.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "base/error.h"
#include "ops/elementwise.h"
#include "ops/norm.h"
#include "ops/patchify.h"

namespace longtake::world {
namespace {

constexpr int64_t kModulations = 6;  // shift1, scale1, gate1, shift2, scale2, gate2
constexpr double kTimeTheta = 10000.0;
constexpr double kTimeScale = 1000.0;  // noise levels in [0, 1] are described as timesteps

View row(View matrix, int64_t index) {
  return matrix.rows(index, index + 1).reshape({matrix.dim(-1)});
}

// [cos(a_i), sin(a_i)], a_i = 1000 t * 10000^(-i / half): out [1, kTimeSinusoid].
void time_sinusoid(double t, View out) {
  constexpr int64_t kHalf = kTimeSinusoid / 2;
  auto* values = out.data<float>();
  for (int64_t i = 0; i < kHalf; ++i) {
    const double angle =
        kTimeScale * t * std::pow(kTimeTheta, -static_cast<double>(i) / double{kHalf});
    values[i] = static_cast<float>(std::cos(angle));
    values[kHalf + i] = static_cast<float>(std::sin(angle));
  }
}

}  // namespace

Transformer::Transformer(const TransformerConfig& config, int64_t text_dim, DType compute,
                         WeightTable& table)
    : config_(config), compute_(compute) {
  const std::string at = "transformer.";
  const int64_t dim = config.dim;
  // What runs once per frame, level or prompt stays f32: its cost does not show, its error would.
  table.linear(at + "patch_embedding", dim, config.patch_values(), compute, patch_embedding_);
  table.linear(at + "pose_embedding", dim, 4 * static_cast<int64_t>(config.pose_harmonics.size()),
               DType::kF32, pose_embedding_);
  text_embedding_.list(table, at + "text_embedding", text_dim, dim, dim, DType::kF32);
  time_embedding_.activation = Activation::kSilu;
  time_embedding_.list(table, at + "time_embedding", kTimeSinusoid, dim, dim, DType::kF32);
  table.linear(at + "time_projection.1", kModulations * dim, dim, DType::kF32, time_projection_);
  for (int64_t n = 0; n < config.num_layers; ++n) {
    const std::string layer_at = str(at, "blocks.", n, ".");
    Layer layer;
    for (Attention* attention : {&layer.self_attn, &layer.cross_attn}) {
      attention->num_heads = config.num_heads;
      attention->head_dim = config.head_dim;
      attention->eps = config.eps;
    }
    table.tensor(layer_at + "modulation", {kModulations, dim}, layer.modulation);
    layer.self_attn.list(table, layer_at + "self_attn", /*with_norms=*/true, compute);
    table.tensor(layer_at + "norm3.weight", {dim}, layer.norm3_weight);
    table.tensor(layer_at + "norm3.bias", {dim}, layer.norm3_bias);
    layer.cross_attn.list(table, layer_at + "cross_attn", /*with_norms=*/true, compute);
    layer.ffn.list(table, layer_at + "ffn", dim, config.ffn_dim, dim, compute);
    layers_.push_back(std::move(layer));
  }
  table.tensor(at + "head.modulation", {2, dim}, head_modulation_);
  table.linear(at + "head.head", config.patch_values(), dim, compute, head_);
}

void Transformer::set_text(Context& ctx, View text, std::span<LayerState> layers) const {
  const Workspace::Scope scope(ctx.workspace());
  const Shape shape{text.dim(0), config_.dim};
  const View wide = ctx.workspace().take(DType::kF32, shape);
  const View embedded = ctx.workspace().take(compute_, shape);
  text_embedding_.forward(ctx, text, wide);
  convert(ctx, wide, embedded);
  for (size_t n = 0; n < layers_.size(); ++n) {
    const Workspace::Scope layer_scope(ctx.workspace());
    const Attention& attention = layers_[n].cross_attn;
    const View k = attention.keys(ctx, embedded, nullptr);
    Prompt& prompt = layers[n].prompt;
    prompt.pages = KvPages(ctx, k, attention.values(ctx, embedded));
    if (prompt.selector != nullptr) prompt.selector->set_prompt(ctx, prompt.pages.view());
  }
}

Level Transformer::level(Context& ctx, double t) const {
  const Workspace::Scope scope(ctx.workspace());
  const int64_t dim = config_.dim;
  const View sinusoid = ctx.workspace().take(DType::kF32, {1, kTimeSinusoid});
  const View e = ctx.workspace().take(DType::kF32, {1, dim});
  const View e0 = ctx.workspace().take(DType::kF32, {1, kModulations * dim});
  const View activated = ctx.workspace().take(DType::kF32, {1, dim});
  time_sinusoid(t, sinusoid);
  time_embedding_.forward(ctx, sinusoid, e);
  silu(ctx, e, activated);
  linear(ctx, activated, *time_projection_, Activation::kNone, e0);

  Level level{Tensor(ctx.device(), DType::kF32, {config_.num_layers, kModulations, dim}),
              Tensor(ctx.device(), DType::kF32, {2, dim}),
              Tensor(ctx.device(), DType::kF32, {dim})};
  axpby(ctx, 1, e.reshape({dim}), 0, e.reshape({dim}), level.time);
  for (int64_t n = 0; n < config_.num_layers; ++n)
    axpby(ctx, 1, layers_[static_cast<size_t>(n)].modulation, 1, e0.reshape({kModulations, dim}),
          level.layers.view().rows(n, n + 1).reshape({kModulations, dim}));
  for (int64_t i = 0; i < 2; ++i)
    axpby(ctx, 1, row(head_modulation_, i), 1, e.reshape({dim}), row(level.head, i));
  return level;
}

Place Transformer::make_place(Context& ctx) const {
  const int64_t tokens = config_.frame_tokens();
  const Shape rotation{tokens, config_.head_dim / 2};
  return {
      {Tensor(ctx.device(), DType::kF32, rotation), Tensor(ctx.device(), DType::kF32, rotation)},
      Tensor(ctx.device(), DType::kF32, {tokens, config_.dim})};
}

void Transformer::set_place(Context& ctx, double camera_x, double camera_y, int64_t frame,
                            Place& place) const {
  const Workspace::Scope scope(ctx.workspace());
  const auto side = static_cast<double>(config_.torus_tokens);
  const double turn = 2 * std::numbers::pi / side;
  const auto num_pose = static_cast<int64_t>(config_.pose_harmonics.size());
  const View features = ctx.workspace().take(DType::kF32, {config_.frame_tokens(), 4 * num_pose});
  auto* cos = place.rope.cos.data<float>();
  auto* sin = place.rope.sin.data<float>();
  auto* feature = features.data<float>();
  const auto rotate = [&](double angle) {
    *cos++ = static_cast<float>(std::cos(angle));
    *sin++ = static_cast<float>(std::sin(angle));
  };
  for (int64_t token = 0; token < config_.frame_tokens(); ++token) {
    const double x = std::fmod(camera_x, side) + static_cast<double>(token % config_.columns());
    const double y = std::fmod(camera_y, side) + static_cast<double>(token / config_.columns());
    for (int64_t i = 0; i < config_.rope_time_pairs; ++i)
      rotate(static_cast<double>(frame) *
             std::pow(config_.rope_time_theta,
                      -static_cast<double>(i) / static_cast<double>(config_.rope_time_pairs)));
    for (const int64_t n : config_.rope_space_harmonics) rotate(turn * static_cast<double>(n) * y);
    for (const int64_t n : config_.rope_space_harmonics) rotate(turn * static_cast<double>(n) * x);
    for (const double coordinate : {x, y}) {
      for (const int64_t n : config_.pose_harmonics)
        *feature++ = static_cast<float>(std::sin(turn * static_cast<double>(n) * coordinate));
      for (const int64_t n : config_.pose_harmonics)
        *feature++ = static_cast<float>(std::cos(turn * static_cast<double>(n) * coordinate));
    }
  }
  linear(ctx, features, *pose_embedding_, Activation::kNone, place.pose_tokens);
}

void Transformer::embed(Context& ctx, View z, const Place& place, View x) const {
  const Workspace::Scope scope(ctx.workspace());
  const View patches =
      ctx.workspace().take(compute_, {config_.frame_tokens(), config_.patch_values()});
  patchify(ctx, z, config_.patch_size, patches);
  linear(ctx, patches, *patch_embedding_, Activation::kNone, x);
  add(ctx, x, place.pose_tokens);
}

View Transformer::modulation(const Pass& pass, int64_t layer) const {
  return pass.level.layers.view().rows(layer, layer + 1).reshape({kModulations, config_.dim});
}

void Transformer::run_layer(Context& ctx, int64_t index, const Pass& pass,
                            std::optional<ChunkPosition> commit, View x) const {
  const Workspace::Scope scope(ctx.workspace());
  const Layer& layer = layers_[static_cast<size_t>(index)];
  LayerState& state = pass.layers[static_cast<size_t>(index)];
  const View h = ctx.workspace().take(compute_, x.shape());
  // What is added to the stream stays f32: rounding it to bf16 would add a tenth to the error.
  const View y = ctx.workspace().take(DType::kF32, x.shape());
  const View modulations = modulation(pass, index);
  const auto part = [&](int64_t i) { return row(modulations, i); };
  AttentionObserver on_self, on_cross;
  if (pass.observer != nullptr) {
    on_self = [&](const auto& read) { pass.observer->on_self_attention(index, read); };
    on_cross = [&](const auto& read) { pass.observer->on_cross_attention(index, read); };
  }

  layer_norm(ctx, x, /*scale=*/part(1), /*shift=*/part(0), config_.eps, true, h);
  self_attention(ctx, layer.self_attn, h, pass.place.rope, state.memory, pass.sparse, commit, y,
                 on_self);
  add_gated(ctx, x, y, /*gate=*/part(2));

  layer_norm(ctx, x, layer.norm3_weight, layer.norm3_bias, config_.eps, false, h);
  cross_attention(ctx, layer.cross_attn, h, state.prompt, pass.prompt, y, on_cross);
  add(ctx, x, y);

  layer_norm(ctx, x, /*scale=*/part(4), /*shift=*/part(3), config_.eps, true, h);
  layer.ffn.forward(ctx, h, y);
  add_gated(ctx, x, y, /*gate=*/part(5));
  if (pass.observer != nullptr) pass.observer->on_layer(index, x);
}

void Transformer::velocity(Context& ctx, View z, const Pass& pass, View velocity) const {
  const Workspace::Scope scope(ctx.workspace());
  const Shape shape{config_.frame_tokens(), config_.dim};
  const View x = ctx.workspace().take(DType::kF32, shape);
  embed(ctx, z, pass.place, x);
  if (pass.reuse == nullptr || pass.reuse->must_run(pass.level.time, x)) {
    const View residual = pass.reuse != nullptr ? pass.reuse->residual() : View();
    if (pass.reuse != nullptr) axpby(ctx, -1, x, 0, x, residual);
    for (int64_t n = 0; n < config_.num_layers; ++n) run_layer(ctx, n, pass, std::nullopt, x);
    if (pass.reuse != nullptr) add(ctx, residual, x);
  } else {
    add(ctx, x, pass.reuse->residual());
  }
  const View h = ctx.workspace().take(compute_, shape);
  const View patches =
      ctx.workspace().take(DType::kF32, {config_.frame_tokens(), config_.patch_values()});
  const View head = pass.level.head;
  layer_norm(ctx, x, /*scale=*/row(head, 1), /*shift=*/row(head, 0), config_.eps, true, h);
  linear(ctx, h, *head_, Activation::kNone, patches);
  unpatchify(ctx, patches, config_.patch_size, velocity);
}

void Transformer::commit(Context& ctx, View z, const Pass& clean, ChunkPosition position) const {
  const Workspace::Scope scope(ctx.workspace());
  const Shape shape{config_.frame_tokens(), config_.dim};
  const View x = ctx.workspace().take(DType::kF32, shape);
  embed(ctx, z, clean.place, x);
  const int64_t last = config_.num_layers - 1;
  for (int64_t n = 0; n < last; ++n) run_layer(ctx, n, clean, position, x);
  const View h = ctx.workspace().take(compute_, shape);
  const View modulations = modulation(clean, last);
  layer_norm(ctx, x, /*scale=*/row(modulations, 1), /*shift=*/row(modulations, 0), config_.eps,
             true, h);
  commit_keys(ctx, layers_.back().self_attn, h, clean.place.rope, clean.layers.back().memory,
              position);
}

}  // namespace longtake::world
