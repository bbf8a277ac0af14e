// What a transformer layer has behind its self attention, up to the heads of the layer behind it:
// on the GPU one launch where rows are few and sizes suit.
#pragma once

#include <array>

#include "device/context.h"
#include "kv/page.h"
#include "ops/heads.h"
#include "ops/linear.h"
#include "ops/residual.h"
#include "ops/stream_linear.h"
#include "tensor/tensor.h"

namespace longtake {

namespace cuda {
struct PageLayout;
}

struct LayerTail {
  // x += (mixed W^T + b) * gate; null: x has it already
  const LinearWeight* self_o = nullptr;
  FrameVectors self_gate;

  // x += attend(heads of norm(x) W^T + b, prompt) W^T + b, the heads normed by q_norm [N D] f32;
  // q null: neither this nor what follows, only the heads of the layer behind
  StreamNorm cross_norm;
  const LinearWeight* q = nullptr;
  View q_norm;  // empty: they are not
  KvView prompt;
  float scale = 0;
  const LinearWeight* cross_o = nullptr;

  // x += (act(norm(x) W^T + b) W^T + b) * gate
  StreamNorm ffn_norm;
  const LinearWeight* up = nullptr;
  Activation activation = Activation::kNone;
  const LinearWeight* down = nullptr;
  FrameVectors ffn_gate;

  // Queries, keys and values of the layer behind, as norm_linear_heads makes them; null: there is
  // none.
  const LinearWeight* next_qkv = nullptr;
  StreamNorm next_norm;
  std::array<HeadPart, kMaxHeadParts> next;
  View cos, sin;
  // On CUDA: pages that keys and values go into as well (KvCache::work_pages); null: none.
  const cuda::PageLayout* next_pages = nullptr;

  float eps = 0;  // of the heads' norms
};

// mixed [L, dim] in the weights' compute dtype: what self attention read; x [L, dim] f32, in place,
// is not rounded. On CUDA the prompt was written before the pass began, as for norm_linear_attend.
// True: next_pages were written.
bool layer_tail(Context& ctx, View mixed, View x, const LayerTail& tail);

// Its first part by itself, for a pass that chooses what it reads of the prompt: what self_o adds
// to x, and the queries of cross attention, q [L, N, D] in the compute dtype. layer_tail without
// self_o is the rest.
void layer_queries(Context& ctx, View mixed, View x, const LayerTail& tail, View q);

// Both by the ops that they are composed of, checked already: all there is on the CPU, and what a
// GPU does for sizes that its kernel does not know.
bool layer_tail_by_ops(Context& ctx, View mixed, View x, const LayerTail& tail);
void layer_queries_by_ops(Context& ctx, View mixed, View x, const LayerTail& tail, View q);

namespace cpu {
extern decltype(longtake::layer_tail) layer_tail;
extern decltype(longtake::layer_queries) layer_queries;
}  // namespace cpu

namespace cuda {
extern decltype(longtake::layer_tail) layer_tail;
extern decltype(longtake::layer_queries) layer_queries;
}  // namespace cuda

}  // namespace longtake
