// What the two paged attention kernels share: arguments, the layout of a page, and the walk of a
// thread block over its share of the work. Private to paged_attention*.cu.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "attention/paged_attention.h"
#include "kv/device_pages.cuh"

namespace longtake::cuda {

constexpr int kMaxBlocks = 256;  // one a multiprocessor

struct PagedArguments {
  const void* q;
  void* out;
  int num_queries;
  int num_heads;
  const unsigned char* store;
  PageLists lists;
  float scale_log2;    // of logits, times log2 e
  int blocks_per_row;  // by rows: the size of a cluster; by shares: 0
  // By shares, for the combining kernel:
  int32_t* plan;        // [blocks + 2]: of make_plan
  float* partial_out;   // [2 blocks][kTileQueries][D], not divided by its sum
  float2* partial_sum;  // [2 blocks][kTileQueries]: reference logit (in powers of two) and sum
};

// Once before launches on the current device; the first tells how many clusters fit of 2 blocks and
// more.
ClusterRoom prepare_hopper(int head_dim, PageFormat format);
void prepare_portable(int head_dim);
void prepare_f32();

// num_blocks: of the whole grid.
void launch_hopper(int head_dim, PageFormat format, int num_blocks, const PagedArguments& args,
                   cudaStream_t stream);
void launch_portable(int head_dim, int num_blocks, const PagedArguments& args, cudaStream_t stream);
void launch_f32(int head_dim, const PagedArguments& args, cudaStream_t stream);

// Where pages of list i begin.
__device__ inline int first_of(const PageLists& lists, int list) {
  return lists.stride > 0 ? list * lists.stride : lists.offsets[list];
}

__device__ inline int length_of(const PageLists& lists, int list) {
  return lists.offsets[list + 1] - lists.offsets[list];
}

// Pages read by all rows before this one.
__device__ inline int pages_before(const PageLists& lists, int row) {
  const int list = row / lists.rows_per_list, of_list = row % lists.rows_per_list;
  const int before = lists.offsets[list] * lists.rows_per_list;
  return of_list == 0 ? before : before + of_list * length_of(lists, list);
}

// The last row of [low, num_rows) whose first page is at or before `unit` (of the walk over all
// rows); low where there is none.
__device__ inline int row_at(const PageLists& lists, int low, int unit) {
  for (int high = lists.num_rows(); high - low > 1;) {
    const int middle = (low + high) / 2;
    (pages_before(lists, middle) <= unit ? low : high) = middle;
  }
  return low;
}

struct Plan {
  int32_t starts[kMaxBlocks + 1];  // where block b begins in the tail, in pages
  int32_t whole;                   // rows dealt to every block
  int32_t by_warp[kMaxBlocks / 32];
};

// Thread b works for block b: every block gets as many whole rows as leave none of them with more
// than its fair share of pages; what is missing to the fair share comes from the tail, in order.
// All blocks make the same plan, which costs less than to wait for a kernel that makes it. All
// threads of the block must call it, kMaxBlocks at least; they may read it after a __syncthreads().
__device__ inline void make_plan(const PageLists& lists, int num_blocks, Plan& plan) {
  const int block = threadIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const bool on = block < num_blocks;
  const int num_rows = lists.num_rows();
  const int64_t total = int64_t{lists.offsets[lists.num_lists]} * lists.rows_per_list;
  const auto share_begin = [&](int b) { return static_cast<int32_t>(total * b / num_blocks); };
  const int share = on ? share_begin(block + 1) - share_begin(block) : 0;
  int load = 0, whole = 0;
  for (; (whole + 1) * num_blocks <= num_rows; ++whole) {
    const int row = whole * num_blocks + block;
    const int more = on ? load + length_of(lists, row / lists.rows_per_list) : 0;
    if (__syncthreads_or(more > share)) break;
    load = more;
  }
  int sum = share - load;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int before = __shfl_up_sync(~0U, sum, step);
    if (lane >= step) sum += before;
  }
  if (lane == 31 && block < kMaxBlocks) plan.by_warp[warp] = sum;
  __syncthreads();
  if (on) {
    for (int w = 0; w < warp; ++w) sum += plan.by_warp[w];
    plan.starts[block + 1] = sum;
  }
  if (block == 0) {
    plan.starts[0] = 0;
    plan.whole = whole;
  }
}

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

// The plan of this launch, ready to read; left for the combining kernel as well: starts, then
// whole.
__device__ inline void share_out(const PagedArguments& args, Plan& plan) {
  const int num_blocks = gridDim.x;
  make_plan(args.lists, num_blocks, plan);
  __syncthreads();
  if (blockIdx.x > 0) return;
  for (int i = threadIdx.x; i <= num_blocks; i += blockDim.x) args.plan[i] = plan.starts[i];
  if (threadIdx.x == 0) args.plan[num_blocks + 1] = plan.whole;
}

