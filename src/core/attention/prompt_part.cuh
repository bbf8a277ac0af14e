// 16 queries of a head of 64 channels against a page of a prompt, by warps that have 16 keys each:
// what the launches that make their own queries share. For .cu files.
#pragma once

#include <cmath>
#include <cstdint>

#include "attention/paged_attention.cuh"
#include "device/mma.cuh"

namespace longtake::cuda {

inline constexpr int kPartQueries = 16, kPartChannels = 64;
inline constexpr int kPartWarps = kPageKeys / 16;
inline constexpr int kPartMatrixBytes = kPageKeys * kPartChannels * 2;
inline constexpr int kPartPageBytes = static_cast<int>(paged_bytes(kPartChannels));
inline constexpr int kPartStride = kPartChannels + 8;  // of queries and outputs, in elements

// What a warp has: numerators of the outputs as mma lays them out, and of its two rows the sum and
// the logit, in powers of two, that it is relative to.
struct PromptPart {
  float out[kPartChannels / 8][4] = {};
  float reference[2] = {-INFINITY, -INFINITY};
  float sum[2] = {};

  // Of warp threadIdx.x / 32, against its keys of the page.
  __device__ void read(const unsigned char* page, const uint32_t (&q)[kPartChannels / 16][4],
                       float scale) {
    const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * 16;
    float logits[2][4] = {};
    uint32_t b[4];
#pragma unroll
    for (int k = 0; k < kPartChannels / 16; ++k) {
      load_matrices(b, page + chunk_offset(first + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
      mma_m16n8k16(logits[0], q[k], b[0], b[1]);
      mma_m16n8k16(logits[1], q[k], b[2], b[3]);
    }
    const auto* weights = reinterpret_cast<const float*>(page + 2 * kPartMatrixBytes) + first;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float most = fmaxf(fmaxf(logits[0][2 * r], logits[0][2 * r + 1]),
                         fmaxf(logits[1][2 * r], logits[1][2 * r + 1])) *
                   scale;
      most = fmaxf(most, __shfl_xor_sync(~0U, most, 1));
      most = fmaxf(most, __shfl_xor_sync(~0U, most, 2));
      most = fmaxf(most, reference[r]);
      const float factor = fast_exp2(reference[r] - most);
      reference[r] = most;
      sum[r] *= factor;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const float2 weight = *reinterpret_cast<const float2*>(weights + 8 * n + 2 * (lane % 4));
        float* pair = logits[n] + 2 * r;
        pair[0] = fast_exp2(fmaf(pair[0], scale, -most));
        pair[1] = fast_exp2(fmaf(pair[1], scale, -most));
        sum[r] = fmaf(pair[0], weight.x, fmaf(pair[1], weight.y, sum[r]));
      }
#pragma unroll
      for (int c = 0; c < kPartChannels / 8; ++c) {
        out[c][2 * r] *= factor;
        out[c][2 * r + 1] *= factor;
      }
    }
    const uint32_t terms[4] = {
        pack_bf16(logits[0][0], logits[0][1]), pack_bf16(logits[0][2], logits[0][3]),
        pack_bf16(logits[1][0], logits[1][1]), pack_bf16(logits[1][2], logits[1][3])};
#pragma unroll
    for (int c = 0; c < kPartChannels / 8; c += 2) {
      load_matrices_transposed(
          b, page + kPartMatrixBytes + chunk_offset(first + lane % 16, c + lane / 16));
      mma_m16n8k16(out[c], terms, b[0], b[1]);
      mma_m16n8k16(out[c + 1], terms, b[2], b[3]);
    }
  }

  // outs [kPartWarps][kPartQueries][kPartStride], sums [kPartWarps][kPartQueries].
  __device__ void write(float* outs, float2* sums) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = warp * kPartQueries + lane / 4 + 8 * r;
      sum[r] += __shfl_xor_sync(~0U, sum[r], 1);
      sum[r] += __shfl_xor_sync(~0U, sum[r], 2);
      if (lane % 4 == 0) sums[row] = {reference[r], sum[r]};
#pragma unroll
      for (int c = 0; c < kPartChannels / 8; ++c)
        *reinterpret_cast<float2*>(outs + row * kPartStride + 8 * c + 2 * (lane % 4)) = {
            out[c][2 * r], out[c][2 * r + 1]};
    }
  }
};

// What the warps come to together, in their order: kCount neighbouring channels of a query.
template <int kCount>
__device__ void combine_prompt_parts(const float* outs, const float2* sums, int query, int channel,
                                     float (&mixed)[kCount]) {
  static_assert(kCount % 2 == 0);
  float reference = -INFINITY, sum = 0;
#pragma unroll
  for (int w = 0; w < kPartWarps; ++w)
    reference = fmaxf(reference, sums[w * kPartQueries + query].x);
#pragma unroll
  for (int i = 0; i < kCount; ++i) mixed[i] = 0;
#pragma unroll
  for (int w = 0; w < kPartWarps; ++w) {
    const float2 own = sums[w * kPartQueries + query];
    const float factor = own.x == -INFINITY ? 0 : fast_exp2(own.x - reference);
    sum = fmaf(factor, own.y, sum);
    const float* from = outs + (w * kPartQueries + query) * kPartStride + channel;
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      const float2 more = *reinterpret_cast<const float2*>(from + i);
      mixed[i] = fmaf(factor, more.x, mixed[i]);
      mixed[i + 1] = fmaf(factor, more.y, mixed[i + 1]);
    }
  }
  const float inverse = sum == 0 ? 0 : 1 / sum;
#pragma unroll
  for (int i = 0; i < kCount; ++i) mixed[i] *= inverse;
}

}  // namespace longtake::cuda
