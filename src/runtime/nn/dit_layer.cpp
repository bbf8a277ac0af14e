#include "nn/dit_layer.h"

#include "ops/elementwise.h"

namespace longtake {
namespace {

// affine: scale and shift.
StreamNorm affine_norm(const View (&affine)[2], float eps) {
  return {{{&affine[0], 1}, 0}, {{&affine[1], 1}, 0}, eps, false};
}

}  // namespace

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

void DitLayer::make_heads(Context& ctx, const LayerPass& pass, View x, KvCache& cache,
                          ChunkHeads& heads) const {
  if (x.dim(0) <= kFewRows && self_attn.compute_dtype() == DType::kBF16) {
    LayerTail only_next;
    only_next.eps = self_attn.eps;
    describe_next(pass, {*this, pass.modulation, cache, heads}, x, only_next);
    heads.is_written = layer_tail(ctx, View(), x, only_next);
    return;
  }
  const Workspace::Scope scope(ctx.workspace());
  Stream stream(ctx, x, self_attn.compute_dtype(), pass.residual);
  self_attn.project(ctx, stream.normed(modulated(pass.modulation, 0)), pass.rope, heads);
  heads.is_written = false;
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
  const auto make_next = [&] {
    if (pass.next == nullptr) return;
    const NextHeads& next = *pass.next;
    next.layer.self_attn.project(ctx, stream.normed(next.layer.modulated(next.modulation, 0)),
                                 pass.rope, next.heads);
    next.heads.is_written = false;
  };
  AttentionObserver on_self, on_cross;
  if (pass.observer != nullptr) {
    on_self = [&](const auto& read) { pass.observer->on_self_attention(pass.index, read); };
    on_cross = [&](const auto& read) { pass.observer->on_cross_attention(pass.index, read); };
  }
  const FrameVectors gate1{pass.modulation, 2}, gate2{pass.modulation, 5};
  {
    const Workspace::Scope attention(ctx.workspace());
    const View mixed = ctx.workspace().take(compute, x.shape());
    {
      const Workspace::Scope reading(ctx.workspace());
      ChunkHeads heads;
      if (pass.heads != nullptr) {
        heads = *pass.heads;
      } else {
        heads = {self_attn.take(ctx, x.dim(0))};
        self_attn.project(ctx, stream.normed(modulated(pass.modulation, 0)), pass.rope, heads);
      }
      self_attention(ctx, self_attn, heads, state.memory, pass.buckets, pass.sparse, pass.commit,
                     pass.unread_tokens, mixed, on_self);
    }
    if (run_tail(ctx, pass, state, mixed, x)) return;
    stream.add(mixed, *self_attn.o, gate1);
    const View affine[] = {norm3_weight, norm3_bias};
    const StreamNorm norm3 = affine_norm(affine, self_attn.eps);
    cross_attention(ctx, cross_attn, stream.normed(norm3), state.prompt, pass.prompt, mixed,
                    on_cross);
    stream.add(mixed, *cross_attn.o, /*gate=*/{});
  }
  if (pass.before_ffn != nullptr) {
    stream.complete();
    pass.before_ffn->run(ctx, x);
  }
  const View hidden = ctx.workspace().take(compute, {x.dim(0), ffn.up->out_features()});
  project(ctx, stream.normed(modulated(pass.modulation, 3)), *ffn.up, ffn.activation, hidden);
  stream.add(hidden, *ffn.down, gate2);
  if (pass.observer != nullptr) stream.complete();
  make_next();
  if (pass.observer != nullptr) pass.observer->on_layer(pass.index, x);
}

void DitLayer::commit(Context& ctx, const LayerPass& pass, LayerState& state, View x) const {
  const Workspace::Scope scope(ctx.workspace());
  Heads heads;
  if (pass.heads != nullptr) {
    heads = *pass.heads;
  } else {
    heads = self_attn.take(ctx, x.dim(0), state.memory.cache->wants_queries());
    Stream stream(ctx, x, self_attn.compute_dtype(), pass.residual);
    self_attn.project(ctx, stream.normed(modulated(pass.modulation, 0)), pass.rope, heads);
  }
  commit_keys(ctx, heads, state.memory, pass.buckets, *pass.commit, pass.unread_tokens);
}

bool DitLayer::run_tail(Context& ctx, const LayerPass& pass, const LayerState& state, View mixed,
                        View x) const {
  const Prompt& prompt = state.prompt;
  // In two parts only where a launch makes the queries once more for nothing.
  const bool chooses = prompt.chooses(pass.prompt);
  if (x.dim(0) > kFewRows || mixed.dtype() != DType::kBF16 || pass.residual != DType::kF32 ||
      pass.observer != nullptr || pass.before_ffn != nullptr || prompt.buckets != nullptr ||
      (chooses && ctx.device().kind == DeviceKind::kCpu))
    return false;
  const Workspace::Scope scope(ctx.workspace());
  const View affine[] = {norm3_weight, norm3_bias};
  LayerTail tail;
  tail.self_o = &*self_attn.o;
  tail.self_gate = {pass.modulation, 2};
  tail.cross_norm = affine_norm(affine, self_attn.eps);
  tail.q = &*cross_attn.q;
  tail.q_norm = cross_attn.norm_q;
  tail.prompt = prompt_to_read(prompt, pass.prompt).value_or(prompt.pages.view());
  tail.scale = cross_attn.scale();
  tail.cross_o = &*cross_attn.o;
  tail.ffn_norm = modulated(pass.modulation, 3);
  tail.up = &*ffn.up;
  tail.activation = ffn.activation;
  tail.down = &*ffn.down;
  tail.ffn_gate = {pass.modulation, 5};
  tail.eps = self_attn.eps;
  if (pass.next != nullptr) describe_next(pass, *pass.next, x, tail);
  if (chooses) {
    const View q =
        ctx.workspace().take(mixed.dtype(), {x.dim(0), cross_attn.num_heads, cross_attn.head_dim});
    layer_queries(ctx, mixed, x, tail, q);
    prompt.selector->choose(ctx, q, tail.scale);
    tail.prompt = prompt.selector->kept();
    tail.self_o = nullptr;
  }
  const bool is_written = layer_tail(ctx, mixed, x, tail);
  if (pass.next != nullptr) pass.next->heads.is_written = is_written;
  return true;
}

void DitLayer::describe_next(const LayerPass& pass, const NextHeads& next, View x,
                             LayerTail& tail) {
  tail.next_qkv = &*next.layer.self_attn.qkv;
  tail.next_norm = next.layer.modulated(next.modulation, 0);
  tail.next = next.layer.self_attn.parts_of(next.heads);
  tail.cos = pass.rope.cos;
  tail.sin = pass.rope.sin;
  if (pass.unread_tokens == 0) tail.next_pages = next.cache.work_pages(x.dim(0));
}

StreamNorm DitLayer::modulated(std::span<const View> by, int64_t shift) const {
  return {{by, shift + 1}, {by, shift}, self_attn.eps, true};
}

}  // namespace longtake
