// Attention layers with weights: projections, norms of q and k, RoPE, and where the keys come from.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>

#include "attention/attend.h"
#include "attention/prompt_buckets.h"
#include "attention/prompt_select.h"
#include "attention/select.h"
#include "device/context.h"
#include "kv/cache.h"
#include "nn/stream.h"
#include "nn/weight_table.h"
#include "ops/heads.h"
#include "ops/linear.h"
#include "tensor/tensor.h"

namespace longtake {

// Rotation of every token: cos, sin [L, D / 2] f32, shared by heads and layers.
struct RopeTable {
  Tensor cos;
  Tensor sin;
};

// Queries, keys and values of some tokens, [L, N, D] each.
struct Heads {
  View q, k, v;
};

struct Attention {
  int64_t num_heads = 0;
  int64_t head_dim = 0;
  float eps = 0;
  std::optional<LinearWeight> qkv;    // of self attention: one product makes all three
  std::optional<LinearWeight> q, kv;  // of cross attention: keys and values are the prompt's
  std::optional<LinearWeight> o;
  Tensor norm_q, norm_k;  // [dim] f32; empty: q and k are not normalised

  // List the tensors of `name`.{q,k,v,o} and, if wanted, `name`.norm_{q,k}.
  void list_self(WeightTable& table, const std::string& name, bool with_norms, DType compute);
  void list_cross(WeightTable& table, const std::string& name, bool with_norms, DType compute);

  int64_t dim() const { return num_heads * head_dim; }

  DType compute_dtype() const { return o->compute_dtype(); }

  float scale() const;  // of the logits: 1 / sqrt(head_dim)

  // Room for the heads of `length` tokens, of the compute dtype, in the workspace: valid until the
  // caller's Workspace::Scope ends. q is empty if it is not wanted.
  Heads take(Context& ctx, int64_t length, bool with_queries = true) const;
  // What becomes of qkv's columns: self attention's heads, rotated; those that are empty are not
  // made.
  std::array<HeadPart, kMaxHeadParts> parts_of(const Heads& heads) const;
  // h [L, dim] -> self attention's heads.
  void project(Context& ctx, const LayerInput& h, const RopeTable& rope, const Heads& heads) const;
  // Cross attention's, of the tokens and of the prompt [T, dim] in the compute dtype; not rotated.
  View queries(Context& ctx, const LayerInput& h) const;
  Heads keys_and_values(Context& ctx, View prompt) const;

 private:
  void list_rest(WeightTable& table, const std::string& name, bool with_norms, DType compute);
  View take_heads(Context& ctx, int64_t length) const;
};

// What one attention read and made, for metrics and tests; valid during the call.
struct AttentionRead {
  View q;                      // [L, N, D], rotated
  KvView kv;                   // all that could be read
  const Selection* selection;  // what was read of it; null: everything
  View mixed;                  // [L, N, D]: the values' weighted means
};

using AttentionObserver = std::function<void(const AttentionRead&)>;

// What one layer remembers of a rollout.
struct Memory {
  std::unique_ptr<KvCache> cache;
  std::unique_ptr<PageSelector> selector;  // AnnSA; null: every pass reads everything
  // Pages of the first frames and of the newest one, which a selector always reads; 0: as many as
  // the pass itself has.
  int64_t first_pages = 0, newest_pages = 0;
  double commit_ms = 0;  // spent on what joined the history, so far
  double select_ms = 0;  // and on choosing what to read of it
};

// Heads of a chunk; is_written: keys and values are in the pages of the cache (work_pages) as well.
struct ChunkHeads : Heads {
  bool is_written = false;
};

// out = attend(q, history + own chunk), which the layer's o has yet to project: heads of the chunk,
// out [L, dim] in the compute dtype. The chunk's keys and values become the cache's current ones,
// except those of the first `unread_tokens`; with `commit` they join its history afterwards.
// `sparse`: only what the selector chooses is read, if there is one; the first frame, the newest
// one and the chunk itself always are. buckets: what the chunk's tokens are assigned to, [L] or
// empty.
void self_attention(Context& ctx, const Attention& layer, const ChunkHeads& heads, Memory& memory,
                    std::span<const Bucket> buckets, bool sparse,
                    std::optional<ChunkPosition> commit, int64_t unread_tokens, View out,
                    const AttentionObserver& observer = nullptr);

// Only the keys and values of a clean chunk join the history, except those of the first
// `unread_tokens`: all that a last layer must do. Without queries, unless the cache wants them.
void commit_keys(Context& ctx, const Heads& heads, Memory& memory, std::span<const Bucket> buckets,
                 ChunkPosition position, int64_t unread_tokens);

// How a pass reads a prompt that has a selector.
enum class PromptReading : uint8_t {
  kAll,
  kChoose,  // choose by this pass's queries, then read what is chosen
  kChosen   // read what an earlier pass over the frame chose
};

// What one layer knows of the prompt.
struct Prompt {
  KvPages pages;
  std::unique_ptr<PromptSelector> selector;  // AnnCA; null: every pass reads everything
  std::unique_ptr<PromptBuckets> buckets;    // assigns every pass's tokens; null: nobody asks

  // A new prompt.
  void set(Context& ctx, KvPages prompt);

  // Of the latest pass's tokens; empty without `buckets`.
  std::span<const Bucket> latest_buckets() const;

  // Whether a pass that reads so chooses, by its queries, what it reads.
  bool chooses(PromptReading reading) const {
    return selector != nullptr && reading == PromptReading::kChoose;
  }
};

// The pages that a pass reads so, if it need not choose them.
std::optional<KvView> prompt_to_read(const Prompt& prompt, PromptReading reading);

// out = attend(q, prompt), without RoPE on the queries, for o as above.
void cross_attention(Context& ctx, const Attention& layer, const LayerInput& h, Prompt& prompt,
                     PromptReading reading, View out, const AttentionObserver& observer = nullptr);

// out = o(attend(q, all tokens)), with RoPE: a text encoder's, which runs on the CPU. h [L, dim] in
// the compute dtype.
void full_attention(Context& ctx, const Attention& layer, View h, const RopeTable& rope, View out);

}  // namespace longtake
