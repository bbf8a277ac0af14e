#include "nn/dit_layer.h"

#include "ops/elementwise.h"
#include "ops/norm.h"

namespace longtake {
namespace {

// x += y * gate, each frame with its own.
void add_gated_frames(Context& ctx, std::span<const View> frames, int64_t gate, View x, View y) {
  const auto count = static_cast<int64_t>(frames.size());
  for (int64_t f = 0; f < count; ++f)
    add_gated(ctx, frame_rows(x, f, count), frame_rows(y, f, count),
              row(frames[static_cast<size_t>(f)], gate));
}

// Rounds the residual stream to the precision it is kept in.
void round_stream(Context& ctx, DType residual, View x) {
  if (residual == DType::kF32) return;
  const Workspace::Scope scope(ctx.workspace());
  const View rounded = ctx.workspace().take(residual, x.shape());
  convert(ctx, x, rounded);
  convert(ctx, rounded, x);
}

}  // namespace

View row(View matrix, int64_t index) {
  return matrix.rows(index, index + 1).reshape({matrix.dim(-1)});
}

void set_prompts(Context& ctx, View text, const FeedForward& embedding, DType compute,
                 std::span<const DitLayer> layers, std::span<LayerState> states) {
  const Workspace::Scope scope(ctx.workspace());
  const Shape shape{text.dim(0), embedding.down->out_features()};
  const View wide = ctx.workspace().take(DType::kF32, shape);
  const View embedded = ctx.workspace().take(compute, shape);
  embedding.forward(ctx, text, wide);
  convert(ctx, wide, embedded);
  for (size_t n = 0; n < layers.size(); ++n) layers[n].set_prompt(ctx, embedded, states[n].prompt);
}

View frame_rows(View x, int64_t index, int64_t num_frames) {
  const int64_t tokens = x.dim(0) / num_frames;
  return x.rows(index * tokens, (index + 1) * tokens);
}

void DitLayer::list(WeightTable& table, const std::string& name, const DitSizes& sizes,
                    const Shape& modulation_shape, DType compute) {
  for (Attention* attention : {&self_attn, &cross_attn}) {
    attention->num_heads = sizes.num_heads;
    attention->head_dim = sizes.head_dim;
    attention->eps = sizes.eps;
  }
  table.tensor(name + "modulation", modulation_shape, modulation);
  self_attn.list(table, name + "self_attn", /*with_norms=*/true, compute);
  table.tensor(name + "norm3.weight", {sizes.dim}, norm3_weight);
  table.tensor(name + "norm3.bias", {sizes.dim}, norm3_bias);
  cross_attn.list(table, name + "cross_attn", /*with_norms=*/true, compute);
  ffn.list(table, name + "ffn", sizes.dim, sizes.ffn_dim, sizes.dim, compute);
}

void DitLayer::set_prompt(Context& ctx, View embedded, Prompt& prompt) const {
  const Workspace::Scope scope(ctx.workspace());
  const View k = cross_attn.keys(ctx, embedded, nullptr);
  prompt.set(ctx, KvPages(ctx, k, cross_attn.values(ctx, embedded)));
}

void DitLayer::modulate(Context& ctx, std::span<const View> frames, int64_t shift, int64_t scale,
                        View x, View h) const {
  const auto count = static_cast<int64_t>(frames.size());
  for (int64_t f = 0; f < count; ++f) {
    const View& modulations = frames[static_cast<size_t>(f)];
    layer_norm(ctx, frame_rows(x, f, count), row(modulations, scale), row(modulations, shift),
               self_attn.eps, /*scale_plus_one=*/true, frame_rows(h, f, count));
  }
}

void DitLayer::run(Context& ctx, const LayerPass& pass, LayerState& state, View x) const {
  const Workspace::Scope scope(ctx.workspace());
  const View h = ctx.workspace().take(self_attn.q->compute_dtype(), x.shape());
  // What is added to the stream stays f32: rounding it to bf16 would add a tenth to the error.
  const View y = ctx.workspace().take(DType::kF32, x.shape());
  AttentionObserver on_self, on_cross;
  if (pass.observer != nullptr) {
    on_self = [&](const auto& read) { pass.observer->on_self_attention(pass.index, read); };
    on_cross = [&](const auto& read) { pass.observer->on_cross_attention(pass.index, read); };
  }

  modulate(ctx, pass.modulation, /*shift=*/0, /*scale=*/1, x, h);
  self_attention(ctx, self_attn, h, pass.rope, state.memory, pass.buckets, pass.sparse, pass.commit,
                 pass.unread_tokens, y, on_self);
  add_gated_frames(ctx, pass.modulation, /*gate=*/2, x, y);
  round_stream(ctx, pass.residual, x);

  layer_norm(ctx, x, norm3_weight, norm3_bias, self_attn.eps, /*scale_plus_one=*/false, h);
  cross_attention(ctx, cross_attn, h, state.prompt, pass.prompt, y, on_cross);
  add(ctx, x, y);
  round_stream(ctx, pass.residual, x);

  modulate(ctx, pass.modulation, /*shift=*/3, /*scale=*/4, x, h);
  ffn.forward(ctx, h, y);
  add_gated_frames(ctx, pass.modulation, /*gate=*/5, x, y);
  round_stream(ctx, pass.residual, x);
  if (pass.observer != nullptr) pass.observer->on_layer(pass.index, x);
}

void DitLayer::commit(Context& ctx, const LayerPass& pass, LayerState& state, View x) const {
  const Workspace::Scope scope(ctx.workspace());
  const View h = ctx.workspace().take(self_attn.q->compute_dtype(), x.shape());
  modulate(ctx, pass.modulation, /*shift=*/0, /*scale=*/1, x, h);
  commit_keys(ctx, self_attn, h, pass.rope, state.memory, pass.buckets, *pass.commit,
              pass.unread_tokens);
}

}  // namespace longtake
