// What attention sees of groups: biases, and pages written from the masters where these changed.
#include <algorithm>
#include <cmath>

#include "kv/device_groups.cuh"
#include "kv/device_weight.h"

namespace longtake::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kMostFrames = 32;  // of a chunk

// What the logit of a group's key for a query is at one age beyond that at another; query in shared
// memory.
template <typename T, int D>
__device__ float logit_beyond(const Groups& g, int age, int other_age, const float* query,
                              int64_t row) {
  const float* phase = g.phases + static_cast<int64_t>(age) * 2 * g.pairs;
  const float* other = g.phases + static_cast<int64_t>(other_age) * 2 * g.pairs;
  float sum = 0;
  for (int i = 0; i < g.pairs; ++i) {
    const float q0 = query[2 * i], q1 = query[2 * i + 1];
    const float2 k = load_pair<T>(g.keys, row * D + 2 * i);
    sum = fmaf(phase[i] - other[i], q0 * k.x + q1 * k.y, sum);
    sum = fmaf(phase[g.pairs + i] - other[g.pairs + i], q0 * k.y - q1 * k.x, sum);
  }
  return sum;
}

// Of one head, what its pages need to know.
struct Shown {
  float query[2 * kMostPairs];
  float2 turns[kMostFrames][kMostPairs];
  int64_t frames[kMostFrames];  // that left the exact ones; -1: none did
};

// A page of groups [begin, begin + kPageKeys). Eight threads a group while biases are found, then
// 16 bytes a thread.
template <typename T, int D>
__device__ void show_page(const Groups& g, int head, int begin, bool by_ages, const Shown& shown) {
  __shared__ float weights[kPageKeys];
  __shared__ uint8_t stale[kPageKeys], changed[kPageKeys];
  const int count = min(kPageKeys, g.sizes[head] - begin);
  const int64_t first = row_of(g, head, begin);
  const Page<T> page = Page<T>::of(g.layout, g.pool + static_cast<int>(first / kPageKeys));
  const int64_t now = first_frame(g) + g.chunk_frames;
  const auto age_of = [&](int frame) {
    return static_cast<int>(min(max(now - frame, int64_t{0}), int64_t{kMostAges - 1}));
  };
#pragma unroll 2
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
          const int middle = seen.first + (seen.last - seen.first) / 2;
          const float more =
              logit_beyond<T, D>(g, age_of(middle), age_of(g.newest[row]), shown.query, row);
          sum = static_cast<float>(seen.count) * expf(fminf(more, kMostNats));
        }
      }
    } else if (members > 1) {
      sum = sighting == 0 ? 1 : 0;
    }
    for (int step = 1; step < kSeen; step *= 2) sum += __shfl_xor_sync(~0U, sum, step);
    if (sighting != 0) continue;
    if (members > 1) sum = weight_of(logf(sum));
    const bool is_stale = slot < count && g.stale[row] != 0;
    weights[slot] = slot < count ? sum : 0;
    stale[slot] = is_stale ? 1 : 0;
    changed[slot] = is_stale || (slot < count && page.weights()[slot] != sum) ? 1 : 0;
  }
  __syncthreads();
  constexpr int kPerChunk = Page<T>::kPerChunk, kChunks = D / kPerChunk;
