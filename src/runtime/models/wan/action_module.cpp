#include "models/wan/action_module.h"

#include <array>
#include <cmath>

#include "attention/over_time.h"
#include "base/error.h"
#include "ops/copy.h"
#include "ops/elementwise.h"
#include "ops/heads.h"
#include "ops/image.h"
#include "ops/norm.h"
#include "ops/residual.h"
#include "ops/rope.h"
#include "ops/rope_grid.h"

namespace longtake::wan {
namespace {

constexpr float kMouseNormEps = 1e-5F;
constexpr double kActionTheta = 256;
// Of a head's 32 pairs these turn with the frame; the others belong to rows and columns of a grid
// that has one of each, and stand still.
constexpr int64_t kTurningPairs = 4, kStillPairs = 14;

// x in the compute dtype.
View narrowed(Context& ctx, View x, DType compute) {
  const View out = ctx.workspace().take(compute, x.shape());
  convert(ctx, x, out);
  return out;
}

// The newest frames become history.
void keep(Context& ctx, const TimeMemory& memory, int64_t num_frames) {
  for (const Tensor* frames : {&memory.k, &memory.v}) {
    if (frames->empty()) continue;
    const View all = *frames;
    // One by one and oldest first: what is written may be what a later frame is read from.
    for (int64_t f = 0; f < all.dim(0) - num_frames; ++f)
      copy(ctx, all.rows(f + num_frames, f + num_frames + 1), all.rows(f, f + 1));
  }
}

}  // namespace

Controls make_controls(Context& ctx, const TransformerConfig& config, DType compute, View clock,
                       int64_t frames, int64_t history, int64_t height, int64_t width) {
  const ActionConfig& actions = config.actions;
  const int64_t places = height / kPatch * (width / kPatch);
  const auto zeros = [&](DType dtype, const Shape& shape) {
    return Tensor::zeros(ctx.device(), dtype, shape);
  };
  const auto memory = [&](int64_t of_places) {
    const Shape shape{history + frames, of_places, actions.num_heads, kActionHeadDim};
    return TimeMemory{zeros(compute, shape), zeros(compute, shape)};
  };
  Controls out;
  out.image = zeros(DType::kF32, {frames, config.in_channels - config.out_channels, height, width});
  if (actions.has_mouse)
    out.mouse = zeros(DType::kF32, {frames * places, kActionWindow * kMouseAxes});
  out.keyboard = zeros(DType::kF32, {frames * kActionWindow, actions.keyboard_keys});
  const Shape rotation{frames, kActionHeadDim / 2};
  out.rope = {zeros(DType::kF32, rotation), zeros(DType::kF32, rotation)};
  out.clock = clock;
  for (int64_t n = 0; n < actions.num_layers; ++n)
    out.memories.push_back({actions.has_mouse ? memory(places) : TimeMemory(), memory(1)});
  return out;
}

void set_rope(Context& ctx, Controls& controls) {
  rope_grid(ctx, controls.clock,
            {.rows = 1,
             .columns = 1,
             .time_pairs = kTurningPairs,
             .space_pairs = kStillPairs,
             .theta = kActionTheta},
            controls.rope.cos, controls.rope.sin);
}

void ActionModule::list(WeightTable& table, const std::string& name, int64_t dim,
                        const ActionConfig& config, DType compute) {
  config_ = config;
  const int64_t width = config.num_heads * kActionHeadDim;
  const LinearForm no_bias{.stored = {}, .row_order = {}, .has_bias = false};
  std::array<float, kActionHeadDim> ones;
  ones.fill(1);
  table.constant(ones, ones_);
  // The released files hold weights of these norms, which the released code does not apply.
  const auto leave_norms = [&](const char* part) {
    for (const char* of : {"q", "k"})
      table.leave_in_file(str(name, part, "_attn_", of, "_norm.weight"), {kActionHeadDim});
  };
  if (config.has_mouse) {
    mouse_mlp_.list(table, name + "mouse_mlp", dim + kActionWindow * kMouseAxes, width, width,
                    compute);
    table.tensor(name + "mouse_mlp.3.weight", {width}, mouse_norm_weight_);
    table.tensor(name + "mouse_mlp.3.bias", {width}, mouse_norm_bias_);
    table.linear(name + "t_qkv", 3 * width, width, compute, mouse_qkv_, no_bias);
    table.linear(name + "proj_mouse", dim, width, compute, mouse_out_, no_bias);
    leave_norms("img");
  }
  keyboard_embedding_.activation = Activation::kSilu;
  keyboard_embedding_.list(table, name + "keyboard_embed", config.keyboard_keys, config.embed_dim,
                           config.embed_dim, DType::kF32);
  table.linear(name + "mouse_attn_q", width, dim, compute, keyboard_q_, no_bias);
  table.linear(name + "keyboard_attn_kv", 2 * width, kActionWindow * config.embed_dim, compute,
               keyboard_kv_, no_bias);
  table.linear(name + "proj_keyboard", dim, width, compute, keyboard_out_, no_bias);
  leave_norms("key");
}

void ActionModule::run(Context& ctx, const Controls& controls, ActionMemory& memory, DType residual,
                       bool commits, View x) const {
  if (config_.has_mouse) add_mouse(ctx, controls, memory.mouse, residual, x);
  add_keyboard(ctx, controls, memory.keyboard, residual, x);
  if (!commits) return;
  keep(ctx, memory.mouse, controls.num_frames());
  keep(ctx, memory.keyboard, controls.num_frames());
}

void ActionModule::add_mouse(Context& ctx, const Controls& controls, TimeMemory& memory,
                             DType residual, View x) const {
  const Workspace::Scope scope(ctx.workspace());
  const int64_t length = x.dim(0), dim = x.dim(1);
  const DType compute = mouse_out_->compute_dtype();
  const int64_t width = config_.num_heads * kActionHeadDim;
  const auto as_image = [&](View rows) { return rows.reshape({1, length, rows.dim(1)}); };
  const View joined = ctx.workspace().take(compute, {length, dim + controls.mouse.dim(1)});
  const View wide = ctx.workspace().take(DType::kF32, {length, width});
  const View features = ctx.workspace().take(compute, {length, width});
  const View qkv = ctx.workspace().take(DType::kF32, {length, 3 * width});
  const View parts[] = {as_image(narrowed(ctx, x, compute)),
                        as_image(narrowed(ctx, controls.mouse, compute))};
  concat_channels(ctx, parts, as_image(joined));
  mouse_mlp_.forward(ctx, joined, wide);
  layer_norm(ctx, wide, mouse_norm_weight_, mouse_norm_bias_, kMouseNormEps,
             /*scale_plus_one=*/false, features);
  linear(ctx, features, *mouse_qkv_, Activation::kNone, qkv);
  std::array<HeadPart, 3> heads;
  for (HeadPart& part : heads)
    part.out = ctx.workspace().take(DType::kF32, {length, config_.num_heads, kActionHeadDim});
  split_heads(ctx, qkv, heads, View(), View(), kEps);
  attend_and_add(ctx, controls, memory, heads[0].out, heads[1].out, heads[2].out, *mouse_out_,
                 residual, x);
}

void ActionModule::add_keyboard(Context& ctx, const Controls& controls, TimeMemory& memory,
                                DType residual, View x) const {
  const Workspace::Scope scope(ctx.workspace());
  const int64_t length = x.dim(0), num_frames = controls.num_frames();
  const DType compute = keyboard_out_->compute_dtype();
  const int64_t width = config_.num_heads * kActionHeadDim;
  const View embedded =
      ctx.workspace().take(DType::kF32, {num_frames * kActionWindow, config_.embed_dim});
  const View kv = ctx.workspace().take(DType::kF32, {num_frames, 2 * width});
  const View q = ctx.workspace().take(DType::kF32, {length, width});
  keyboard_embedding_.forward(ctx, controls.keyboard, embedded);
  linear(ctx,
         narrowed(ctx, embedded.reshape({num_frames, kActionWindow * config_.embed_dim}), compute),
         *keyboard_kv_, Activation::kNone, kv);
  linear(ctx, narrowed(ctx, x, compute), *keyboard_q_, Activation::kNone, q);
  std::array<HeadPart, 2> heads;
  for (HeadPart& part : heads)
    part.out = ctx.workspace().take(DType::kF32, {num_frames, config_.num_heads, kActionHeadDim});
  split_heads(ctx, kv, heads, View(), View(), kEps);
  attend_and_add(ctx, controls, memory, q.reshape({length, config_.num_heads, kActionHeadDim}),
                 heads[0].out, heads[1].out, *keyboard_out_, residual, x);
}

void ActionModule::attend_and_add(Context& ctx, const Controls& controls, TimeMemory& memory,
                                  View q, View k, View v, const LinearWeight& projection,
                                  DType residual, View x) const {
  const int64_t num_frames = controls.num_frames(), heads = config_.num_heads;
  const View all = memory.k;
  LONGTAKE_CHECK(x.dim(0) % num_frames == 0 && k.dim(0) == num_frames * all.dim(1),
                 x.shape().to_string(), " for ", num_frames, " frames");
  const int64_t history = all.dim(0) - num_frames;
  const auto own = [&](const Tensor& frames) {
    return frames.view().rows(history, history + num_frames);
  };
  // All places of a frame turn alike.
  const auto rotate = [&](View from, View to) {
    const View rows = from.reshape({from.dim(0) * heads, kActionHeadDim});
    rms_norm(ctx, rows, ones_, kEps, rows);
    const Shape by_frame{num_frames, from.dim(0) / num_frames * heads, kActionHeadDim};
    rope(ctx, from.reshape(by_frame), controls.rope.cos, controls.rope.sin, to.reshape(by_frame));
  };
  const Shape by_place{num_frames, q.dim(0) / num_frames, heads, kActionHeadDim};
  const View turned = ctx.workspace().take(all.dtype(), by_place);
  const View mixed = ctx.workspace().take(all.dtype(), by_place);
  const View y = ctx.workspace().take(DType::kF32, x.shape());
  rotate(q, turned);
  rotate(k, own(memory.k));
  convert(ctx, v, own(memory.v).reshape(v.shape()));
  const float scale = 1 / std::sqrt(static_cast<float>(kActionHeadDim));
  attend_over_time(ctx, turned, memory.k, memory.v, controls.clock, scale, mixed);
  linear(ctx, mixed.reshape({x.dim(0), heads * kActionHeadDim}), projection, Activation::kNone, y);
  add_frames(ctx, x, y, /*gate=*/{}, residual);
}

}  // namespace longtake::wan
