// How AnnSA chooses pages and AnnCA prompt tokens, on the device: `count` candidates, known by a
// vector each, are measured by the queries of a tile, and the best are chosen. Private to
// page_lists.cu and prompt_tokens.cu.
//
// All functions are for whole blocks of kChooseThreads.
#pragma once

#include "attention/paged_attention.cuh"
#include "device/mma.cuh"

namespace longtake::cuda {

constexpr int kChooseThreads = 256;
constexpr int kCandidates = 64;  // whose vectors are in shared memory at a time

template <int D>
struct MeasureScratch {
  __align__(128) unsigned char rows[kCandidates * D * 2];
  float weights[kCandidates];
  float by_warp[kChooseThreads / 32][kCandidates];
};

// What a candidate is worth to a tile of queries.
enum class Measure {
  kMass,  // softmax mass, summed over the queries; a candidate stands for weight_of() equal ones
  kBest   // the best logit over the queries, the mean over candidates taken off each query
};

// worth [count], in shared or global memory, of queries `first` + {0 ... 127} of a head. q: the
// head's first row, `stride` elements from row to row. row_of(i): the candidate's D channels in
// bf16, aligned to 16 bytes; weight_of(i) > 0.
//
// Two passes over the candidates: the first finds each query's sum, the second shares it out. Up to
// kCandidates stay in registers between the two.
template <int D, Measure kMeasure, typename T, typename RowOf, typename WeightOf>
__device__ void measure(const T* q, int64_t stride, int first, int num_queries, float scale_log2,
                        int count, const RowOf& row_of, const WeightOf& weight_of,
                        MeasureScratch<D>& scratch, float* worth) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  first += warp * 16;
  uint32_t left[D / 16][4];
  load_left<D>(left, q, stride, first, num_queries);
  float logits[kCandidates / 2];
  const float scale[2] = {scale_log2, scale_log2};
  OnlineSoftmax<8, 0> softmax;
  // Of each of the thread's two queries: for kMass one over the sum, for kBest the mean logit.
  float share[2] = {}, sums[2] = {};
  const bool there[2] = {first + lane / 4 < num_queries, first + lane / 4 + 8 < num_queries};
  const bool once = count <= kCandidates;
  for (int pass = 0; pass < 2; ++pass) {
    for (int begin = 0; begin < count; begin += kCandidates) {
      if (pass == 0 || !once) {
        __syncthreads();
        // Beyond the last candidate: that one again, without weight.
        for (int i = threadIdx.x; i < kCandidates * (D / 8); i += kChooseThreads) {
          const int row = i / (D / 8), chunk = i % (D / 8);
          copy_16(scratch.rows + offset_in_64_rows(row, chunk),
                  row_of(min(begin + row, count - 1)) + 8 * chunk);
        }
        copies_commit();
        if (threadIdx.x < kCandidates) {
          const int candidate = begin + threadIdx.x;
          scratch.weights[threadIdx.x] = candidate < count ? weight_of(candidate) : 0;
        }
        copies_wait<0>();
        __syncthreads();
        multiply_rows<D>(logits, left, scratch.rows);
      }
      if (pass == 0) {
        if constexpr (kMeasure == Measure::kMass) {
          softmax.update<kCandidates>(logits, scratch.weights, scale, 0);
        } else {
#pragma unroll
          for (int i = 0; i < kCandidates / 2; ++i) {
            const int column = i / 4 * 8 + 2 * (lane & 3) + i % 2;
            logits[i] *= scale_log2;
            sums[i / 2 % 2] += begin + column < count ? logits[i] : 0;
          }
        }
        continue;
      }
#pragma unroll
      for (int i = 0; i < kCandidates / 8; ++i) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float value = kMeasure == Measure::kMass ? 0 : -INFINITY;
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            float x = logits[4 * i + 2 * r + c];
            if constexpr (kMeasure == Measure::kMass) {
              // After one pass logits are terms already.
              if (!once) x = fast_exp2(fmaf(x, scale_log2, -softmax.reference[r]));
              value = fmaf(share[r], x, value);
            } else {
              if (!once) x *= scale_log2;
              if (there[r]) value = fmaxf(value, x - share[r]);
            }
          }
#pragma unroll
          for (int step = 4; step < 32; step *= 2) {
            const float other = __shfl_xor_sync(~0U, value, step);
            value = kMeasure == Measure::kMass ? value + other : fmaxf(value, other);
          }
          if (lane < 4) scratch.by_warp[warp][8 * i + 2 * lane + c] = value;
        }
      }
      __syncthreads();
      if (threadIdx.x < kCandidates && begin + threadIdx.x < count) {
        float value = scratch.by_warp[0][threadIdx.x];
#pragma unroll
        for (int w = 1; w < kChooseThreads / 32; ++w) {
          const float other = scratch.by_warp[w][threadIdx.x];
          value = kMeasure == Measure::kMass ? value + other : fmaxf(value, other);
        }
        if constexpr (kMeasure == Measure::kMass) value *= scratch.weights[threadIdx.x];
        worth[begin + threadIdx.x] = value;
      }
    }
    if (pass == 1) break;
    if constexpr (kMeasure == Measure::kMass) softmax.finish();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if constexpr (kMeasure == Measure::kMass) {
        share[r] = there[r] && softmax.sum[r] > 0 ? 1 / softmax.sum[r] : 0;
      } else {
        sums[r] += __shfl_xor_sync(~0U, sums[r], 1);
        sums[r] += __shfl_xor_sync(~0U, sums[r], 2);
        share[r] = sums[r] / static_cast<float>(count);
      }
    }
  }
  __syncthreads();
}

