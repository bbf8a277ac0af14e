// The metric of merging: queries are looked at, keys and groups are mapped. tempcache_metric.h says
// what it is.
#include <algorithm>
#include <cmath>

#include "kv/device_groups.cuh"

namespace longtake::cuda {
namespace {

constexpr int kSampled = 32;      // queries of a chunk, about: as tempcache.cpp
constexpr int kMostSampled = 64;  // of them
constexpr int kRows = 32;         // keys that a block maps at a time
constexpr float kReadWeight = 0.125F;

template <typename T>
__device__ float number(const T* x, int64_t at) {
  return static_cast<float>(x[at]);
}

// The turns of one frame into shared memory [pairs], by all threads.
__device__ void set_turns(const Groups& g, int64_t frame, float2* turns) {
  for (int i = threadIdx.x; i < g.pairs; i += blockDim.x) turns[i] = turn_of(g, i, frame);
}

// Grid: heads, slices of 32 rows of the moment.
template <typename T, int D>
__global__ void __launch_bounds__(256) observe_kernel(Groups g, const T* q, int tokens) {
  __shared__ float rows[kMostSampled][D + 1];
  const int head = blockIdx.x, heads = gridDim.x;
  const int stride = max(1, tokens / kSampled);
  const int count = (tokens + stride - 1) / stride;
  const int64_t first = first_frame(g);
  for (int i = threadIdx.x; i < count * (D / 2); i += blockDim.x) {
    const int row = i / (D / 2), pair = i % (D / 2);
    const int token = min(row * stride + row / 4 % stride, tokens - 1);
    const T* from = q + (static_cast<int64_t>(token) * heads + head) * D + 2 * pair;
    float x[2] = {number(from, 0), number(from, 1)};
    if (pair < g.pairs) {
      const float2 by = turn_of(g, pair, first + token / g.frames.tokens);
      turn<2>(x, 0, 1, &by, -1);
    }
    rows[row][2 * pair] = x[0];
    rows[row][2 * pair + 1] = x[1];
  }
  __syncthreads();
  if (g.rule == MergeRule::kNats) {
    for (int i = threadIdx.x; i < 32 * D; i += blockDim.x) {
      const int a = blockIdx.y * 32 + i / D, b = i % D;
      float sum = 0;
      for (int row = 0; row < count; ++row) sum = fmaf(rows[row][a], rows[row][b], sum);
      g.moments[(static_cast<int64_t>(head) * D + a) * D + b] += static_cast<double>(sum);
    }
  }
  if (blockIdx.y > 0) return;
  if (threadIdx.x == 0) g.num_queries[head] += count;
  if (g.most_error == 0) return;
  for (int row = threadIdx.x; row < count; row += blockDim.x) {
    float square = 0;
    for (int i = 0; i < D; ++i) square = fmaf(rows[row][i], rows[row][i], square);
    atomicMax(g.longest_query, __float_as_int(sqrtf(square)));
  }
}

// Grid: heads, frames; threads: channels by parts of the rows.
template <typename T, int D>
__global__ void __launch_bounds__(8 * D) observe_reads_kernel(Groups g, const T* q, int tokens) {
  constexpr int kParts = 8;
  __shared__ float sums[kParts][D];
  const int head = blockIdx.x, heads = gridDim.x, frame = blockIdx.y;
  const int channel = threadIdx.x % D, part = threadIdx.x / D;
  const int stride = max(1, tokens / kSampled);
  float sum = 0;
#pragma unroll 4
  for (int token = stride / 2 + part * stride; token < tokens; token += kParts * stride) {
    const int64_t row = static_cast<int64_t>(frame) * tokens + token;
    sum += number(q, (row * heads + head) * D + channel);
  }
  sums[part][channel] = sum;
  __syncthreads();
  if (part > 0) return;
  for (int i = 1; i < kParts; ++i) sum += sums[i][channel];
  g.read_sums[(static_cast<int64_t>(frame) * heads + head) * D + channel] += sum;
  if (frame == 0 && channel == 0) g.num_read[head] += (tokens - stride / 2 + stride - 1) / stride;
}

// The chunk's reading queries join the mean of the head: a mean turns as its queries do.
template <int D>
__device__ void take_reads(const Groups& g, int head) {
  const int heads = g.layout.num_heads;
  const int count = g.num_read[head];
  if (count == 0) return;
  __syncthreads();
  const int chunks = g.num_chunks_read[head] + 1;
  const float weight = fmaxf(kReadWeight, 1.0F / static_cast<float>(chunks));
  const float share = weight / static_cast<float>(g.chunk_frames);
  for (int pair = threadIdx.x; pair < D / 2; pair += blockDim.x) {
    float* reader = g.readers + head * D + 2 * pair;
    float to[2] = {reader[0] * (1 - weight), reader[1] * (1 - weight)};
    for (int frame = 0; frame < g.chunk_frames; ++frame) {
      float* sum = g.read_sums + (static_cast<int64_t>(frame) * heads + head) * D + 2 * pair;
      float x[2] = {sum[0] / static_cast<float>(count), sum[1] / static_cast<float>(count)};
      sum[0] = sum[1] = 0;
      if (pair < g.pairs) {
        const float2 by = turn_of(g, pair, first_frame(g) + frame);
        turn<2>(x, 0, 1, &by, -1);
      }
      to[0] += share * x[0];
      to[1] += share * x[1];
    }
    reader[0] = to[0];
    reader[1] = to[1];
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    g.num_read[head] = 0;
    g.num_chunks_read[head] = chunks;
  }
}

// Lower triangle L of the mean moment, a = L L^T, in place in shared memory; by all threads.
template <int D>
__device__ void cholesky(double* a) {
  for (int j = 0; j < D; ++j) {
    // Column j: what the columns before it leave.
    for (int i = j + threadIdx.x; i < D; i += blockDim.x) {
      double rest = a[i * D + j];
      for (int k = 0; k < j; ++k) rest -= a[i * D + k] * a[j * D + k];
      if (i > j) a[i * D + j] = rest;
      if (i == j) a[j * D + j] = sqrt(fmax(rest, 0.0));
    }
    __syncthreads();
    const double pivot = a[j * D + j];
    for (int i = j + 1 + threadIdx.x; i < D; i += blockDim.x)
      a[i * D + j] = pivot > 0 ? a[i * D + j] / pivot : 0.0;
    __syncthreads();
  }
}

// One block a head: at the chunk's first step what reads have seen, and the metric when the queries
// it stands for have doubled.
template <typename T, int D>
__global__ void __launch_bounds__(256) refresh_kernel(Groups g, int step) {
  extern __shared__ double moment[];  // [D, D]
  __shared__ float2 turns[kMostPairs];
  __shared__ float key[D];
  __shared__ double square;
  const int head = blockIdx.x;
  if (step == 0) {
    if (head == 0) {
      const int64_t held = g.counters->held;
      for (int frame = threadIdx.x; frame < g.chunk_frames; frame += blockDim.x) {
        const int64_t index = held + frame - g.frames.sink;
        if (index >= 0) g.ring_frames[index % g.frames.ring] = first_frame(g) + frame;
      }
    }
    if (g.takes_reads) take_reads<D>(g, head);
  }
  const Retiring old = retiring(g, step);
  if (!old.is_due || (old.index & (old.index + 1)) != 0) return;
  float* map = g.maps + static_cast<int64_t>(head) * D * D;
  if (g.rule == MergeRule::kNats) {
    const int64_t queries = g.num_queries[head];
    for (int i = threadIdx.x; i < D * D; i += blockDim.x) {
      const int row = i / D, column = i % D;
      const double mean = queries == 0 ? (row == column ? 1.0 : 0.0)
                                       : g.moments[static_cast<int64_t>(head) * D * D + i] /
                                             static_cast<double>(queries);
      moment[i] = column <= row ? mean : 0.0;
    }
    __syncthreads();
    cholesky<D>(moment);
    const double scale = 1.0 / sqrt(static_cast<double>(D));
    for (int i = threadIdx.x; i < D * D; i += blockDim.x)
      map[i] = static_cast<float>(moment[i] * scale);
  }
  set_turns(g, old.frame, turns);
  __syncthreads();
  // The centre: the mean of the mapped keys of the frame.
  constexpr int kPerChunk = Page<T>::kPerChunk;
  float centre = 0;
  for (int token = 0; token < g.frames.tokens; ++token) {
    const Page<T> page =
        Page<T>::of(g.layout, g.layout.history(head, old.page + token / kPageKeys));
    for (int chunk = threadIdx.x; chunk < D / kPerChunk; chunk += blockDim.x) {
      float x[kPerChunk];
      unpack<T>(page.key_chunk(token % kPageKeys, chunk), x);
      turn<kPerChunk>(x, chunk * kPerChunk, g.pairs, turns, -1);
      for (int i = 0; i < kPerChunk; ++i) key[chunk * kPerChunk + i] = x[i];
    }
    __syncthreads();
    if (threadIdx.x == 0 && g.rule == MergeRule::kPaper) {
      square = 0;
      for (int i = 0; i < D; ++i) square += double{key[i]} * double{key[i]};
    }
    __syncthreads();
    if (threadIdx.x < D) {
      float mapped = 0;
      if (g.rule == MergeRule::kPaper) {
        mapped = key[threadIdx.x] * static_cast<float>(square > 0 ? 1.0 / sqrt(square) : 0.0);
      } else {
        for (int i = 0; i < D; ++i) mapped = fmaf(key[i], map[i * D + threadIdx.x], mapped);
      }
      centre += mapped / static_cast<float>(g.frames.tokens);
    }
    __syncthreads();
  }
  if (threadIdx.x < D) g.centres[head * D + threadIdx.x] = centre;
}

// keys [kRows, D] in shared memory -> mapped [kRows, D] there.
template <int D>
__device__ void map_rows(const Groups& g, int head, const float (*keys)[D], float (*mapped)[D]) {
  constexpr int kGroups = 256 / D, kOwn = kRows / kGroups;
  const int column = threadIdx.x % D, first = threadIdx.x / D * kOwn;
  const float centre = g.centres[head * D + column];
  if (g.rule == MergeRule::kPaper) {
    for (int row = first; row < first + kOwn; ++row) {
      double square = 0;
      for (int i = 0; i < D; ++i) square += double{keys[row][i]} * double{keys[row][i]};
      const auto inverse = static_cast<float>(square > 0 ? 1.0 / sqrt(square) : 0.0);
      mapped[row][column] = keys[row][column] * inverse - centre;
    }
    return;
  }
  const float* map = g.maps + static_cast<int64_t>(head) * D * D + column;
  float sums[kOwn] = {};
  for (int i = 0; i < D; i += 4) {
    float by[4];
#pragma unroll
    for (int n = 0; n < 4; ++n) by[n] = map[(i + n) * D];
#pragma unroll
    for (int row = 0; row < kOwn; ++row) {
      const float4 x = *reinterpret_cast<const float4*>(&keys[first + row][i]);
      sums[row] = fmaf(x.x, by[0], sums[row]);
      sums[row] = fmaf(x.y, by[1], sums[row]);
      sums[row] = fmaf(x.z, by[2], sums[row]);
      sums[row] = fmaf(x.w, by[3], sums[row]);
    }
  }
#pragma unroll
  for (int row = 0; row < kOwn; ++row) mapped[first + row][column] = sums[row] - centre;
}

// Grid: blocks of kRows keys, then blocks that share the groups when the metric is new; heads.
template <typename T, int D>
__global__ void __launch_bounds__(256)
    map_kernel(Groups g, int step, int key_blocks, bool only_groups) {
  __shared__ alignas(16) float keys[kRows][D];
  __shared__ float mapped[kRows][D];
  __shared__ float2 turns[kMostPairs];
  const int head = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int code_bytes = Groups::code_bytes_of(g.ann, D);
  const int tokens = g.frames.tokens;
  if (static_cast<int>(blockIdx.x) >= key_blocks) {
    if (!only_groups) {
      const Retiring old = retiring(g, step);
      if (!old.is_due || (old.index & (old.index + 1)) != 0) return;
    }
    const int size = g.sizes[head], stride = (gridDim.x - key_blocks) * kRows;
    for (int begin = (blockIdx.x - key_blocks) * kRows; begin < size; begin += stride) {
      const int count = min(kRows, size - begin);
      __syncthreads();
      for (int i = threadIdx.x; i < kRows * D; i += 256) {
        const int64_t row = row_of(g, head, begin + min(i / D, count - 1));
        keys[i / D][i % D] = g.keys[row * D + i % D];
      }
      __syncthreads();
      map_rows<D>(g, head, keys, mapped);
      __syncthreads();
      for (int i = warp; i < count; i += 8) {
        const int64_t row = row_of(g, head, begin + i);
        for (int d = lane; d < D; d += 32) g.mapped[row * D + d] = mapped[i][d];
        write_code<D>(g, mapped[i], g.codes + row * code_bytes, g.scales + row, g.squares + row);
      }
    }
    return;
  }
  const Retiring old = retiring(g, step);
  if (!old.is_due) return;
  set_turns(g, old.frame, turns);
  __syncthreads();
  constexpr int kPerChunk = Page<T>::kPerChunk;
  const int begin = blockIdx.x * kRows, count = min(kRows, tokens - begin);
  for (int i = threadIdx.x; i < kRows * (D / kPerChunk); i += 256) {
    const int row = i / (D / kPerChunk), chunk = i % (D / kPerChunk);
    const int token = begin + min(row, count - 1);
    const Page<T> page =
        Page<T>::of(g.layout, g.layout.history(head, old.page + token / kPageKeys));
    float x[kPerChunk];
    unpack<T>(page.key_chunk(token % kPageKeys, chunk), x);
    turn<kPerChunk>(x, chunk * kPerChunk, g.pairs, turns, -1);
    for (int n = 0; n < kPerChunk; ++n) keys[row][chunk * kPerChunk + n] = x[n];
  }
  __syncthreads();
  map_rows<D>(g, head, keys, mapped);
  __syncthreads();
  for (int i = warp; i < count; i += 8) {
    const int64_t row = static_cast<int64_t>(head) * tokens + begin + i;
    for (int d = lane; d < D; d += 32) {
      g.new_keys[row * D + d] = keys[i][d];
      g.new_mapped[row * D + d] = mapped[i][d];
    }
    write_code<D>(g, mapped[i], g.new_codes + row * code_bytes, g.new_scales + row,
                  g.new_squares + row);
  }
}

int group_blocks(const Groups& groups) {
  constexpr int kMost = 16;  // of a head: seldom at work
  return std::min(kMost, groups.most_pages * (kPageKeys / kRows));
}

}  // namespace

void observe_queries(const Groups& groups, const void* q, int64_t tokens, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(groups.layout.num_heads),
                  static_cast<unsigned>(groups.layout.head_dim / 32));
  for_pages(groups.layout, [&]<typename T, int D>() {
    observe_kernel<T, D>
        <<<grid, 256, 0, stream>>>(groups, static_cast<const T*>(q), static_cast<int>(tokens));
  });
  check(cudaGetLastError(), "observing queries");
}

