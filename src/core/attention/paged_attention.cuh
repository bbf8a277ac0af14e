// What the two paged attention kernels share: arguments, the layout of a page, and the walk of a
// thread block over its share of the work. Private to paged_attention*.cu.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "attention/paged_attention.h"
#include "kv/device_pages.cuh"

namespace longtake::cuda {

struct PagedArguments {
  const __nv_bfloat16* q;
  __nv_bfloat16* out;
  int num_queries;
  int num_heads;
  const unsigned char* store;
  PageLists lists;
  const int32_t* plan;  // [0]: whole rows per block; [1 + b]: where block b begins in the tail
  float* partial_out;   // [2 blocks][kTileQueries][D], not divided by its sum
  float2* partial_sum;  // [2 blocks][kTileQueries]: reference logit (in powers of two) and sum
  float scale_log2;     // of logits, times log2 e
};

void launch_hopper(int head_dim, PageFormat format, int num_blocks, const PagedArguments& args,
                   cudaStream_t stream);
void launch_portable(int head_dim, int num_blocks, const PagedArguments& args, cudaStream_t stream);

__device__ inline float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 2^x on the multiply-add pipes, to a relative 2e-3: where special functions are what is short.
// x is at least -126 after the clamp; rounding by the sum with 1.5 2^23 leaves the integer part in
// the low bits.
__device__ inline float polynomial_exp2(float x) {
  constexpr float kRound = 12582912.0F;
  x = fmaxf(x, -126.0F);
  const float integer = x + kRound;
  const float f = x - (integer - kRound);  // -0.5 ... 0.5
  const float p = fmaf(fmaf(0.24F, f, 0.703F), f, 1.0F);
  return __int_as_float(__float_as_int(p) + (__float_as_int(integer) << 23));
}

// A run of pages of one row, done by one block.
struct Segment {
  int row;
  int first;  // index into lists.pages
  int count;  // pages, > 0
  int slot;   // of the partial result; -1: the row is whole
};

// The tail: rows [whole_rows, num_rows), cut between blocks. Block b begins at unit plan[1 + b].
class SegmentWalk {
 public:
  __device__ SegmentWalk(const PagedArguments& args, int block, int num_blocks)
      : lists_(args.lists), block_(block), num_blocks_(num_blocks) {
    whole_ = args.plan[0];
    const int base = lists_.offsets[whole_ * num_blocks];
    tail_begin_ = position_ = base + args.plan[1 + block];
    tail_end_ = base + args.plan[2 + block];
    // The row that the tail begins in: the last one that begins at or before the position.
    int low = whole_ * num_blocks, high = lists_.num_rows;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (lists_.offsets[middle] <= position_ ? low : high) = middle;
    }
    tail_row_ = low;
  }

  // False when the block is done.
  __device__ bool next(Segment& segment) {
    while (wave_ < whole_) {
      const int row = wave_++ * num_blocks_ + block_;
      const int begin = lists_.offsets[row], end = lists_.offsets[row + 1];
      if (end > begin) {
        segment = {row, first_of(row, begin), end - begin, -1};
        return true;
      }
    }
    while (position_ < tail_end_) {
      const int row = tail_row_++;
      const int begin = lists_.offsets[row], row_end = lists_.offsets[row + 1];
      const int end = min(row_end, tail_end_);
      if (end <= position_) continue;  // an empty row
      const bool whole = position_ == begin && end == row_end;
      const int slot = whole ? -1 : 2 * block_ + (position_ == tail_begin_ ? 0 : 1);
      segment = {row, first_of(row, begin) + position_ - begin, end - position_, slot};
      position_ = end;
      return true;
    }
    return false;
  }

 private:
  __device__ int first_of(int row, int begin) const {
    return lists_.first ? lists_.first[row] : begin;
  }

  PageLists lists_;
  int block_, num_blocks_;
  int whole_, wave_ = 0;
  int tail_begin_, tail_end_, position_, tail_row_;
};

// Online softmax of two rows of logits, those of one thread in an mma accumulator: rows lane/4 and
// lane/4 + 8 of 16, columns 2 (lane mod 4) + {0, 1} of every 8. The four threads of a row agree on
// its reference; sums stay apart until the end.
//
// The reference follows the maximum only when that has grown by more than 2^kSlack (the idea is
// FlashAttention-4's): accumulators are rescaled a few times a row in place of once a page. Terms
// of the largest logit are between 2^kOffset and 2^(kOffset + kSlack): far from overflow in f32 and
// bf16 in any case, and in 8 bits where most of their range lies below.
// Of every eight terms kPolynomial come from polynomial_exp2.
template <int kSlack, int kOffset, int kPolynomial = 0>
struct OnlineSoftmax {
  float reference[2] = {-INFINITY, -INFINITY};  // in powers of two
  float sum[2] = {0, 0};
  float rescale[2];  // of what was accumulated before the last update

