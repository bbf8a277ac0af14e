// A product of few rows, a launch that makes its own input and finishes its own outputs: what the
// ops of stream_linear.h and attention/norm_linear_attend.h share. For .cu files.
//
// With 128 rows of 384 channels there is no work to speak of: what counts is how many round trips
// to the second-level cache stand behind one another. So a block brings in all it needs at once:
//
//   weights of its 32 or 64 columns, over the whole depth   before the launch before has ended
//   16 rows of the stream, normed, or of another input      as soon as it has
//   products of 16 x 16 outputs a warp, the depth dealt out among warps (mma.sync)
//   sums of the warps' parts through shared memory, in order; then bias, norm of heads over a
//   cluster, and what an End makes of them
#pragma once

#include "device/cuda_runtime.h"
#include "device/hopper.cuh"
#include "device/launch.cuh"
#include "ops/linear_cuda.h"
#include "ops/rows.cuh"
#include "ops/stream_linear.h"

namespace longtake::cuda {

inline constexpr int kTileRows = 16, kProductWarps = 8, kProductThreads = 32 * kProductWarps;
inline constexpr int kNormChunks = 4;  // of four channels that a thread holds of a row to be normed
inline constexpr int kMostNormed = 128 * kNormChunks;
inline constexpr int kHeadColumns = 64;         // of a block where heads are normed
inline constexpr unsigned kMostHeadBlocks = 8;  // of a cluster, which has all heads

struct Product {
  const void* x;  // f32 if it is normed, else bf16
  const bf16* w;
  const float* bias;  // or null
  int rows, in, out;

  // Of x and w in shared memory, in elements: rows are apart by what spreads them over all banks.
  __host__ __device__ int stride() const { return in + 8; }
};

// ---- what goes into the product ----

// Rows [first, first + count) of a bf16 matrix into shared memory; zeros from num_rows on.
__device__ inline void bring_rows(const bf16* from, int first, int count, int num_rows,
                                  const Product& p, bf16* to) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int row = warp; row < count; row += kProductWarps) {
    const bool is_there = first + row < num_rows;
    const bf16* source = from + int64_t{first + row} * p.in;
    for (int at = 8 * lane; at < p.in; at += 8 * 32) {
      if (is_there) {
        copy_16(to + row * p.stride() + at, source + at);
      } else {
        *reinterpret_cast<uint4*>(to + row * p.stride() + at) = {};
      }
    }
  }
}

// Two rows a warp, read once; both are on their way before either is summed up.
__device__ inline void norm_tile(const Product& p, const NormVectors& norm, int first, bf16* to) {
  static_assert(kTileRows == 2 * kProductWarps);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float4 v[2][kNormChunks], scale[kNormChunks], shift[kNormChunks];
  const float *scales[2], *shifts[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = min(first + warp + r * kProductWarps, p.rows - 1);
    scales[r] = norm.scale.of(row);
    shifts[r] = norm.shift.of(row);
    const float* x = static_cast<const float*>(p.x) + int64_t{row} * p.in;
#pragma unroll
    for (int c = 0; c < kNormChunks; ++c) {
      const int column = 4 * (32 * c + lane);
      v[r][c] = column < p.in ? load4(x + column) : float4{};
    }
  }
#pragma unroll
  for (int c = 0; c < kNormChunks; ++c) {
    const int column = 4 * (32 * c + lane);
    if (column >= p.in) continue;
    scale[c] = load4(scales[0] + column);
    shift[c] = load4(shifts[0] + column);
  }
  const float share = 1.0F / static_cast<float>(p.in);
  float sum[2], squares[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    sum[r] = squares[r] = 0;
#pragma unroll
    for (int c = 0; c < kNormChunks; ++c) sum[r] += sum4(v[r][c]);
    sum[r] = team_sum<32>(sum[r]) * share;
#pragma unroll
    for (int c = 0; c < kNormChunks; ++c) {
      if (4 * (32 * c + lane) < p.in) squares[r] += squares4(v[r][c], sum[r]);
    }
    squares[r] = team_sum<32>(squares[r]) * share;
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float inverse = 1.0F / sqrtf(squares[r] + norm.eps);
    const bool is_other = scales[r] != scales[0] || shifts[r] != shifts[0];
#pragma unroll
    for (int c = 0; c < kNormChunks; ++c) {
      const int column = 4 * (32 * c + lane);
      if (column >= p.in) continue;
      const float4 a = is_other ? load4(scales[r] + column) : scale[c];
      const float4 b = is_other ? load4(shifts[r] + column) : shift[c];
      const auto value = [&](float x, float by, float plus) {
        return normed<true, false>(x, sum[r], inverse, by, norm.scale_offset, plus);
      };
      store4(to + (warp + r * kProductWarps) * p.stride() + column,
             {value(v[r][c].x, a.x, b.x), value(v[r][c].y, a.y, b.y), value(v[r][c].z, a.z, b.z),
              value(v[r][c].w, a.w, b.w)});
    }
  }
}

