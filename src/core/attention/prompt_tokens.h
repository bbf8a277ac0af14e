// AnnCA on NVIDIA GPUs: which prompt tokens a frame attends to, chosen and packed together on the
// device. CUDA builds only; the CPU's twin, with the rules, is prompt_select.h. As for AnnSA
// (page_lists.h) products are exact here, of bf16, whatever the engine; ties go to the token that
// comes first.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "device/cuda_check.h"
#include "kv/device_pages.h"

namespace longtake::cuda {

class PromptTokens {
 public:
  // Keeps `num_kept` tokens of each head of a prompt, whose pages must stay where they are:
  // head_dim 64 or 128, in bf16 or f32, at most 2048 tokens.
  PromptTokens(const DevicePages& prompt, int num_kept, cudaStream_t stream);

  // Chooses by the queries q [num_queries, num_heads, D] in the prompt's dtype: by the mass of all
  // or by the best match of one. One launch, which may be captured after a first call.
  void choose(const void* q, int64_t num_queries, bool by_mass, float scale, cudaStream_t stream);

  // What is kept; after the first choice.
  const DevicePages& kept() const { return kept_; }

  // [num_heads, num_tokens]: the entry of kept() that a token is, -1: dropped.
  const DeviceArray<int32_t>& members() const { return members_; }

 private:
  DevicePages prompt_, kept_;
  int num_kept_;
  DeviceArray<uint16_t> keys_;  // bf16 [num_heads, num_tokens, D]
  DeviceArray<unsigned char> store_;
  DeviceArray<int32_t> table_, members_;
  DeviceArray<uint32_t> arrived_;  // by head: blocks that are done
  DeviceArray<float> worth_;       // [num_heads, tiles, num_tokens]
  int tiles_ = 0;                  // that worth_ has room for
};

}  // namespace longtake::cuda