  // logits [N / 2] of N columns, weights of those columns; logits become terms
  // 2^(logit scale + bias - reference), scale by row.
  template <int N>
  __device__ void update(float (&logits)[N / 2], const float* weights, const float (&scale)[2],
                         float bias) {
    float most[2] = {logits[0], logits[2]};
#pragma unroll
    for (int i = 0; i < N / 8; ++i) {
      most[0] = fmaxf(most[0], fmaxf(logits[4 * i], logits[4 * i + 1]));
      most[1] = fmaxf(most[1], fmaxf(logits[4 * i + 2], logits[4 * i + 3]));
    }
    float shift[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      most[r] = fmaxf(most[r], __shfl_xor_sync(~0U, most[r], 1));
      most[r] = fmaxf(most[r], __shfl_xor_sync(~0U, most[r], 2));
      const float wanted = fmaf(most[r], scale[r], bias - kOffset);
      const bool grown = wanted > reference[r] + kSlack;
      rescale[r] = grown ? fast_exp2(reference[r] - wanted) : 1.0F;
      reference[r] = grown ? wanted : reference[r];
      sum[r] *= rescale[r];
      shift[r] = bias - reference[r];
    }
    const float2* pairs = reinterpret_cast<const float2*>(weights) + (threadIdx.x & 3);
#pragma unroll
    for (int i = 0; i < N / 8; ++i) {
      const float2 weight = pairs[4 * i];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float& a = logits[4 * i + 2 * r];
        float& b = logits[4 * i + 2 * r + 1];
        a = fmaf(a, scale[r], shift[r]);
        b = fmaf(b, scale[r], shift[r]);
        a = fast_exp2(a);
        b = i % 4 < kPolynomial ? polynomial_exp2(b) : fast_exp2(b);
        sum[r] = fmaf(a, weight.x, sum[r]);
        sum[r] = fmaf(b, weight.y, sum[r]);
      }
    }
  }

  // The same for all threads of the warp.
  __device__ bool must_rescale() const {
    return __any_sync(~0U, rescale[0] != 1.0F || rescale[1] != 1.0F);
  }

  __device__ void finish() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] += __shfl_xor_sync(~0U, sum[r], 1);
      sum[r] += __shfl_xor_sync(~0U, sum[r], 2);
    }
  }
};

__device__ inline uint32_t pack_bf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// Writes two rows of an accumulator [D / 2], row and row + 8 of the segment's tile: the quotient
// if the segment is its whole row, else what the combining kernel needs.
template <int D, typename Softmax>
__device__ void write_rows(const PagedArguments& args, const Segment& segment, int row,
                           const float (&acc)[D / 2], const Softmax& softmax) {
  const int tiles = args.lists.num_rows / args.num_heads;
  const int head = segment.row / tiles, tile = segment.row % tiles;
  const int column = 2 * (threadIdx.x & 3);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int in_tile = row + 8 * r;
    if (segment.slot < 0) {
      const int query = tile * kTileQueries + in_tile;
      if (query >= args.num_queries) continue;
      const float inverse = softmax.sum[r] == 0 ? 0 : 1 / softmax.sum[r];
      __nv_bfloat16* out =
          args.out + (static_cast<int64_t>(query) * args.num_heads + head) * D + column;
#pragma unroll
      for (int i = 0; i < D / 8; ++i) {
        *reinterpret_cast<uint32_t*>(out + 8 * i) =
            pack_bf16(acc[4 * i + 2 * r] * inverse, acc[4 * i + 2 * r + 1] * inverse);
      }
    } else {
      const int64_t at = static_cast<int64_t>(segment.slot) * kTileQueries + in_tile;
#pragma unroll
      for (int i = 0; i < D / 8; ++i) {
        *reinterpret_cast<float2*>(args.partial_out + at * D + 8 * i + column) =
            make_float2(acc[4 * i + 2 * r], acc[4 * i + 2 * r + 1]);
      }
      if (column == 0) args.partial_sum[at] = make_float2(softmax.reference[r], softmax.sum[r]);
    }
  }
}

}  // namespace longtake::cuda