// ---- the product ----

// acc [2][4] += 16 x 16 x 16 at `depth`.
__device__ inline void multiply_step(const bf16* x, const bf16* w, int stride, int depth,
                                     float (&acc)[2][4]) {
  const int lane = threadIdx.x % 32;
  uint32_t a[4], b[4];
  load_matrices(a, x + lane % 16 * stride + depth + lane / 16 * 8);
  load_matrices(b, w + (lane / 16 * 8 + lane % 8) * stride + depth + lane / 8 % 2 * 8);
  mma_m16n8k16(acc[0], a, b[0], b[1]);
  mma_m16n8k16(acc[1], a, b[2], b[3]);
}

// Sums over the cluster of what every block has of a row's squares, in the order of the blocks.
// mine: of row threadIdx.x / 32 + kProductWarps * i, the same in all lanes.
template <int kPairs>
__device__ void sum_over_cluster(float (&mine)[kPairs],
                                 float (&shared)[kMostHeadBlocks][kTileRows]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int blocks = gridDim.x, rank = blockIdx.x;
  cluster_wait();  // all blocks have begun
  if (lane < blocks) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i)
      store_remote(shared_address(&shared[rank][warp + kProductWarps * i]), lane, mine[i]);
  }
  cluster_sync();
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    mine[i] = 0;
    for (int b = 0; b < blocks; ++b) mine[i] += shared[b][warp + kProductWarps * i];
  }
}

// Two neighbouring outputs of every thread become what End makes of them:
//   kNormsHeads    a block's 64 columns are heads; the columns of the grid are a cluster and have
//   all
//                  heads of a row, `dim` values, which heads_norm() norms if it is not null
//   first_column   of the block
//   bring          what it brings into shared memory behind w, before the launch before has ended
//   Loaded, load   what it reads of memory for two outputs, while the product is on its way
//   finish_tile    the rest; all threads call it, and x and w are no longer needed
//
// Grid: columns, tiles of rows, and what else End has.
template <int kColumns, bool kNormed, typename End>
__global__ void __launch_bounds__(kProductThreads, 2)
    product_kernel(const __grid_constant__ Product p, const __grid_constant__ NormVectors norm,
                   const __grid_constant__ End end) {
  static_assert(!End::kNormsHeads || kColumns == kHeadColumns);
  constexpr int kGroups = kColumns / 16, kParts = kProductWarps / kGroups;  // warps: columns, depth
  constexpr int kPairs = kTileRows * kColumns / 2 / kProductThreads;        // of outputs, a thread
  constexpr int kSumStride = kColumns + 8;
  extern __shared__ uint4 raw[];
  __shared__ float sums[kParts][kTileRows][kSumStride];
  bf16* const x = reinterpret_cast<bf16*>(raw);
  bf16* const w = x + kTileRows * p.stride();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first_row = blockIdx.y * kTileRows, first_column = end.first_column(kColumns);
  // Pairs of a row are neighbouring threads'.
  const auto row_of = [&](int i) {
    return (static_cast<int>(threadIdx.x) + kProductThreads * i) / (kColumns / 2);
  };
  const int in_block = 2 * (threadIdx.x % (kColumns / 2)), column = first_column + in_block;

  let_next_begin();
  if constexpr (End::kNormsHeads) NV_IF_TARGET(NV_PROVIDES_SM_90, (cluster_arrive();));
  bring_rows(p.w, first_column, kColumns, p.out, p, w);
  end.bring(w + kColumns * p.stride());
  float2 bias{};
  if (p.bias != nullptr && column < p.out) bias = *reinterpret_cast<const float2*>(p.bias + column);

  wait_for_previous();
  if constexpr (kNormed) {
    norm_tile(p, norm, first_row, x);
  } else {
    bring_rows(static_cast<const bf16*>(p.x), first_row, kTileRows, p.rows, p, x);
  }
  typename End::Loaded loaded[kPairs];
#pragma unroll
  for (int i = 0; i < kPairs; ++i) loaded[i] = end.load(p, first_row + row_of(i), column);
  copies_commit();
  copies_wait<0>();
  __syncthreads();

  // Two accumulators: products that follow one another do not wait for one another.
  float acc[2][2][4] = {};
  const int group = warp % kGroups, part = warp / kGroups;
  const bf16* const own = w + group * 16 * p.stride();
#pragma unroll 2
  for (int depth = 16 * part; depth < p.in; depth += 32 * kParts) {
    multiply_step(x, own, p.stride(), depth, acc[0]);
    if (depth + 16 * kParts < p.in) multiply_step(x, own, p.stride(), depth + 16 * kParts, acc[1]);
  }
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      *reinterpret_cast<float2*>(
          &sums[part][lane / 4 + 8 * r][16 * group + 8 * n + 2 * (lane % 4)]) = {
          acc[0][n][2 * r] + acc[1][n][2 * r], acc[0][n][2 * r + 1] + acc[1][n][2 * r + 1]};
    }
  }
  __syncthreads();
  float2 v[kPairs];
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    v[i] = bias;
#pragma unroll
    for (int k = 0; k < kParts; ++k) {
      const float2 more = *reinterpret_cast<const float2*>(&sums[k][row_of(i)][in_block]);
      v[i] = {v[i].x + more.x, v[i].y + more.y};
    }
  }
  if constexpr (End::kNormsHeads) {
    [[maybe_unused]] __shared__ float squares[kMostHeadBlocks][kTileRows];
    float total[kPairs];
#pragma unroll
    for (int i = 0; i < kPairs; ++i) total[i] = team_sum<32>(v[i].x * v[i].x + v[i].y * v[i].y);
    if (end.heads_norm() != nullptr) {
      NV_IF_TARGET(NV_PROVIDES_SM_90, (sum_over_cluster<kPairs>(total, squares);));
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        const float inverse = 1.0F / sqrtf(total[i] / static_cast<float>(end.dim) + end.eps);
        v[i] = {v[i].x * inverse * loaded[i].norm.x, v[i].y * inverse * loaded[i].norm.y};
      }
    } else {
      NV_IF_TARGET(NV_PROVIDES_SM_90, (cluster_wait();));
    }
  }
  end.finish_tile(p, first_row, row_of, column, v, loaded, raw);
}

