// Where a channel of a slot lies in a page that CUDA caches write, and its type. Private to
// kernels.
#pragma once

#include <cuda_bf16.h>

#include "kv/device_layout.h"
#include "kv/device_pages.cuh"

namespace longtake::cuda {

// A page seen as rows of 16-byte chunks.
template <typename T>
struct Page {
  static constexpr int kPerChunk = 16 / sizeof(T);

  unsigned char* data;
  int head_dim;

  __device__ static Page of(const PageLayout& layout, int page) {
    const size_t bytes = 2 * size_t{sizeof(T)} * kPageKeys * layout.head_dim + kPageKeys * 4;
    return {layout.store + page * bytes, layout.head_dim};
  }

  __device__ int offset(int row, int chunk) const {
    if constexpr (sizeof(T) == 2) return chunk_offset(row, chunk);
    return (row * (head_dim / kPerChunk) + chunk) * 16;
  }

  __device__ int matrix() const { return kPageKeys * head_dim * static_cast<int>(sizeof(T)); }

  __device__ uint4& key_chunk(int row, int chunk) const {
    return *reinterpret_cast<uint4*>(data + offset(row, chunk));
  }

  __device__ uint4& value_chunk(int row, int chunk) const {
    return *reinterpret_cast<uint4*>(data + matrix() + offset(row, chunk));
  }

  __device__ float* weights() const { return reinterpret_cast<float*>(data + 2 * matrix()); }
};

// The numbers of a chunk in f32 and back, rounded.
template <typename T>
__device__ inline void unpack(const uint4& chunk, float* out) {
  if constexpr (sizeof(T) == 4) {
    *reinterpret_cast<uint4*>(out) = chunk;
  } else {
    const auto* pairs = reinterpret_cast<const __nv_bfloat162*>(&chunk);
    for (int i = 0; i < 4; ++i) {
      const float2 pair = __bfloat1622float2(pairs[i]);
      out[2 * i] = pair.x;
      out[2 * i + 1] = pair.y;
    }
  }
}

template <typename T>
__device__ inline uint4 pack(const float* in) {
  if constexpr (sizeof(T) == 4) {
    return *reinterpret_cast<const uint4*>(in);
  } else {
    uint4 chunk;
    auto* pairs = reinterpret_cast<__nv_bfloat162*>(&chunk);
    for (int i = 0; i < 4; ++i) pairs[i] = __floats2bfloat162_rn(in[2 * i], in[2 * i + 1]);
    return chunk;
  }
}

}  // namespace longtake::cuda