#pragma unroll 2
  for (int i = threadIdx.x; i < count * kChunks; i += kThreads) {
    const int slot = i / kChunks, chunk = i % kChunks;
    if (!changed[slot]) continue;
    const int64_t at = (first + slot) * D + chunk * kPerChunk;
    alignas(16) float x[kPerChunk];
#pragma unroll
    for (int n = 0; n < kPerChunk; n += 4)
      *reinterpret_cast<float4*>(x + n) = load_vector<T>(g.values, at + n);
    // Rounded as the CPU keeps it, then weighted.
    const uint4 plain = pack<T>(x);
    unpack<T>(plain, x);
    for (float& value : x) value *= weights[slot];
    page.value_chunk(slot, chunk) = pack<T>(x);
    if (!stale[slot]) continue;
#pragma unroll
    for (int n = 0; n < kPerChunk; n += 4)
      *reinterpret_cast<float4*>(x + n) = load_vector<T>(g.keys, at + n);
    int frame = 0;  // the group's newest member left the exact frames in this commit
    while (frame + 1 < g.chunk_frames && shown.frames[frame] != g.newest[first + slot]) ++frame;
    turn<kPerChunk>(x, chunk * kPerChunk, g.pairs, shown.turns[frame], 1);
    page.key_chunk(slot, chunk) = pack<T>(x);
  }
  __syncthreads();
  // Unused slots repeat the last key, as those of other pages do.
  for (int i = threadIdx.x; i < (kPageKeys - count) * kChunks; i += kThreads) {
    const int slot = count + i / kChunks, chunk = i % kChunks;
    page.key_chunk(slot, chunk) = page.key_chunk(count - 1, chunk);
    page.value_chunk(slot, chunk) = uint4{};
  }
  for (int slot = threadIdx.x; slot < kPageKeys; slot += kThreads) {
    if (slot >= count || changed[slot]) page.weights()[slot] = weights[slot];
    if (slot < count && stale[slot]) g.stale[first + slot] = 0;
  }
}

// Grid: blocks that take pages by turns, heads, layers.
template <typename T, int D>
__global__ void __launch_bounds__(kThreads, 2) show_kernel(const Groups* __restrict__ layers) {
  __shared__ Shown shown;
  const Groups& g = layers[blockIdx.z];
  const int head = blockIdx.y, blocks = gridDim.x;
  const int pages = (g.sizes[head] + kPageKeys - 1) / kPageKeys;
  if (g.shown) {
    for (int page = blockIdx.x * kThreads + threadIdx.x; page < g.most_pages;
         page += blocks * kThreads) {
      const int own = head * g.most_pages + page;
      g.shown[own] = page < pages ? g.pool + g.pages[own] : -1;
    }
  }
  if (static_cast<int>(blockIdx.x) >= pages) return;
  const bool by_ages = g.bias == GroupBias::kAges && g.num_chunks_read[head] > 0;
  if (by_ages) {
    const float scale = 1.0F / sqrtf(static_cast<float>(D));
    for (int i = threadIdx.x; i < 2 * g.pairs; i += kThreads)
      shown.query[i] = scale * g.readers[head * D + i];
  }
  for (int i = threadIdx.x; i < g.chunk_frames * max(1, g.pairs); i += kThreads) {
    const int frame = i / max(1, g.pairs), pair = i % max(1, g.pairs);
    const Retiring old = retiring(g, frame);
    if (pair == 0) shown.frames[frame] = old.is_due ? old.frame : -1;
    if (old.is_due && pair < g.pairs) shown.turns[frame][pair] = turn_of(g, pair, old.frame);
  }
  __syncthreads();
  for (int page = blockIdx.x; page < pages; page += blocks) {
    show_page<T, D>(g, head, page * kPageKeys, by_ages, shown);
    __syncthreads();
  }
}

}  // namespace

void show_groups(const GroupBatch& batch, cudaStream_t stream) {
  constexpr int kMostBlocks = 4096;  // about, of all heads and layers: more wait for others
  int most_pages = 0;
  for (int i = 0; i < batch.count; ++i) {
    const Groups& g = batch.host[i];
    LONGTAKE_CHECK(g.chunk_frames <= kMostFrames, g.chunk_frames);
    most_pages = std::max(most_pages, g.most_pages);
  }
  if (most_pages == 0) return;
  const int heads = batch.host->layout.num_heads;
  const dim3 grid(
      static_cast<unsigned>(std::clamp(kMostBlocks / (heads * batch.count), 1, most_pages)),
      static_cast<unsigned>(heads), static_cast<unsigned>(batch.count));
  for_pages(batch, [&]<typename T, int D>() {
    show_kernel<T, D><<<grid, kThreads, 0, stream>>>(batch.layers);
  });
  check(cudaGetLastError(), "showing groups");
}

}  // namespace longtake::cuda
