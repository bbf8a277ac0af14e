#include "nn/dit_layer.h"

#include "ops/elementwise.h"
#include "ops/residual.h"

namespace longtake {

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
  self_attn.list_self(table, name + "self_attn", /*with_norms=*/true, compute);
  table.tensor(name + "norm3.weight", {sizes.dim}, norm3_weight);
  table.tensor(name + "norm3.bias", {sizes.dim}, norm3_bias);
  cross_attn.list_cross(table, name + "cross_attn", /*with_norms=*/true, compute);
  ffn.list(table, name + "ffn", sizes.dim, sizes.ffn_dim, sizes.dim, compute);
}

void DitLayer::set_prompt(Context& ctx, View embedded, Prompt& prompt) const {
  const Workspace::Scope scope(ctx.workspace());
  const Heads heads = cross_attn.keys_and_values(ctx, embedded);
  prompt.set(ctx, KvPages(ctx, heads.k, heads.v));
}

void DitLayer::run(Context& ctx, const LayerPass& pass, LayerState& state, View x) const {
  const Workspace::Scope scope(ctx.workspace());
  const View h = ctx.workspace().take(self_attn.compute_dtype(), x.shape());
  // What is added to the stream stays f32: rounding it to bf16 would add a tenth to the error.
  const View y = ctx.workspace().take(DType::kF32, x.shape());
  AttentionObserver on_self, on_cross;
  if (pass.observer != nullptr) {
    on_self = [&](const auto& read) { pass.observer->on_self_attention(pass.index, read); };
    on_cross = [&](const auto& read) { pass.observer->on_cross_attention(pass.index, read); };
  }

  const FrameVectors shift1{pass.modulation, 0}, scale1{pass.modulation, 1};
  const FrameVectors gate1{pass.modulation, 2}, shift2{pass.modulation, 3};
  const FrameVectors scale2{pass.modulation, 4}, gate2{pass.modulation, 5};
  const View affine[] = {norm3_weight, norm3_bias};
  const FrameVectors scale3{{&affine[0], 1}, 0}, shift3{{&affine[1], 1}, 0};
  const float eps = self_attn.eps;

  frame_layer_norm(ctx, x, scale1, shift1, eps, /*scale_plus_one=*/true, h);
  self_attention(ctx, self_attn, h, pass.rope, state.memory, pass.buckets, pass.sparse, pass.commit,
                 pass.unread_tokens, y, on_self);
  add_layer_norm(ctx, x, y, gate1, pass.residual, scale3, shift3, eps, /*scale_plus_one=*/false, h);
  cross_attention(ctx, cross_attn, h, state.prompt, pass.prompt, y, on_cross);
  if (pass.before_ffn != nullptr) {
    add_frames(ctx, x, y, /*gate=*/{}, pass.residual);
    pass.before_ffn->run(ctx, x);
    frame_layer_norm(ctx, x, scale2, shift2, eps, /*scale_plus_one=*/true, h);
  } else {
    add_layer_norm(ctx, x, y, /*gate=*/{}, pass.residual, scale2, shift2, eps,
                   /*scale_plus_one=*/true, h);
  }
  ffn.forward(ctx, h, y);
  add_frames(ctx, x, y, gate2, pass.residual);
  if (pass.observer != nullptr) pass.observer->on_layer(pass.index, x);
}

void DitLayer::commit(Context& ctx, const LayerPass& pass, LayerState& state, View x) const {
  const Workspace::Scope scope(ctx.workspace());
  const View h = ctx.workspace().take(self_attn.compute_dtype(), x.shape());
  frame_layer_norm(ctx, x, {pass.modulation, 1}, {pass.modulation, 0}, self_attn.eps,
                   /*scale_plus_one=*/true, h);
  commit_keys(ctx, self_attn, h, pass.rope, state.memory, pass.buckets, *pass.commit,
              pass.unread_tokens);
}

}  // namespace longtake
