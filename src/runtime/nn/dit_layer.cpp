#include "nn/dit_layer.h"

#include "ops/elementwise.h"

namespace longtake {

View row(View matrix, int64_t index) {
  return matrix.rows(index, index + 1).reshape({matrix.dim(-1)});
}

void set_prompts(Context& ctx, View text, const FeedForward& embedding, DType compute,
                 std::span<const DitLayer> layers, std::span<LayerState> states,
                 int64_t last_count) {
  const Workspace::Scope scope(ctx.workspace());
  const Shape shape{text.dim(0), embedding.down->out_features()};
  const View wide = ctx.workspace().take(DType::kF32, shape);
  const View embedded = ctx.workspace().take(compute, shape);
  embedding.forward(ctx, text, wide);
  convert(ctx, wide, embedded);
  for (size_t n = 0; n < layers.size(); ++n)
    layers[n].set_prompt(ctx, embedded, states[n].prompt, last_count);
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

void DitLayer::set_prompt(Context& ctx, View embedded, Prompt& prompt, int64_t last_count) const {
  const Workspace::Scope scope(ctx.workspace());
  const Heads heads = cross_attn.keys_and_values(ctx, embedded);
  prompt.set(ctx, KvPages(ctx, heads.k, heads.v, last_count));
}

void DitLayer::run(Context& ctx, const LayerPass& pass, LayerState& state, View x) const {
  const Workspace::Scope scope(ctx.workspace());
  Stream stream(ctx, x, self_attn.compute_dtype(), pass.residual);
  run(ctx, pass, state, stream);
  stream.complete();
}

void DitLayer::run(Context& ctx, const LayerPass& pass, LayerState& state, Stream& stream) const {
  const Workspace::Scope scope(ctx.workspace());
  const DType compute = self_attn.compute_dtype();
  const View x = stream.x();
  AttentionObserver on_self, on_cross;
  if (pass.observer != nullptr) {
    on_self = [&](const auto& read) { pass.observer->on_self_attention(pass.index, read); };
    on_cross = [&](const auto& read) { pass.observer->on_cross_attention(pass.index, read); };
  }
  const View affine[] = {norm3_weight, norm3_bias};
  const StreamNorm norm3{{{&affine[0], 1}, 0}, {{&affine[1], 1}, 0}, self_attn.eps, false};
  const FrameVectors gate1{pass.modulation, 2}, gate2{pass.modulation, 5};
  {
    const Workspace::Scope attention(ctx.workspace());
    const View mixed = ctx.workspace().take(compute, x.shape());
    self_attention(ctx, self_attn, stream.normed(modulated(pass, 0)), pass.rope, state.memory,
                   pass.buckets, pass.sparse, pass.commit, pass.unread_tokens, mixed, on_self);
    stream.add(mixed, *self_attn.o, gate1);
    cross_attention(ctx, cross_attn, stream.normed(norm3), state.prompt, pass.prompt, mixed,
                    on_cross);
    stream.add(mixed, *cross_attn.o, /*gate=*/{});
  }
  if (pass.before_ffn != nullptr) {
    stream.complete();
    pass.before_ffn->run(ctx, x);
  }
  const View hidden = ctx.workspace().take(compute, {x.dim(0), ffn.up->out_features()});
  project(ctx, stream.normed(modulated(pass, 3)), *ffn.up, ffn.activation, hidden);
  stream.add(hidden, *ffn.down, gate2);
  if (pass.observer == nullptr) return;
  stream.complete();
  pass.observer->on_layer(pass.index, x);
}

void DitLayer::commit(Context& ctx, const LayerPass& pass, LayerState& state, View x) const {
  const Workspace::Scope scope(ctx.workspace());
  Stream stream(ctx, x, self_attn.compute_dtype(), pass.residual);
  commit_keys(ctx, self_attn, stream.normed(modulated(pass, 0)), pass.rope, state.memory,
              pass.buckets, *pass.commit, pass.unread_tokens);
}

StreamNorm DitLayer::modulated(const LayerPass& pass, int64_t shift) const {
  return {{pass.modulation, shift + 1}, {pass.modulation, shift}, self_attn.eps, true};
}

}  // namespace longtake
