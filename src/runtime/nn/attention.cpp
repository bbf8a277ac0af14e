#include "nn/attention.h"

#include <chrono>
#include <cmath>
#include <utility>

#include "ops/norm.h"
#include "ops/rope.h"

namespace longtake {
namespace {

// Projection, then norm and rotation where wanted: summed, normalised and rotated in f32, rounded
// to the compute dtype once.
View project(Context& ctx, const Attention& layer, const LinearWeight& weight, View h, View norm,
             const RopeTable* rope) {
  const Shape flat{h.dim(0), layer.dim()};
  const Shape heads{h.dim(0), layer.num_heads, layer.head_dim};
  const View out = ctx.workspace().take(weight.compute_dtype(), heads);
  if (norm.empty() && rope == nullptr) {
    linear(ctx, h, weight, Activation::kNone, out.reshape(flat));
    return out;
  }
  const Workspace::Scope scope(ctx.workspace());
  const View wide = ctx.workspace().take(DType::kF32, flat);
  linear(ctx, h, weight, Activation::kNone, wide);
  if (!norm.empty()) rms_norm(ctx, wide, norm, layer.eps, rope ? wide : out.reshape(flat));
  if (rope != nullptr) longtake::rope(ctx, wide.reshape(heads), rope->cos, rope->sin, out);
  return out;
}

double ms_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start)
      .count();
}

// out = o(attend(q, what is selected of kv)).
void attend_and_project(Context& ctx, const Attention& layer, View q, const KvView& kv,
                        const Selection* selection, View out, const AttentionObserver& observer) {
  const View mixed = ctx.workspace().take(layer.o->compute_dtype(), q.shape());
  if (selection != nullptr)
    attend_blocks(ctx, q, kv, *selection, layer.scale(), mixed);
  else
    attend(ctx, q, kv, layer.scale(), mixed);
  if (observer) observer({q, kv, selection, mixed});
  linear(ctx, mixed.reshape({q.dim(0), layer.dim()}), *layer.o, Activation::kNone, out);
}

// The clean chunk's keys and values join the history; q is looked at if the cache wants it.
void join_history(Context& ctx, View q, View k, View v, ChunkPosition position, Memory& memory) {
  const auto start = std::chrono::steady_clock::now();
  if (memory.cache->wants_queries()) memory.cache->observe_queries(ctx, q, position);
  memory.cache->commit(ctx, k, v, position);
  memory.commit_ms += ms_since(start);
}

// Of the tokens whose keys are read.
void set_buckets(Memory& memory, std::span<const Bucket> buckets, int64_t unread_tokens) {
  memory.cache->set_buckets(buckets.empty() ? buckets
                                            : buckets.subspan(static_cast<size_t>(unread_tokens)));
}

}  // namespace

void Attention::list(WeightTable& table, const std::string& name, bool with_norms, DType compute) {
  table.linear(name + ".q", dim(), dim(), compute, q);
  table.linear(name + ".k", dim(), dim(), compute, k);
  table.linear(name + ".v", dim(), dim(), compute, v);
  table.linear(name + ".o", dim(), dim(), compute, o);
  if (!with_norms) return;
  table.tensor(name + ".norm_q.weight", {dim()}, norm_q);
  table.tensor(name + ".norm_k.weight", {dim()}, norm_k);
}

float Attention::scale() const {
  return 1.0F / std::sqrt(static_cast<float>(head_dim));
}

View Attention::queries(Context& ctx, View h, const RopeTable* rope) const {
  return project(ctx, *this, *q, h, norm_q, rope);
}

View Attention::keys(Context& ctx, View h, const RopeTable* rope) const {
  return project(ctx, *this, *k, h, norm_k, rope);
}

View Attention::values(Context& ctx, View h) const {
  return project(ctx, *this, *v, h, View(), nullptr);
}

void self_attention(Context& ctx, const Attention& layer, View h, const RopeTable& rope,
                    Memory& memory, std::span<const Bucket> buckets, bool sparse,
                    std::optional<ChunkPosition> commit, int64_t unread_tokens, View out,
                    const AttentionObserver& observer) {
  const Workspace::Scope scope(ctx.workspace());
  const View q = layer.queries(ctx, h, &rope);
  const View k = layer.keys(ctx, h, &rope).rows(unread_tokens, h.dim(0));
  const View v = layer.values(ctx, h).rows(unread_tokens, h.dim(0));
  set_buckets(memory, buckets, unread_tokens);
  memory.cache->set_current(ctx, k, v);
  const KvView kv = memory.cache->view();
  std::optional<Selection> selection;
  if (sparse && memory.selector != nullptr) {
    const auto start = std::chrono::steady_clock::now();
    const int64_t frame_pages = (q.dim(0) + kPageTokens - 1) / kPageTokens;
    selection =
        memory.selector->select(ctx, q, kv, frame_pages, 2 * frame_pages, layer.scale(), buckets);
    memory.select_ms += ms_since(start);
  }
  attend_and_project(ctx, layer, q, kv, selection ? &*selection : nullptr, out, observer);
  const View asked = q.rows(unread_tokens, h.dim(0));
  if (commit)
    join_history(ctx, asked, k, v, *commit, memory);
  else
    memory.cache->observe_reads(ctx, asked);
}

void commit_keys(Context& ctx, const Attention& layer, View h, const RopeTable& rope,
                 Memory& memory, std::span<const Bucket> buckets, ChunkPosition position,
                 int64_t unread_tokens) {
  const Workspace::Scope scope(ctx.workspace());
  set_buckets(memory, buckets, unread_tokens);
  const auto read = [&](View tokens) { return tokens.rows(unread_tokens, h.dim(0)); };
  const View q = memory.cache->wants_queries() ? read(layer.queries(ctx, h, &rope)) : View();
  const View k = read(layer.keys(ctx, h, &rope));
  const View v = read(layer.values(ctx, h));
  join_history(ctx, q, k, v, position, memory);
}

void Prompt::set(Context& ctx, KvPages prompt) {
  pages = std::move(prompt);
  if (selector != nullptr) selector->set_prompt(ctx, pages.view());
  if (buckets != nullptr) buckets->set_prompt(pages.view());
}

std::span<const Bucket> Prompt::latest_buckets() const {
  return buckets != nullptr ? buckets->buckets() : std::span<const Bucket>();
}

void cross_attention(Context& ctx, const Attention& layer, View h, Prompt& prompt,
                     PromptReading reading, View out, const AttentionObserver& observer) {
  const Workspace::Scope scope(ctx.workspace());
  const View q = layer.queries(ctx, h, nullptr);
  if (prompt.buckets != nullptr) prompt.buckets->assign(ctx, q, layer.scale());
  const bool chosen = prompt.selector != nullptr && reading != PromptReading::kAll;
  if (chosen && reading == PromptReading::kChoose) prompt.selector->choose(ctx, q, layer.scale());
  const KvView kv = chosen ? prompt.selector->kept() : prompt.pages.view();
  attend_and_project(ctx, layer, q, kv, nullptr, out, observer);
}

void full_attention(Context& ctx, const Attention& layer, View h, const RopeTable& rope, View out) {
  LONGTAKE_CHECK(ctx.device().kind == DeviceKind::kCpu, "text encoders run on the CPU");
  const Workspace::Scope scope(ctx.workspace());
  const View q = layer.queries(ctx, h, &rope);
  const KvPages pages(ctx, layer.keys(ctx, h, &rope), layer.values(ctx, h));
  attend_and_project(ctx, layer, q, pages.view(), nullptr, out, nullptr);
}

}  // namespace longtake
