// The metric of merging: queries are looked at, keys and groups are mapped. tempcache_metric.h says
// what it is.
#include <algorithm>
#include <cmath>

#include "kv/device_groups.cuh"

namespace longtake::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 32;  // keys that a block maps at a time
constexpr float kReadWeight = 0.125F;

// The turns of one frame into shared memory [pairs], by all threads.
__device__ void set_turns(const Groups& g, int64_t frame, float2* turns) {
  for (int i = threadIdx.x; i < g.pairs; i += blockDim.x) turns[i] = turn_of(g, i, frame);
}

// The commit's sampled queries, without their temporal rotation, join the moment of the head. rows:
// [kMostSampledQueries, D] in shared memory.
template <typename T, int D>
__device__ void take_queries(const Groups& g, int head, float* rows) {
  const int heads = g.layout.num_heads, stride = sampled_stride(g.asked_tokens);
  const int count = (g.asked_tokens + stride - 1) / stride;
  const auto* q = static_cast<const T*>(g.asked);
  const int64_t first = first_frame(g);
  for (int i = threadIdx.x; i < count * (D / 2); i += kThreads) {
    const int row = i / (D / 2), pair = i % (D / 2);
    const int token = min(row * stride + row / 4 % stride, g.asked_tokens - 1);
    const T* from = q + (static_cast<int64_t>(row) * heads + head) * D + 2 * pair;
    float x[2] = {static_cast<float>(from[0]), static_cast<float>(from[1])};
    if (pair < g.pairs) {
      const float2 by = turn_of(g, pair, first + token / g.frames.tokens);
      turn<2>(x, 0, 1, &by, -1);
    }
    rows[row * D + 2 * pair] = x[0];
    rows[row * D + 2 * pair + 1] = x[1];
  }
  __syncthreads();
  if (g.rule == MergeRule::kNats) {
    // Each thread a square of the moment.
    constexpr int kSide = D / 16;
    static_assert(kThreads == 256);
    const int a = threadIdx.x / 16 * kSide, b = threadIdx.x % 16 * kSide;
    float sums[kSide][kSide] = {};
    for (int row = 0; row < count; ++row) {
      alignas(16) float x[kSide], y[kSide];
#pragma unroll
      for (int i = 0; i < kSide; i += 4) {
        *reinterpret_cast<float4*>(x + i) = *reinterpret_cast<float4*>(rows + row * D + a + i);
        *reinterpret_cast<float4*>(y + i) = *reinterpret_cast<float4*>(rows + row * D + b + i);
      }
#pragma unroll
      for (int i = 0; i < kSide; ++i) {
#pragma unroll
        for (int j = 0; j < kSide; ++j) sums[i][j] = fmaf(x[i], y[j], sums[i][j]);
      }
    }
    double* moment = g.moments + static_cast<int64_t>(head) * D * D;
#pragma unroll
    for (int i = 0; i < kSide; ++i) {
#pragma unroll
      for (int j = 0; j < kSide; j += 2) {
        auto& two = *reinterpret_cast<double2*>(moment + (a + i) * D + b + j);
        double2 sum = two;
        sum.x += static_cast<double>(sums[i][j]);
        sum.y += static_cast<double>(sums[i][j + 1]);
        two = sum;
      }
    }
  }
  if (threadIdx.x == 0) g.num_queries[head] += count;
  for (int row = threadIdx.x; row < count && g.most_error != 0; row += kThreads) {
    float square = 0;
    for (int i = 0; i < D; ++i) square = fmaf(rows[row * D + i], rows[row * D + i], square);
    atomicMax(g.longest_query, __float_as_int(sqrtf(square)));
  }
  __syncthreads();
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

// Lower triangle L of the mean moment, a = L L^T, in place in shared memory; by all threads, of
// which each has a row.
template <int D>
__device__ void cholesky(double* a) {
  static_assert(D <= kThreads);
  __shared__ double pivot;
  for (int j = 0; j < D; ++j) {
    // Column j: what the columns before it leave.
    const int i = j + static_cast<int>(threadIdx.x);
    double rest = i < D ? a[i * D + j] : 0.0;
    if (i < D)
      for (int k = 0; k < j; ++k) rest -= a[i * D + k] * a[j * D + k];
    if (i == j) pivot = sqrt(fmax(rest, 0.0));
    __syncthreads();
    if (i < D) a[i * D + j] = i == j ? pivot : pivot > 0 ? rest / pivot : 0.0;
    __syncthreads();
  }
}

// Grid: heads, layers. At the chunk's first step what reads and the commit's queries have seen, and
// the metric when the queries it stands for have doubled.
template <typename T, int D>
__global__ void __launch_bounds__(kThreads)
    begin_kernel(const Groups* __restrict__ layers, int step) {
  extern __shared__ double moment[];  // [D, D]
  __shared__ float2 turns[kMostPairs];
  __shared__ float key[D];
  __shared__ double square;
  const Groups& g = layers[blockIdx.y];
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
    if (g.asked_tokens > 0) take_queries<T, D>(g, head, reinterpret_cast<float*>(moment));
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

// What a block of map_kernel keeps in shared memory: two of them fit a multiprocessor.
template <int D>
struct MapRoom {
  float keys[kRows][D];
  float mapped[kRows][D];
  float matrix[D * D];  // the map, then the directions
  float2 turns[kMostPairs];
};

// keys -> mapped, by all threads.
template <int D>
__device__ void map_rows(const Groups& g, int head, MapRoom<D>& room) {
  constexpr int kOwn = kRows / (kThreads / D);
  const int column = threadIdx.x % D, first = threadIdx.x / D * kOwn;
  const float centre = g.centres[head * D + column];
  if (g.rule == MergeRule::kPaper) {
    for (int row = first; row < first + kOwn; ++row) {
      const float* key = room.keys[row];
      double square = 0;
      for (int i = 0; i < D; ++i) square += double{key[i]} * double{key[i]};
      const auto inverse = static_cast<float>(square > 0 ? 1.0 / sqrt(square) : 0.0);
      room.mapped[row][column] = key[column] * inverse - centre;
    }
    return;
  }
  float sums[kOwn] = {};
  // The map is a lower triangle: what a warp's columns leave out is 0.
  for (int i = column / 32 * 32; i < D; i += 4) {
    float by[4];
#pragma unroll
    for (int n = 0; n < 4; ++n) by[n] = room.matrix[(i + n) * D + column];
#pragma unroll
    for (int row = 0; row < kOwn; ++row) {
      const float4 x = *reinterpret_cast<const float4*>(&room.keys[first + row][i]);
      sums[row] = fmaf(x.x, by[0], sums[row]);
      sums[row] = fmaf(x.y, by[1], sums[row]);
      sums[row] = fmaf(x.z, by[2], sums[row]);
      sums[row] = fmaf(x.w, by[3], sums[row]);
    }
  }
#pragma unroll
  for (int row = 0; row < kOwn; ++row) room.mapped[first + row][column] = sums[row] - centre;
}

template <int D>
__device__ void load_map(const Groups& g, int head, MapRoom<D>& room) {
  if (g.rule == MergeRule::kPaper) return;
  const auto* from = reinterpret_cast<const float4*>(g.maps + static_cast<int64_t>(head) * D * D);
#pragma unroll
  for (int i = 0; i < D * D / 4; i += kThreads)
    reinterpret_cast<float4*>(room.matrix)[i + threadIdx.x] = from[i + threadIdx.x];
}

// Keys and map, which are there, become mapped keys and their codes; write_codes() says what wants
// and to are. The map is gone then.
template <int D, typename Wants, typename To>
__device__ void map_and_code(const Groups& g, int head, MapRoom<D>& room, const Wants& wants,
                             const To& to) {
  // Directions are under way while keys are mapped.
  constexpr int kOwn = D * kSigns / 4 / kThreads;
  static_assert(kOwn * kThreads * 4 == D * kSigns);
  const bool signs = g.ann == AnnEngine::kLsh;
  float4 directions[kOwn] = {};
#pragma unroll
  for (int i = 0; i < kOwn && signs; ++i)
    directions[i] = reinterpret_cast<const float4*>(g.directions)[i * kThreads + threadIdx.x];
  map_rows<D>(g, head, room);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kOwn && signs; ++i)
    reinterpret_cast<float4*>(room.matrix)[i * kThreads + threadIdx.x] = directions[i];
  __syncthreads();
  write_codes<D, kRows, kThreads>(g, room.mapped, room.matrix, wants, to);
}

// `count` mapped rows to rows to(i) of `out`.
template <typename T, int D, typename To>
__device__ void store_rows(const float (&rows)[kRows][D], int count, void* out, const To& to) {
  for (int i = threadIdx.x; i < count * D / 4; i += kThreads) {
    const int row = i / (D / 4), d = i % (D / 4) * 4;
    store_mapped<T>(out, to(row) * D + d, *reinterpret_cast<const float4*>(&rows[row][d]));
  }
}

// Groups at rows row_at(i), up to kRows, are mapped and coded by their keys; the map is there.
template <typename T, int D, typename RowAt>
__device__ void map_groups_at(const Groups& g, int head, int count, const RowAt& row_at,
                              MapRoom<D>& room) {
  for (int i = threadIdx.x; i < kRows * D / 4; i += kThreads) {
    const int row = i / (D / 4), d = i % (D / 4) * 4;
    *reinterpret_cast<float4*>(&room.keys[row][d]) =
        load_vector<T>(g.keys, row_at(min(row, count - 1)) * D + d);
  }
  __syncthreads();
  map_and_code<D>(
      g, head, room, [&](int i) { return i < count; },
      [&](int i) { return code_of_group(g, row_at(i)); });
  store_rows<T>(room.mapped, count, g.mapped, row_at);
}

// All groups anew, by blocks that share them.
template <typename T, int D>
__device__ void map_groups(const Groups& g, int head, int block, int blocks, MapRoom<D>& room) {
  const int size = g.sizes[head];
  for (int begin = block * kRows; begin < size; begin += blocks * kRows) {
    __syncthreads();
    load_map<D>(g, head, room);
    map_groups_at<T, D>(
        g, head, min(kRows, size - begin), [&](int i) { return row_of(g, head, begin + i); }, room);
  }
}

// Grid: blocks of kRows keys, then blocks that share the groups when the metric is new; heads;
// layers.
template <typename T, int D>
__global__ void __launch_bounds__(kThreads, 2)
    map_kernel(const Groups* __restrict__ layers, int step, int key_blocks, bool only_groups) {
  extern __shared__ uint4 memory[];
  auto& room = *reinterpret_cast<MapRoom<D>*>(memory);
  const Groups& g = layers[blockIdx.z];
  const int head = blockIdx.y, block = blockIdx.x, tokens = g.frames.tokens;
  const Retiring old = retiring(g, step);
  if (block >= key_blocks) {
    if (only_groups || (old.is_due && (old.index & (old.index + 1)) == 0))
      map_groups<T, D>(g, head, block - key_blocks, gridDim.x - key_blocks, room);
    return;
  }
  if (!old.is_due) return;
  load_map<D>(g, head, room);
  set_turns(g, old.frame, room.turns);
  __syncthreads();
  constexpr int kPerChunk = Page<T>::kPerChunk;
  const int begin = block * kRows, count = min(kRows, tokens - begin);
  for (int i = threadIdx.x; i < kRows * (D / kPerChunk); i += kThreads) {
    const int row = i / (D / kPerChunk), chunk = i % (D / kPerChunk);
    const int token = begin + min(row, count - 1);
    const Page<T> page =
        Page<T>::of(g.layout, g.layout.history(head, old.page + token / kPageKeys));
    float x[kPerChunk];
    unpack<T>(page.key_chunk(token % kPageKeys, chunk), x);
    turn<kPerChunk>(x, chunk * kPerChunk, g.pairs, room.turns, -1);
    for (int n = 0; n < kPerChunk; ++n) room.keys[row][chunk * kPerChunk + n] = x[n];
  }
  __syncthreads();
  const int64_t first = static_cast<int64_t>(head) * tokens + begin;
  map_and_code<D>(
      g, head, room, [&](int i) { return i < count; },
      [&](int i) { return code_of_key(g, first + i); });
  for (int i = threadIdx.x; i < count * D; i += kThreads)
    g.new_keys[first * D + i] = room.keys[i / D][i % D];
  store_rows<T>(room.mapped, count, g.new_mapped, [&](int i) { return first + i; });
}

// MergeRule::kPaper, whose map is not linear: what groups at `rows` are mapped to becomes the mean
// with what keys joined them.
template <typename T, int D>
__device__ void average_mapped(const Groups& g, const int64_t* rows, const int64_t* keys, int count,
                               MapRoom<D>& room) {
  load_directions<D, kThreads>(g, room.matrix);
  for (int i = threadIdx.x; i < count * D / 4; i += kThreads) {
    const int row = i / (D / 4), d = i % (D / 4) * 4;
    const float share = 1.0F / static_cast<float>(g.counts[rows[row]]);
    const float4 own = load_mapped<T>(g.mapped, rows[row] * D + d);
    const float4 joining = load_mapped<T>(g.new_mapped, keys[row] * D + d);
    *reinterpret_cast<float4*>(&room.mapped[row][d]) = {
        own.x + share * (joining.x - own.x), own.y + share * (joining.y - own.y),
        own.z + share * (joining.z - own.z), own.w + share * (joining.w - own.w)};
  }
  __syncthreads();
  write_codes<D, kRows, kThreads>(
      g, room.mapped, room.matrix, [&](int i) { return i < count; },
      [&](int i) { return code_of_group(g, rows[i]); });
  store_rows<T>(room.mapped, count, g.mapped, [&](int i) { return rows[i]; });
}

// Grid: blocks of kRows keys that joined groups; heads; layers. By the rule of nats what groups are
// mapped to follows from their keys alone: it is the same for a cache that was saved and loaded.
template <typename T, int D>
__global__ void __launch_bounds__(kThreads, 2)
    map_joined_kernel(const Groups* __restrict__ layers, int step) {
  extern __shared__ uint4 memory[];
  auto& room = *reinterpret_cast<MapRoom<D>*>(memory);
  __shared__ int64_t rows[kRows], keys[kRows];
  const Groups& g = layers[blockIdx.z];
  if (!retiring(g, step).is_due) return;
  const int head = blockIdx.y, tokens = g.frames.tokens, begin = blockIdx.x * kRows;
  const int count = min(kRows, tokens - g.num_new[head] - begin);
  if (count <= 0) return;
  const int64_t first = static_cast<int64_t>(head) * tokens;
  load_map<D>(g, head, room);
  if (static_cast<int>(threadIdx.x) < count) {
    const int64_t key = first + g.order[first + tokens - 1 - begin - static_cast<int>(threadIdx.x)];
    keys[threadIdx.x] = key;
    rows[threadIdx.x] = row_of(g, head, g.joins[key]);
  }
  __syncthreads();
  if (g.rule == MergeRule::kPaper && g.key == GroupKey::kMean)
    return average_mapped<T, D>(g, rows, keys, count, room);
  map_groups_at<T, D>(
      g, head, count, [&](int i) { return rows[i]; }, room);
}

// Of a head: seldom at work.
int group_blocks(const GroupBatch& batch) {
  constexpr int kMost = 16;
  int most = 0;
  for (int i = 0; i < batch.count; ++i)
    most = std::max(most, batch.host[i].most_pages * (kPageKeys / kRows));
  return std::min(kMost, most);
}

void launch_map(const GroupBatch& batch, int step, int key_blocks, bool only_groups,
                cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(key_blocks + group_blocks(batch)),
                  static_cast<unsigned>(batch.host->layout.num_heads),
                  static_cast<unsigned>(batch.count));
  for_pages(batch, [&]<typename T, int D>() {
    constexpr int kBytes = static_cast<int>(sizeof(MapRoom<D>));
    check(
        cudaFuncSetAttribute(map_kernel<T, D>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
        "mapping keys");
    map_kernel<T, D>
        <<<grid, kThreads, kBytes, stream>>>(batch.layers, step, key_blocks, only_groups);
  });
  check(cudaGetLastError(), "mapping keys");
}

}  // namespace

