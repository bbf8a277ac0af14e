// What attention sees of groups: biases, and pages written from the masters where these changed.
#include <cmath>

#include "kv/device_groups.cuh"

namespace longtake::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMostFrames = 32;  // of a chunk

// The logit of a key at an age, from the terms of a query and the key.
__device__ float logit_at(const Groups& g, int age, const float* query, const float* key) {
  const float* phase = g.phases + static_cast<int64_t>(age) * 2 * g.pairs;
  float sum = 0;
  for (int i = 0; i < g.pairs; ++i) {
    const float q0 = query[2 * i], q1 = query[2 * i + 1];
    const float2 k = *reinterpret_cast<const float2*>(key + 2 * i);
    sum = fmaf(phase[i], q0 * k.x + q1 * k.y, sum);
    sum = fmaf(phase[g.pairs + i], q0 * k.y - q1 * k.x, sum);
  }
  return sum;
}

// Grid: pages, heads. Eight threads a group while biases are found, then 16 bytes a thread.
template <typename T, int D>
__global__ void __launch_bounds__(kThreads) show_kernel(Groups g) {
  __shared__ float weights[kPageKeys];
  __shared__ uint8_t stale[kPageKeys], changed[kPageKeys];
  __shared__ float query[2 * kMostPairs];
  __shared__ float2 turns[kMostFrames][kMostPairs];
  __shared__ int64_t frames[kMostFrames];
  const int head = blockIdx.y, size = g.sizes[head];
  const int begin = blockIdx.x * kPageKeys;
  if (begin >= size) {
    if (threadIdx.x == 0 && g.shown) g.shown[head * g.most_pages + blockIdx.x] = -1;
    return;
  }
  const int count = min(kPageKeys, size - begin);
  const int64_t first = row_of(g, head, begin);
  if (threadIdx.x == 0 && g.shown)
    g.shown[head * g.most_pages + blockIdx.x] = g.pool + static_cast<int>(first / kPageKeys);
  const Page<T> page = Page<T>::of(g.layout, g.pool + static_cast<int>(first / kPageKeys));
  const bool by_ages = g.bias == GroupBias::kAges && g.num_chunks_read[head] > 0;
  if (by_ages) {
    const float scale = 1.0F / sqrtf(static_cast<float>(D));
    for (int i = threadIdx.x; i < 2 * g.pairs; i += kThreads)
      query[i] = scale * g.readers[head * D + i];
  }
  for (int i = threadIdx.x; i < g.chunk_frames; i += kThreads) {
    const Retiring old = retiring(g, i);
    frames[i] = old.is_due ? old.frame : -1;
  }
  __syncthreads();
  const int64_t now = first_frame(g) + g.chunk_frames;
  const auto age_of = [&](int frame) {
    return static_cast<int>(min(max(now - frame, int64_t{0}), int64_t{kMostAges - 1}));
  };
  bool any_stale = false;
  for (int i = threadIdx.x; i < kPageKeys * kSeen; i += kThreads) {
    const int slot = i / kSeen, sighting = i % kSeen;
    const int64_t row = first + slot;
    const int members = slot < count ? g.counts[row] : 1;
    float sum = members == 1 && sighting == 0 ? 1 : 0;
    if (members > 1 && g.bias != GroupBias::kNone) {
      if (!by_ages) {
        sum = sighting == 0 ? static_cast<float>(members) : 0;
      } else {
        const Seen seen = g.seen[row * kSeen + sighting];
        if (seen.count > 0) {
          constexpr float kMostNats = 80;
          const float* key = g.keys + row * D;
          const int middle = seen.first + (seen.last - seen.first) / 2;
          const float more = logit_at(g, age_of(middle), query, key) -
                             logit_at(g, age_of(g.newest[row]), query, key);
          sum = static_cast<float>(seen.count) * expf(fminf(more, kMostNats));
        }
      }
    } else if (members > 1) {
      sum = sighting == 0 ? 1 : 0;
    }
    for (int step = 1; step < kSeen; step *= 2) sum += __shfl_xor_sync(~0U, sum, step);
    if (sighting != 0) continue;
    const bool is_stale = slot < count && g.stale[row] != 0;
    weights[slot] = slot < count ? sum : 0;
    stale[slot] = is_stale ? 1 : 0;
    changed[slot] = is_stale || (slot < count && page.weights()[slot] != sum) ? 1 : 0;
    any_stale |= is_stale;
  }
  if (__syncthreads_or(any_stale)) {
    for (int i = threadIdx.x; i < g.chunk_frames * g.pairs; i += kThreads) {
      const int frame = i / g.pairs, pair = i % g.pairs;
      if (frames[frame] >= 0) turns[frame][pair] = turn_of(g, pair, frames[frame]);
    }
  }
  __syncthreads();
  constexpr int kPerChunk = Page<T>::kPerChunk, kChunks = D / kPerChunk;
  for (int i = threadIdx.x; i < count * kChunks; i += kThreads) {
    const int slot = i / kChunks, chunk = i % kChunks;
    if (!changed[slot]) continue;
    const int64_t at = (first + slot) * D + chunk * kPerChunk;
    float x[kPerChunk];
#pragma unroll
    for (int n = 0; n < kPerChunk; ++n) x[n] = g.values[at + n];
    // Rounded as the CPU keeps it, then weighted.
    const uint4 plain = pack<T>(x);
    unpack<T>(plain, x);
    for (float& value : x) value *= weights[slot];
    page.value_chunk(slot, chunk) = pack<T>(x);
    if (!stale[slot]) continue;
#pragma unroll
    for (int n = 0; n < kPerChunk; ++n) x[n] = g.keys[at + n];
    int frame = 0;  // the group's newest member left the exact frames in this commit
    while (frame + 1 < g.chunk_frames && frames[frame] != g.newest[first + slot]) ++frame;
    turn<kPerChunk>(x, chunk * kPerChunk, g.pairs, turns[frame], 1);
    page.key_chunk(slot, chunk) = pack<T>(x);
  }
  __syncthreads();
  // Unused slots repeat the first key.
  for (int i = threadIdx.x; i < (kPageKeys - count) * kChunks; i += kThreads) {
    const int slot = count + i / kChunks, chunk = i % kChunks;
    page.key_chunk(slot, chunk) = page.key_chunk(0, chunk);
    page.value_chunk(slot, chunk) = uint4{};
  }
  for (int slot = threadIdx.x; slot < kPageKeys; slot += kThreads) {
    if (slot >= count || changed[slot]) page.weights()[slot] = weights[slot];
    if (slot < count && stale[slot]) g.stale[first + slot] = 0;
  }
}

}  // namespace

void show_groups(const Groups& groups, cudaStream_t stream) {
  LONGTAKE_CHECK(groups.chunk_frames <= kMostFrames, groups.chunk_frames);
  if (groups.most_pages == 0) return;
  const dim3 grid(static_cast<unsigned>(groups.most_pages),
                  static_cast<unsigned>(groups.layout.num_heads));
  for_pages(groups.layout,
            [&]<typename T, int D>() { show_kernel<T, D><<<grid, kThreads, 0, stream>>>(groups); });
  check(cudaGetLastError(), "showing groups");
}

}  // namespace longtake::cuda