struct ChooseScratch {
  int32_t bins[kChooseThreads];
  int32_t by_warp[kChooseThreads / 32];
  int32_t digit, left;
};

// The sum over the threads before this one; total: over all.
__device__ inline int scan(int own, int& total, ChooseScratch& scratch) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int sum = own;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int before = __shfl_up_sync(~0U, sum, step);
    if (lane >= step) sum += before;
  }
  __syncthreads();
  if (lane == 31) scratch.by_warp[warp] = sum;
  __syncthreads();
  int before = 0;
  total = 0;
#pragma unroll
  for (int w = 0; w < kChooseThreads / 32; ++w) {
    if (w == warp) before = total;
    total += scratch.by_warp[w];
  }
  return before + sum - own;
}

// A number whose order as an integer is that of x.
__device__ inline uint32_t rank_of(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits & 0x80000000U ? ~bits : bits | 0x80000000U;
}

constexpr uint32_t kAlways = ~0U;  // a rank above all

// Chooses from the highest rank down, equal ranks in order, until the sizes of what is chosen reach
// `wanted`, or all are. rank [count], in shared memory, becomes: 0, or 1 + how many before it are
// chosen. size_of(i) >= 0. Returns how many are chosen.
//
// The rank that the last one has is found by its bytes, from the highest: a histogram of sizes by
// the next byte of all that have the bytes found so far.
template <typename SizeOf>
__device__ int choose_best(uint32_t* rank, int count, int wanted, const SizeOf& size_of,
                           ChooseScratch& scratch) {
  const int thread = threadIdx.x;
  const int stretch = (count + kChooseThreads - 1) / kChooseThreads;
  const int begin = min(count, thread * stretch), end = min(count, begin + stretch);
  int total = 0, own = 0;
  for (int i = begin; i < end; ++i) own += size_of(i);
  scan(own, total, scratch);
  int left = min(wanted, total);
  uint32_t threshold = 0;
  for (int shift = 24; shift >= 0 && left > 0; shift -= 8) {
    scratch.bins[thread] = 0;
    __syncthreads();
    for (int i = thread; i < count; i += kChooseThreads) {
      const bool candidate = shift == 24 || rank[i] >> (shift + 8) == threshold >> (shift + 8);
      if (candidate) atomicAdd(&scratch.bins[rank[i] >> shift & 255], size_of(i));
    }
    __syncthreads();
    const int in_bin = scratch.bins[255 - thread];
    const int above = scan(in_bin, total, scratch);
    if (above < left && left <= above + in_bin) {
      scratch.digit = 255 - thread;
      scratch.left = left - above;
    }
    __syncthreads();
    threshold |= static_cast<uint32_t>(scratch.digit) << shift;
    left = scratch.left;
  }
  // Those above the threshold, and of those at it the first. Nobody is wanted: nobody is above.
  if (left <= 0) threshold = kAlways;
  own = 0;
  for (int i = begin; i < end; ++i) own += rank[i] == threshold ? size_of(i) : 0;
  int before = scan(own, total, scratch);
  own = 0;
  for (int i = begin; i < end; ++i) {
    bool chosen = rank[i] > threshold;
    if (rank[i] == threshold) {
      chosen = before < left;
      before += size_of(i);
    }
    rank[i] = chosen;
    own += chosen;
  }
  int at = scan(own, total, scratch);
  for (int i = begin; i < end; ++i) rank[i] = rank[i] != 0 ? ++at : 0;
  __syncthreads();
  return total;
}

// Whether this block is the last of `blocks` to come here, by a counter that is then 0 again; what
// the others have written before is there for it.
__device__ inline bool is_last_block(uint32_t* counter, uint32_t blocks) {
  __threadfence();
  __syncthreads();
  __shared__ bool last;
  if (threadIdx.x == 0) last = atomicInc(counter, blocks - 1) == blocks - 1;
  __syncthreads();
  __threadfence();
  return last;
}

}  // namespace longtake::cuda