void observe_reads(const Groups& groups, const void* q, int64_t tokens, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(groups.layout.num_heads),
                  static_cast<unsigned>(groups.chunk_frames));
  for_pages(groups.layout, [&]<typename T, int D>() {
    observe_reads_kernel<T, D><<<grid, 8 * D, 0, stream>>>(
        groups, static_cast<const T*>(q), static_cast<int>(tokens / groups.chunk_frames));
  });
  check(cudaGetLastError(), "observing reads");
}

void refresh_metric(const Groups& groups, int step, cudaStream_t stream) {
  for_pages(groups.layout, [&]<typename T, int D>() {
    constexpr int kBytes = D * D * static_cast<int>(sizeof(double));
    check(cudaFuncSetAttribute(refresh_kernel<T, D>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               kBytes),
          "metric");
    refresh_kernel<T, D>
        <<<static_cast<unsigned>(groups.layout.num_heads), 256, kBytes, stream>>>(groups, step);
  });
  check(cudaGetLastError(), "metric");
}

void map_keys(const Groups& groups, int step, cudaStream_t stream) {
  const int key_blocks = (groups.frames.tokens + kRows - 1) / kRows;
  const dim3 grid(static_cast<unsigned>(key_blocks + group_blocks(groups)),
                  static_cast<unsigned>(groups.layout.num_heads));
  for_pages(groups.layout, [&]<typename T, int D>() {
    map_kernel<T, D><<<grid, 256, 0, stream>>>(groups, step, key_blocks, false);
  });
  check(cudaGetLastError(), "mapping keys");
}

void remap_groups(const Groups& groups, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(group_blocks(groups)),
                  static_cast<unsigned>(groups.layout.num_heads));
  for_pages(groups.layout, [&]<typename T, int D>() {
    map_kernel<T, D><<<grid, 256, 0, stream>>>(groups, 0, 0, true);
  });
  check(cudaGetLastError(), "mapping groups");
}

}  // namespace longtake::cuda