// A run of pages of one row, done by one block.
struct Segment {
  int row;
  int first;  // index into lists.pages
  int count;  // pages; 0 by rows only
  int slot;   // of the partial result; -1: the row is whole
};

// By shares: whole rows, then the tail from plan.starts[block] on.
class ShareWalk {
 public:
  __device__ ShareWalk(const PagedArguments& args, const Plan& plan)
      : lists_(args.lists), whole_(plan.whole) {
    const int first_row = whole_ * gridDim.x;
    const int base = pages_before(lists_, first_row);
    tail_begin_ = position_ = base + plan.starts[blockIdx.x];
    tail_end_ = base + plan.starts[blockIdx.x + 1];
    tail_row_ = row_at(lists_, first_row, position_);
  }

  // False when the block is done.
  __device__ bool next(Segment& segment) {
    while (wave_ < whole_) {
      const int row = wave_++ * gridDim.x + blockIdx.x, list = row / lists_.rows_per_list;
      const int count = length_of(lists_, list);
      if (count > 0) {
        segment = {row, first_of(lists_, list), count, -1};
        return true;
      }
    }
    while (position_ < tail_end_) {
      const int row = tail_row_++, list = row / lists_.rows_per_list;
      const int begin = pages_before(lists_, row), row_end = begin + length_of(lists_, list);
      const int end = min(row_end, tail_end_);
      if (end <= position_) continue;  // an empty row
      const bool whole = position_ == begin && end == row_end;
      const int slot =
          whole ? -1 : 2 * static_cast<int>(blockIdx.x) + (position_ == tail_begin_ ? 0 : 1);
      segment = {row, first_of(lists_, list) + position_ - begin, end - position_, slot};
      position_ = end;
      return true;
    }
    return false;
  }

 private:
  PageLists lists_;
  int whole_, wave_ = 0;
  int tail_begin_, tail_end_, position_, tail_row_;
};

// By rows: all of this block's, or its part of its cluster's one.
class RowWalk {
 public:
  __device__ RowWalk(const PagedArguments& args, const Plan&)
      : lists_(args.lists),
        blocks_(args.blocks_per_row),
        part_(blockIdx.x % blocks_),
        row_(blockIdx.x / blocks_) {}

  __device__ bool next(Segment& segment) {
    if (row_ >= lists_.num_rows()) return false;
    const int list = row_ / lists_.rows_per_list, length = length_of(lists_, list);
    const int from = length * part_ / blocks_, to = length * (part_ + 1) / blocks_;
    segment = {row_, first_of(lists_, list) + from, to - from, blocks_ > 1 ? 0 : -1};
    row_ += gridDim.x / blocks_;
    return true;
  }

 private:
  PageLists lists_;
  int blocks_, part_, row_;
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

// Where a query's channels of a head are in the output.
template <int D>
__device__ __nv_bfloat16* out_of(const PagedArguments& args, int query, int head) {
  return static_cast<__nv_bfloat16*>(args.out) +
         (static_cast<int64_t>(query) * args.num_heads + head) * D;
}

// Writes two rows of an accumulator [D / 2], row and row + 8 of the segment's tile: the quotient
// if the segment is its whole row, else what is put together later, at partial_out [..][kStride]
// and partial_sum.
template <int D, int kStride, typename Softmax>
__device__ void write_rows(const PagedArguments& args, const Segment& segment, int row,
                           const float (&acc)[D / 2], const Softmax& softmax, float* partial_out,
                           float2* partial_sum) {
  const int tiles = args.lists.num_rows() / args.num_heads;
  const int head = segment.row / tiles, tile = segment.row % tiles;
  const int column = 2 * (threadIdx.x & 3);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int in_tile = row + 8 * r;
    if (segment.slot < 0) {
      const int query = tile * kTileQueries + in_tile;
      if (query >= args.num_queries) continue;
      const float inverse = softmax.sum[r] == 0 ? 0 : 1 / softmax.sum[r];
      __nv_bfloat16* out = out_of<D>(args, query, head) + column;
#pragma unroll
      for (int i = 0; i < D / 8; ++i) {
        *reinterpret_cast<uint32_t*>(out + 8 * i) =
            pack_bf16(acc[4 * i + 2 * r] * inverse, acc[4 * i + 2 * r + 1] * inverse);
      }
    } else {
      const int64_t at = static_cast<int64_t>(segment.slot) * kTileQueries + in_tile;
#pragma unroll
      for (int i = 0; i < D / 8; ++i) {
        *reinterpret_cast<float2*>(partial_out + at * kStride + 8 * i + column) =
            make_float2(acc[4 * i + 2 * r], acc[4 * i + 2 * r + 1]);
      }
      if (column == 0) partial_sum[at] = make_float2(softmax.reference[r], softmax.sum[r]);
    }
  }
}

}  // namespace longtake::cuda