void begin_merge(const GroupBatch& batch, int step, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(batch.host->layout.num_heads),
                  static_cast<unsigned>(batch.count));
  for_pages(batch, [&]<typename T, int D>() {
    constexpr int kBytes = D * D * static_cast<int>(sizeof(double));
    check(cudaFuncSetAttribute(begin_kernel<T, D>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               kBytes),
          "metric");
    begin_kernel<T, D><<<grid, kThreads, kBytes, stream>>>(batch.layers, step);
  });
  check(cudaGetLastError(), "metric");
}

void map_keys(const GroupBatch& batch, int step, cudaStream_t stream) {
  launch_map(batch, step, (batch.host->frames.tokens + kRows - 1) / kRows, false, stream);
}

void map_joined(const GroupBatch& batch, int step, cudaStream_t stream) {
  const int tokens = batch.host->frames.tokens;
  const dim3 grid(static_cast<unsigned>((tokens + kRows - 1) / kRows),
                  static_cast<unsigned>(batch.host->layout.num_heads),
                  static_cast<unsigned>(batch.count));
  for_pages(batch, [&]<typename T, int D>() {
    constexpr int kBytes = static_cast<int>(sizeof(MapRoom<D>));
    check(cudaFuncSetAttribute(map_joined_kernel<T, D>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               kBytes),
          "mapping groups");
    map_joined_kernel<T, D><<<grid, kThreads, kBytes, stream>>>(batch.layers, step);
  });
  check(cudaGetLastError(), "mapping groups");
}

void remap_groups(const GroupBatch& batch, cudaStream_t stream) {
  launch_map(batch, 0, 0, true, stream);
}

}  // namespace longtake::cuda