inline size_t product_bytes(const Product& p, int columns) {
  return static_cast<size_t>(kTileRows + columns) * static_cast<size_t>(p.stride()) * sizeof(bf16);
}

inline constexpr size_t kStaticBytes = size_t{12} << 10;  // more than the kernels have besides

// more_bytes: of End.
inline bool fits(const Context& ctx, const Product& p, int columns, size_t more_bytes = 0) {
  return product_bytes(p, columns) + more_bytes + kStaticBytes <= ctx.cuda()->most_shared_bytes();
}

// Whether the kernel reads such rows and weights; x and the norm's vectors start in fours.
inline bool suits(View x, const LinearWeight& weight) {
  return x.dim(0) <= kFewRows && weight.compute_dtype() == DType::kBF16 &&
         weight.in_features() % 16 == 0 && weight.out_features() % 2 == 0 &&
         reinterpret_cast<uintptr_t>(x.raw()) % 16 == 0;
}

inline bool suits(View x, const LinearWeight& weight, const NormVectors& norm) {
  return suits(x, weight) && weight.in_features() <= kMostNormed && start_in_fours(norm.scale) &&
         start_in_fours(norm.shift);
}

inline bool starts_in_pairs(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % sizeof(float2) == 0;
}

inline Product product_of(View x, const LinearWeight& weight) {
  const PackedProduct& packed = packed_of(weight);
  return {x.raw(),
          packed.weight.view().data<bf16>(),
          packed.bias.view().empty() ? nullptr : packed.bias.view().data<float>(),
          static_cast<int>(x.dim(0)),
          static_cast<int>(weight.in_features()),
          static_cast<int>(weight.out_features())};
}

inline NormVectors stream_norm_of(View x, const StreamNorm& norm) {
  return {framed(norm.scale, x.dim(0), x.dim(1)), framed(norm.shift, x.dim(0), x.dim(1)), norm.eps,
          norm.scale_plus_one ? 1.0F : 0.0F};
}

template <int kColumns, bool kNormed, typename End>
void launch_product(Context& ctx, const char* op, const Product& p, const NormVectors& norm,
                    const End& end, dim3 grid, unsigned cluster, size_t more_bytes = 0) {
  const auto kernel = product_kernel<kColumns, kNormed, End>;
  const size_t bytes = product_bytes(p, kColumns) + more_bytes;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(bytes)),
        op);
  const Runtime& runtime = *ctx.cuda();
  EarlyLaunch(runtime.stream(), runtime.is_hopper_or_later(), grid, kProductThreads, bytes, cluster)
      .run(op, kernel, p, norm, end);
}

}  // namespace longtake::cuda
