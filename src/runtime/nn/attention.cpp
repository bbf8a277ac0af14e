#include "nn/attention.h"

#include <chrono>
#include <cmath>
#include <utility>

#include "attention/norm_linear_attend.h"

namespace longtake {
namespace {

double ms_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start)
      .count();
}

// out [L, dim] = attend(q, what is selected of kv).
void read(Context& ctx, const Attention& layer, View q, const KvView& kv,
          const Selection* selection, View out, const AttentionObserver& observer) {
  const View mixed = out.reshape(q.shape());
  if (selection != nullptr)
    attend_blocks(ctx, q, kv, *selection, layer.scale(), mixed);
  else
    attend(ctx, q, kv, layer.scale(), mixed);
  if (observer) observer({q, kv, selection, mixed});
}

// The clean chunk's keys and values join the history; q is looked at if the cache wants it.
void join_history(Context& ctx, View q, View k, View v, ChunkPosition position, Memory& memory) {
  const auto start = std::chrono::steady_clock::now();
  memory.cache->commit_chunk(ctx, q, k, v, position);
  memory.commit_ms += ms_since(start);
}

// Of the tokens whose keys are read.
void set_buckets(Memory& memory, std::span<const Bucket> buckets, int64_t unread_tokens) {
  memory.cache->set_buckets(buckets.empty() ? buckets
                                            : buckets.subspan(static_cast<size_t>(unread_tokens)));
}

}  // namespace

void Attention::list_self(WeightTable& table, const std::string& name, bool with_norms,
                          DType compute) {
  table.stacked_linear({name + ".q", name + ".k", name + ".v"}, dim(), dim(), compute, qkv);
  list_rest(table, name, with_norms, compute);
}

void Attention::list_cross(WeightTable& table, const std::string& name, bool with_norms,
                           DType compute) {
  table.linear(name + ".q", dim(), dim(), compute, q);
  table.stacked_linear({name + ".k", name + ".v"}, dim(), dim(), compute, kv);
  list_rest(table, name, with_norms, compute);
}

void Attention::list_rest(WeightTable& table, const std::string& name, bool with_norms,
                          DType compute) {
  table.linear(name + ".o", dim(), dim(), compute, o);
  if (!with_norms) return;
  table.tensor(name + ".norm_q.weight", {dim()}, norm_q);
  table.tensor(name + ".norm_k.weight", {dim()}, norm_k);
}

float Attention::scale() const {
  return 1.0F / std::sqrt(static_cast<float>(head_dim));
}

View Attention::take_heads(Context& ctx, int64_t length) const {
  return ctx.workspace().take(compute_dtype(), {length, num_heads, head_dim});
}

Heads Attention::take(Context& ctx, int64_t length, bool with_queries) const {
  return {with_queries ? take_heads(ctx, length) : View(), take_heads(ctx, length),
          take_heads(ctx, length)};
}

std::array<HeadPart, kMaxHeadParts> Attention::parts_of(const Heads& heads) const {
  return {{{norm_q, true, heads.q}, {norm_k, true, heads.k}, {View(), false, heads.v}}};
}

void Attention::project(Context& ctx, const LayerInput& h, const RopeTable& rope,
                        const Heads& heads) const {
  project_to_heads(ctx, h, *qkv, parts_of(heads), rope.cos, rope.sin, eps);
}

View Attention::queries(Context& ctx, const LayerInput& h) const {
  const View out = take_heads(ctx, h.length());
  const HeadPart part{norm_q, false, out};
  project_to_heads(ctx, h, *q, {&part, 1}, View(), View(), eps);
  return out;
}

Heads Attention::keys_and_values(Context& ctx, View prompt) const {
  const int64_t length = prompt.dim(0);
  const Heads heads{View(), take_heads(ctx, length), take_heads(ctx, length)};
  const HeadPart parts[] = {{norm_k, false, heads.k}, {View(), false, heads.v}};
  project_to_heads(ctx, {prompt, View(), {}}, *kv, parts, View(), View(), eps);
  return heads;
}

