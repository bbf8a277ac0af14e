#include "models/world/transformer.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "base/error.h"
#include "device/branch.h"
#include "nn/time_sinusoid.h"
#include "ops/copy.h"
#include "ops/elementwise.h"
#include "ops/patchify.h"
#include "ops/stream_linear.h"

namespace longtake::world {
namespace {

constexpr double kTimeTheta = 10000.0;
constexpr double kTimeScale = 1000.0;  // noise levels in [0, 1] are described as timesteps

LayerPass layer_pass(const Pass& pass, int64_t index, std::span<const View> modulation,
                     std::optional<ChunkPosition> commit) {
  // By the cross attention of the layer before.
  const std::span<const Bucket> buckets =
      index > 0 ? pass.layers[static_cast<size_t>(index - 1)].prompt.latest_buckets()
                : std::span<const Bucket>();
  return {.index = index,
          .modulation = modulation,
          .rope = pass.place.rope,
          .buckets = buckets,
          .sparse = pass.sparse,
          .prompt = pass.prompt,
          .commit = commit,
          .observer = pass.observer};
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
  const DitSizes sizes{dim, config.num_heads, config.head_dim, config.ffn_dim, config.eps};
  layers_.resize(static_cast<size_t>(config.num_layers));
  for (size_t n = 0; n < layers_.size(); ++n)
    layers_[n].list(table, str(at, "blocks.", n, "."), sizes, {kModulations, dim}, compute);
  table.tensor(at + "head.modulation", {2, dim}, head_modulation_);
  table.linear(at + "head.head", config.patch_values(), dim, compute, head_);
}

void Transformer::set_text(Context& ctx, View text, std::span<LayerState> layers) const {
  set_prompts(ctx, text, text_embedding_, compute_, layers_, layers);
}

Level Transformer::level(Context& ctx, double t) const {
  const Workspace::Scope scope(ctx.workspace());
  const int64_t dim = config_.dim;
  const Tensor host_sinusoid({}, DType::kF32, {1, kTimeSinusoid});
  const View sinusoid = ctx.workspace().take(DType::kF32, host_sinusoid.shape());
  const View e = ctx.workspace().take(DType::kF32, {1, dim});
  const View e0 = ctx.workspace().take(DType::kF32, {1, kModulations * dim});
  const View activated = ctx.workspace().take(DType::kF32, {1, dim});
  time_sinusoid(kTimeScale * t, kTimeTheta, host_sinusoid);
  copy(ctx, host_sinusoid, sinusoid);
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
  const Device device = ctx.device();
  const Shape rotation{tokens, config_.head_dim / 2};
  const Shape pose{tokens, 4 * static_cast<int64_t>(config_.pose_harmonics.size())};
  return {{Tensor(device, DType::kF32, rotation), Tensor(device, DType::kF32, rotation)},
          Tensor(device, DType::kF32, pose),
          Tensor(device, DType::kF32, {tokens, config_.dim}),
          {Tensor::staging(device, DType::kF32, rotation),
           Tensor::staging(device, DType::kF32, rotation)},
          Tensor::staging(device, DType::kF32, pose)};
}

void Transformer::set_place(Context& ctx, double camera_x, double camera_y, int64_t frame,
                            Place& place) const {
  const auto side = static_cast<double>(config_.torus_tokens);
  const double turn = 2 * std::numbers::pi / side;
  const int64_t columns = config_.columns();
  const int64_t rows = config_.frame_tokens() / columns;
  const int64_t pairs = config_.head_dim / 2;
  const int64_t time_pairs = config_.rope_time_pairs;
  const auto space_pairs = static_cast<int64_t>(config_.rope_space_harmonics.size());
  const auto num_pose = static_cast<int64_t>(config_.pose_harmonics.size());
  auto* cos = place.host_rope.cos.data<float>();
  auto* sin = place.host_rope.sin.data<float>();
  auto* pose = place.host_pose.data<float>();
  // Rotation and pose of a token are those of its frame, of its row and of its column beside each
  // other: each is computed once and written for all tokens that share it.
  const auto rotate = [&](double angle, int64_t pair, const auto& for_tokens) {
    const auto c = static_cast<float>(std::cos(angle)), s = static_cast<float>(std::sin(angle));
    for_tokens([&](int64_t token) {
      cos[token * pairs + pair] = c;
      sin[token * pairs + pair] = s;
    });
  };
  const auto place_along = [&](double coordinate, int64_t first_pair, int64_t first_pose,
                               const auto& for_tokens) {
    for (int64_t i = 0; i < space_pairs; ++i)
      rotate(turn * static_cast<double>(config_.rope_space_harmonics[static_cast<size_t>(i)]) *
                 coordinate,
             first_pair + i, for_tokens);
    for (int64_t i = 0; i < num_pose; ++i) {
      const double angle =
          turn * static_cast<double>(config_.pose_harmonics[static_cast<size_t>(i)]) * coordinate;
      const auto s = static_cast<float>(std::sin(angle)), c = static_cast<float>(std::cos(angle));
      for_tokens([&](int64_t token) {
        pose[token * 4 * num_pose + first_pose + i] = s;
        pose[token * 4 * num_pose + first_pose + num_pose + i] = c;
      });
    }
  };
  for (int64_t i = 0; i < time_pairs; ++i) {
    const double speed = std::pow(config_.rope_time_theta,
                                  -static_cast<double>(i) / static_cast<double>(time_pairs));
    rotate(static_cast<double>(frame) * speed, i, [&](const auto& body) {
      for (int64_t token = 0; token < rows * columns; ++token) body(token);
    });
  }
  for (int64_t row = 0; row < rows; ++row)
    place_along(std::fmod(camera_y, side) + static_cast<double>(row), time_pairs, 2 * num_pose,
                [&](const auto& body) {
                  for (int64_t column = 0; column < columns; ++column) body(row * columns + column);
                });
  for (int64_t column = 0; column < columns; ++column)
    place_along(std::fmod(camera_x, side) + static_cast<double>(column), time_pairs + space_pairs,
                0, [&](const auto& body) {
                  for (int64_t row = 0; row < rows; ++row) body(row * columns + column);
                });
  copy(ctx, place.host_rope.cos, place.rope.cos);
  copy(ctx, place.host_rope.sin, place.rope.sin);
  copy(ctx, place.host_pose, place.pose);
  linear(ctx, place.pose, *pose_embedding_, Activation::kNone, place.pose_tokens);
}

void Transformer::embed(Context& ctx, View z, const Place& place, View x) const {
  const Workspace::Scope scope(ctx.workspace());
  const View patches =
      ctx.workspace().take(compute_, {config_.frame_tokens(), config_.patch_values()});
  patchify(ctx, z, config_.patch_size, patches);
  add_linear(ctx, patches, *patch_embedding_, /*gate=*/{}, DType::kF32, place.pose_tokens, x);
}

View Transformer::modulation(const Pass& pass, int64_t layer) const {
  return pass.level.layers.view().rows(layer, layer + 1).reshape({kModulations, config_.dim});
}

void Transformer::run_layers(Context& ctx, const Pass& pass, std::optional<ChunkPosition> commit,
                             View x) const {
  const Workspace::Scope scope(ctx.workspace());
  const Attention& sizes = layers_.front().self_attn;
  View own = modulation(pass, 0);
  // Of every layer its own: what is learnt from queries is learnt beside the pass.
  ChunkHeads heads{sizes.take(ctx, x.dim(0))};
  layers_.front().make_heads(ctx, layer_pass(pass, 0, {&own, 1}, commit), x,
                             *pass.layers.front().memory.cache, heads);
  const auto last = static_cast<int64_t>(layers_.size()) - 1;
  for (int64_t n = 0; n < last; ++n) {
    const auto at = static_cast<size_t>(n);
    const View following = modulation(pass, n + 1);
    KvCache& cache = *pass.layers[at + 1].memory.cache;
    ChunkHeads made{sizes.take(ctx, x.dim(0), !commit || n + 1 < last || cache.wants_queries())};
    const NextHeads next{layers_[at + 1], {&following, 1}, cache, made};
    LayerPass layer = layer_pass(pass, n, {&own, 1}, commit);
    layer.heads = &heads;
    layer.next = &next;
    layers_[at].run(ctx, layer, pass.layers[at], x);
    heads = made;
    own = following;
  }
  LayerPass layer = layer_pass(pass, last, {&own, 1}, commit);
  layer.heads = &heads;
  if (commit)
    layers_.back().commit(ctx, layer, pass.layers.back(), x);
  else
    layers_.back().run(ctx, layer, pass.layers.back(), x);
}

void Transformer::velocity(Context& ctx, View z, const Pass& pass, View velocity) const {
  const Workspace::Scope scope(ctx.workspace());
  const Shape shape{config_.frame_tokens(), config_.dim};
  const View x = ctx.workspace().take(DType::kF32, shape);
  embed(ctx, z, pass.place, x);
  if (pass.reuse == nullptr || pass.reuse->must_run(ctx, pass.level.time, x)) {
    const View residual = pass.reuse != nullptr ? pass.reuse->residual() : View();
    if (pass.reuse != nullptr) axpby(ctx, -1, x, 0, x, residual);
    run_layers(ctx, pass, std::nullopt, x);
    if (pass.reuse != nullptr) add(ctx, residual, x);
  } else {
    add(ctx, x, pass.reuse->residual());
  }
  const View patches =
      ctx.workspace().take(DType::kF32, {config_.frame_tokens(), config_.patch_values()});
  const View head = pass.level.head;
  const std::span<const View> vectors(&head, 1);
  norm_linear(ctx, x, {{vectors, 1}, {vectors, 0}, config_.eps, /*scale_plus_one=*/true}, *head_,
              Activation::kNone, patches);
  unpatchify(ctx, patches, config_.patch_size, velocity);
  join_branch(ctx);
}

void Transformer::commit(Context& ctx, View z, const Pass& clean, ChunkPosition position) const {
  const Workspace::Scope scope(ctx.workspace());
  const Shape shape{config_.frame_tokens(), config_.dim};
  const View x = ctx.workspace().take(DType::kF32, shape);
  embed(ctx, z, clean.place, x);
  run_layers(ctx, clean, position, x);
}

}  // namespace longtake::world