void self_attention(Context& ctx, const Attention& layer, const ChunkHeads& heads, Memory& memory,
                    std::span<const Bucket> buckets, bool sparse,
                    std::optional<ChunkPosition> commit, int64_t unread_tokens, View out,
                    const AttentionObserver& observer) {
  const View q = heads.q;
  const int64_t length = q.dim(0);
  const View k = heads.k.rows(unread_tokens, length);
  const View v = heads.v.rows(unread_tokens, length);
  set_buckets(memory, buckets, unread_tokens);
  const View asked = q.rows(unread_tokens, length);
  if (heads.is_written && unread_tokens == 0)
    memory.cache->read_written(ctx, commit ? View() : asked, length);
  else if (commit)
    memory.cache->set_current(ctx, k, v);
  else
    memory.cache->read_chunk(ctx, asked, k, v);
  const KvView kv = memory.cache->view();
  std::optional<Selection> selection;
  if (sparse && memory.selector != nullptr) {
    const auto start = std::chrono::steady_clock::now();
    const int64_t own = (k.dim(0) + kPageTokens - 1) / kPageTokens;
    const int64_t first = memory.first_pages > 0 ? memory.first_pages : own;
    const int64_t newest = memory.newest_pages > 0 ? memory.newest_pages : own;
    selection = memory.selector->select(ctx, q, kv, first, newest + own, layer.scale(), buckets);
    memory.select_ms += ms_since(start);
  }
  read(ctx, layer, q, kv, selection ? &*selection : nullptr, out, observer);
  if (commit) join_history(ctx, asked, k, v, *commit, memory);
}

void commit_keys(Context& ctx, const Heads& heads, Memory& memory, std::span<const Bucket> buckets,
                 ChunkPosition position, int64_t unread_tokens) {
  set_buckets(memory, buckets, unread_tokens);
  const auto of_read = [&](View tokens) { return tokens.rows(unread_tokens, tokens.dim(0)); };
  join_history(ctx, heads.q.empty() ? View() : of_read(heads.q), of_read(heads.k), of_read(heads.v),
               position, memory);
}

void Prompt::set(Context& ctx, KvPages prompt) {
  pages = std::move(prompt);
  if (selector != nullptr) selector->set_prompt(ctx, pages.view());
  if (buckets != nullptr) buckets->set_prompt(pages.view());
}

std::span<const Bucket> Prompt::latest_buckets() const {
  return buckets != nullptr ? buckets->buckets() : std::span<const Bucket>();
}

std::optional<KvView> prompt_to_read(const Prompt& prompt, PromptReading reading) {
  if (prompt.chooses(reading)) return std::nullopt;
  if (prompt.selector == nullptr || reading == PromptReading::kAll) return prompt.pages.view();
  return prompt.selector->kept();
}

void cross_attention(Context& ctx, const Attention& layer, const LayerInput& h, Prompt& prompt,
                     PromptReading reading, View out, const AttentionObserver& observer) {
  const bool chosen = prompt.selector != nullptr && reading != PromptReading::kAll;
  const std::optional<KvView> known = prompt_to_read(prompt, reading);
  if (h.rows.empty() && known && prompt.buckets == nullptr && !observer)
    return norm_linear_attend(ctx, h.stream, h.norm, *layer.q, layer.norm_q, layer.eps, *known,
                              layer.scale(),
                              out.reshape({h.length(), layer.num_heads, layer.head_dim}));
  const Workspace::Scope scope(ctx.workspace());
  const View q = layer.queries(ctx, h);
  if (prompt.buckets != nullptr) prompt.buckets->assign(ctx, q, layer.scale());
  if (chosen && reading == PromptReading::kChoose) prompt.selector->choose(ctx, q, layer.scale());
  const KvView kv = chosen ? prompt.selector->kept() : prompt.pages.view();
  read(ctx, layer, q, kv, nullptr, out, observer);
}

void full_attention(Context& ctx, const Attention& layer, View h, const RopeTable& rope, View out) {
  LONGTAKE_CHECK(ctx.device().kind == DeviceKind::kCpu, "text encoders run on the CPU");
  const Workspace::Scope scope(ctx.workspace());
  const Heads heads = layer.take(ctx, h.dim(0));
  layer.project(ctx, {h, View(), {}}, rope, heads);
  const KvPages pages(ctx, heads.k, heads.v);
  const View mixed = ctx.workspace().take(layer.compute_dtype(), h.shape());
  read(ctx, layer, heads.q, pages.view(), nullptr, mixed, nullptr);
  linear(ctx, mixed, *layer.o, Activation::kNone, out);
}

}  // namespace longtake
