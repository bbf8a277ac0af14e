// Keys join groups, groups over the budget go, and keys without a partner start groups.
//
// Pairs are taken from the nearest on, each key and each group once, as if all were sorted.
#include <algorithm>
#include <cmath>

#include "kv/block_scan.cuh"
#include "kv/device_groups.cuh"

namespace longtake::cuda {
namespace {

constexpr int kWarps = kScanned / 32;
constexpr int kHeld = 4096;  // groups of a head that shared memory has a word for
using Word = unsigned long long;
constexpr Word kNobody = ~0ULL;

// As KeyGroups::see, by a warp: a sighting at `frame` joins the others, of which two become one if
// they are too many. Lane i holds the i-th, oldest first.
__device__ void see(Seen* seen, int frame) {
  const int lane = threadIdx.x % 32;
  Seen own = lane < kSeen ? seen[lane] : Seen{};
  const auto from = [](const Seen& x, int source) {
    return Seen{__shfl_sync(~0U, x.first, source), __shfl_sync(~0U, x.last, source),
                __shfl_sync(~0U, x.count, source)};
  };
  int used = __popc(__ballot_sync(~0U, own.count > 0));
  const int place = __popc(__ballot_sync(~0U, own.count > 0 && own.last < frame));
  const Seen there = from(own, place);
  if (place < used && there.first <= frame) {
    if (lane == place) ++own.count;
  } else {
    const Seen before = from(own, max(lane - 1, 0));
    if (lane > place && lane <= used) own = before;
    if (lane == place) own = {frame, frame, 1};
    ++used;
  }
  if (used > kSeen) {
    constexpr double kYoung = 4;  // frames; as on the CPU
    const Seen next = from(own, min(lane + 1, 31));
    const int newest = __shfl_sync(~0U, own.last, used - 1);
    const auto middle = [](const Seen& x) { return x.first + (x.last - x.first) / 2; };
    double gap = lane + 1 < used ? (middle(next) - middle(own)) / (newest - middle(next) + kYoung)
                                 : static_cast<double>(INFINITY);
    int least = lane;  // the first of the smallest
    for (int way = 16; way > 0; way /= 2) {
      const double other = __shfl_xor_sync(~0U, gap, way);
      const int other_least = __shfl_xor_sync(~0U, least, way);
      if (other < gap || (other == gap && other_least < least)) {
        gap = other;
        least = other_least;
      }
    }
    if (lane == least) own = {own.first, next.last, own.count + next.count};
    if (lane > least) own = next;
    --used;
  }
  if (lane < kSeen) seen[lane] = lane < used ? own : Seen{};
}

// The place of a group in the order of forgetting: least recently merged, then smallest.
__device__ Word order_of(const Groups& g, int head, int group) {
  const int64_t row = row_of(g, head, group);
  return static_cast<Word>(static_cast<unsigned>(g.newest[row])) << 32 |
         static_cast<unsigned>(g.counts[row]);
}

// For heads [first, first + heads): the order of the `leave`-th group to go, and how many at that
// order go; order(head, group) is what order_of() says. By the whole block, digit by digit; digits
// that all share are known beforehand.
template <typename Order>
__device__ void choose(const Groups& g, int first, int heads, int leave, const Order& order) {
  __shared__ int histogram[256];
  __shared__ Word prefix;
  __shared__ unsigned some[2], all[2];  // bits that are set in some and in all orders, low and high
  __shared__ int left;
  const auto for_groups = [&](const auto& look) {
    for (int head = first; head < first + heads; ++head) {
      for (int group = threadIdx.x; group < g.sizes[head]; group += kScanned)
        look(order(head, group));
    }
  };
  if (threadIdx.x == 0) left = leave;
  if (threadIdx.x < 2) {
    some[threadIdx.x] = 0;
    all[threadIdx.x] = ~0U;
  }
  __syncthreads();
  Word own_some = 0, own_all = ~Word{0};
  for_groups([&](Word x) {
    own_some |= x;
    own_all &= x;
  });
  for (int half = 0; half < 2; ++half) {
    const unsigned any = __reduce_or_sync(~0U, static_cast<unsigned>(own_some >> (32 * half)));
    const unsigned every = __reduce_and_sync(~0U, static_cast<unsigned>(own_all >> (32 * half)));
    if (threadIdx.x % 32 != 0) continue;
    atomicOr(&some[half], any);
    atomicAnd(&all[half], every);
  }
  __syncthreads();
  const Word shared = static_cast<Word>(all[1]) << 32 | all[0];
  const Word differing = (static_cast<Word>(some[1]) << 32 | some[0]) & ~shared;
  if (threadIdx.x == 0) prefix = shared;
  __syncthreads();
  for (int shift = 56; shift >= 0; shift -= 8) {
    if ((differing >> shift & 0xff) == 0) continue;
    for (int i = threadIdx.x; i < 256; i += kScanned) histogram[i] = 0;
    __syncthreads();
    const Word known = shift == 56 ? 0 : prefix >> (shift + 8);
    for_groups([&](Word x) {
      if (shift < 56 && x >> (shift + 8) != known) return;
      atomicAdd(&histogram[x >> shift & 0xff], 1);
    });
    __syncthreads();
    const int own = threadIdx.x < 256 ? histogram[threadIdx.x] : 0, leaving = left;
    const int before = block_scan(own).before;
    if (before < leaving && leaving <= before + own) {
      left = leaving - before;
      prefix = (prefix & ~(Word{0xff} << shift)) | static_cast<Word>(threadIdx.x) << shift;
    }
    __syncthreads();
  }
  // Of those at the cut, the first in the order of heads and groups.
  for (int head = first; head < first + heads; ++head) {
    int ties = 0;
    for (int group = threadIdx.x; group < g.sizes[head]; group += kScanned)
      ties += order(head, group) == prefix ? 1 : 0;
    const int total = block_scan(ties).total;
    if (threadIdx.x == 0) {
      g.cuts[head] = prefix;
      g.cut_ties[head] = min(total, left);
      left -= min(total, left);
    }
    __syncthreads();
  }
}

__device__ void choose_none(const Groups& g, int head) {
  if (threadIdx.x != 0) return;
  g.cuts[head] = 0;
  g.cut_ties[head] = 0;
}

// Every key asks its nearest group, and a group that is asked keeps the nearest key so far: the one
// that it turns away asks its next. Both sides rank a pair by the same distance, so that this ends
// with the pairs of the sorted list, whoever asks first. A thread follows the key that has to ask.
// holds(group): who is kept; asks [T]: what each key asked last, kCandidates: there is no other.
template <typename Holds>
__device__ void match(const Groups& g, int head, volatile uint8_t* asks, const Holds& holds) {
  const int tokens = g.frames.tokens;
  const int64_t first = static_cast<int64_t>(head) * tokens * kCandidates;
  const int32_t* candidates = g.candidates + first;
  const float* distances = g.distances + first;
  for (int own = threadIdx.x; own < tokens; own += kScanned) {
    int token = own, ask = 0;
    while (true) {
      const int at = token * kCandidates + ask;
      const float distance = ask < kCandidates ? distances[at] : INFINITY;
      asks[token] = static_cast<uint8_t>(distance < INFINITY ? ask : kCandidates);
      if (!(distance < INFINITY)) break;
      const Word word =
          static_cast<Word>(__float_as_uint(distance)) << 32 | static_cast<unsigned>(token);
      __threadfence_block();
      const Word kept = atomicMin(holds(candidates[at]), word);
      __threadfence_block();
      if (kept == kNobody) break;
      if (kept > word) {
        token = static_cast<int>(kept & 0xffffffffU);
        ask = asks[token];
      }
      ++ask;
    }
  }
  __syncthreads();
}

// Grid: heads, layers. Dynamic shared memory: [kHeld] words, then a byte a key of the frame.
__global__ void __launch_bounds__(kScanned)
    pair_kernel(const Groups* __restrict__ layers, int step) {
  extern __shared__ Word held[];
  auto* asks = reinterpret_cast<volatile uint8_t*>(held + kHeld);
  const Groups& g = layers[blockIdx.y];
  const Retiring old = retiring(g, step);
  if (!old.is_due) return;
  const int head = blockIdx.x, tokens = g.frames.tokens, size = g.sizes[head];
  const int64_t first = static_cast<int64_t>(head) * tokens;
  const bool fits = size <= kHeld;
  if (fits) {
    for (int group = threadIdx.x; group < size; group += kScanned) held[group] = kNobody;
    __syncthreads();
    match(g, head, asks, [&](int group) { return held + group; });
  } else {
    match(g, head, asks, [&](int group) { return g.claims + row_of(g, head, group); });
  }
  int num_new = 0;
  for (int begin = 0; begin < tokens; begin += kScanned) {
    const int token = begin + static_cast<int>(threadIdx.x);
    const int ask = token < tokens ? asks[token] : 0;
    const bool is_new = token < tokens && ask == kCandidates;
    const Scan scan = block_scan(is_new ? 1 : 0);
    if (token < tokens) {
      const int rank = num_new + scan.before;
      g.order[first + (is_new ? rank : tokens - 1 - (token - rank))] = token;
    }
    num_new += scan.total;
    if (token >= tokens) continue;
    const int group = is_new ? -1 : g.candidates[(first + token) * kCandidates + ask];
    g.joins[first + token] = group;
    if (is_new) continue;
    const int64_t row = row_of(g, head, group);
    ++g.counts[row];
    g.newest[row] = static_cast<int32_t>(old.frame);
    if (!fits) g.claims[row] = kNobody;
  }
  if (threadIdx.x == 0) g.num_new[head] = num_new;
  __syncthreads();
  if (g.shares) return;
  const int over = g.capacity > 0 ? size + num_new - g.capacity : 0;
  if (over <= 0) {
    choose_none(g, head);
  } else if (fits) {
    for (int group = threadIdx.x; group < size; group += kScanned)
      held[group] = order_of(g, head, group);
    choose(g, head, 1, over, [&](int, int group) { return held[group]; });
  } else {
    choose(g, head, 1, over, [&](int, int group) { return order_of(g, head, group); });
  }
}

// Grid: layers. Heads share their budgets.
__global__ void __launch_bounds__(kScanned)
    choose_shared_kernel(const Groups* __restrict__ layers, int step) {
  const Groups& g = layers[blockIdx.x];
  if (!g.shares || !retiring(g, step).is_due) return;
  const int heads = g.layout.num_heads;
  int over = -g.capacity * heads;
  for (int head = 0; head < heads; ++head) over += g.sizes[head] + g.num_new[head];
  if (over > 0) {
    choose(g, 0, heads, over, [&](int head, int group) { return order_of(g, head, group); });
    return;
  }
  for (int head = 0; head < heads; ++head) choose_none(g, head);
}

constexpr int kMergeWarps = 8;

// A warp: key `key` of the frame joins the group at `row`, whose count knows it.
template <typename T, int D>
__device__ void merge(const Groups& g, int64_t key, int64_t row, int frame, const Page<T>& page,
                      int slot) {
  const int lane = threadIdx.x % 32;
  const int count = g.counts[row];
  const auto share = static_cast<float>(1.0 / static_cast<double>(count));
  const bool is_mean = g.key == GroupKey::kMean;
  const auto towards = [](float from, float to, float way) { return from + way * (to - from); };
  float square = 0;
  if (const int d = 4 * lane; d < D) {
    const float4 before = load_vector<T>(g.keys, row * D + d);
    const float4 joining = *reinterpret_cast<const float4*>(g.new_keys + key * D + d);
    const float x = joining.x - before.x, y = joining.y - before.y, z = joining.z - before.z,
                w = joining.w - before.w;
    square = fmaf(w, w, fmaf(z, z, fmaf(y, y, x * x)));
    const float4 mean = {before.x + share * x, before.y + share * y, before.z + share * z,
                         before.w + share * w};
    store_vector<T>(g.keys, row * D + d, is_mean ? mean : joining);
  }
  constexpr int kPerChunk = Page<T>::kPerChunk;
  if (lane < D / kPerChunk) {
    alignas(16) float value[kPerChunk];
    unpack<T>(page.value_chunk(slot, lane), value);
#pragma unroll
    for (int i = 0; i < kPerChunk; i += 4) {
      const int64_t at = row * D + lane * kPerChunk + i;
      const float4 own = load_vector<T>(g.values, at);
      store_vector<T>(g.values, at,
                      {towards(own.x, value[i], share), towards(own.y, value[i + 1], share),
                       towards(own.z, value[i + 2], share), towards(own.w, value[i + 3], share)});
    }
  }
  const float distance = sqrtf(warp_sum(square));
  see(g.seen + row * kSeen, frame);
  if (lane != 0) return;
  const float way = is_mean ? share : 1.0F;
  g.radii[row] = fmaxf(g.radii[row] + way * distance, (1 - way) * distance);
  g.stale[row] = 1;
}

// Grid: kMergeWarps keys each; heads; layers. A warp a key.
template <typename T, int D>
__global__ void __launch_bounds__(32 * kMergeWarps)
    join_kernel(const Groups* __restrict__ layers, int step) {
  static_assert(D / Page<T>::kPerChunk <= 32 && D <= 128);
  const Groups& g = layers[blockIdx.z];
  const Retiring old = retiring(g, step);
  if (!old.is_due) return;
  const int head = blockIdx.y, tokens = g.frames.tokens;
  const int index = blockIdx.x * kMergeWarps + threadIdx.x / 32;
  if (index >= tokens - g.num_new[head]) return;
  const int64_t first = static_cast<int64_t>(head) * tokens;
  const int token = g.order[first + tokens - 1 - index];
  const Page<T> page = Page<T>::of(g.layout, g.layout.history(head, old.page + token / kPageKeys));
  merge<T, D>(g, first + token, row_of(g, head, g.joins[first + token]),
              static_cast<int>(old.frame), page, token % kPageKeys);
}

__device__ void copy_code(const int8_t* from, int8_t* to, int bytes) {
  const int lane = threadIdx.x % 32;
  if (lane < bytes / 16)
    reinterpret_cast<uint4*>(to)[lane] = reinterpret_cast<const uint4*>(from)[lane];
}

// A warp: the group at row `from` gets row `to`, page and all.
template <typename T, int D>
__device__ void move_group(const Groups& g, int64_t from, int64_t to) {
  const int lane = threadIdx.x % 32;
  if (const int d = 4 * lane; d < D) {
    store_vector<T>(g.keys, to * D + d, load_vector<T>(g.keys, from * D + d));
    store_vector<T>(g.values, to * D + d, load_vector<T>(g.values, from * D + d));
    store_mapped<T>(g.mapped, to * D + d, load_mapped<T>(g.mapped, from * D + d));
  }
  const int bytes = Groups::code_bytes_of(g.ann, D);
  copy_code(g.codes + from * bytes, g.codes + to * bytes, bytes);
  if (lane < kSeen) g.seen[to * kSeen + lane] = g.seen[from * kSeen + lane];
  const Page<T> source = Page<T>::of(g.layout, g.pool + static_cast<int>(from / kPageKeys));
  const Page<T> target = Page<T>::of(g.layout, g.pool + static_cast<int>(to / kPageKeys));
  const int at = static_cast<int>(from % kPageKeys), slot = static_cast<int>(to % kPageKeys);
  for (int chunk = lane; chunk < D / Page<T>::kPerChunk; chunk += 32) {
    target.key_chunk(slot, chunk) = source.key_chunk(at, chunk);
    target.value_chunk(slot, chunk) = source.value_chunk(at, chunk);
  }
  if (lane == 0) {
    target.weights()[slot] = source.weights()[at];
    if (g.scales) {
      g.scales[to] = g.scales[from];
      g.squares[to] = g.squares[from];
      g.inverses[to] = g.inverses[from];
    }
    g.counts[to] = g.counts[from];
    g.newest[to] = g.newest[from];
    g.radii[to] = g.radii[from];
    g.stale[to] = g.stale[from];
  }
}

// A warp: key `token` of the frame starts a group at `row`.
template <typename T, int D>
__device__ void start_group(const Groups& g, const Retiring& old, int head, int token,
                            int64_t row) {
  const int lane = threadIdx.x % 32;
  const int64_t key = static_cast<int64_t>(head) * g.frames.tokens + token;
  if (const int d = 4 * lane; d < D) {
    store_vector<T>(g.keys, row * D + d,
                    *reinterpret_cast<const float4*>(g.new_keys + key * D + d));
    store_mapped<T>(g.mapped, row * D + d, load_mapped<T>(g.new_mapped, key * D + d));
  }
  const int bytes = Groups::code_bytes_of(g.ann, D);
  copy_code(g.new_codes + key * bytes, g.codes + row * bytes, bytes);
  const auto frame = static_cast<int>(old.frame);
  if (lane < kSeen) g.seen[row * kSeen + lane] = lane == 0 ? Seen{frame, frame, 1} : Seen{};
  // A group of one shows the very bits of its key.
  const Page<T> source =
      Page<T>::of(g.layout, g.layout.history(head, old.page + token / kPageKeys));
  const Page<T> target = Page<T>::of(g.layout, g.pool + static_cast<int>(row / kPageKeys));
  const int slot = static_cast<int>(row % kPageKeys);
  constexpr int kPerChunk = Page<T>::kPerChunk;
  for (int chunk = lane; chunk < D / kPerChunk; chunk += 32) {
    const uint4 value = source.value_chunk(token % kPageKeys, chunk);
    target.key_chunk(slot, chunk) = source.key_chunk(token % kPageKeys, chunk);
    target.value_chunk(slot, chunk) = value;
    alignas(16) float x[kPerChunk];
    unpack<T>(value, x);
#pragma unroll
    for (int i = 0; i < kPerChunk; i += 4)
      store_vector<T>(g.values, row * D + chunk * kPerChunk + i,
                      {x[i], x[i + 1], x[i + 2], x[i + 3]});
  }
  if (lane == 0) {
    target.weights()[slot] = 1;
    if (g.scales) {
      g.scales[row] = g.new_scales[key];
      g.squares[row] = g.new_squares[key];
      g.inverses[row] = inverse_of(g.new_scales[key], g.new_squares[key]);
    }
    g.counts[row] = 1;
    g.newest[row] = frame;
    g.radii[row] = 0;
    g.stale[row] = 0;
  }
}

// A warp, behind settle(): the group that is `index`-th from kept on takes the place of one that
// goes, and a key the place that it leaves.
template <typename T, int D>
__device__ void settle_place(const Groups& g, const Retiring& old, int head, int index, int kept) {
  const int64_t row = row_of(g, head, kept + index);
  if (index < g.num_gone[head]) {
    const int to = g.destinations[static_cast<int64_t>(head) * g.most_leaving() + index];
    if (to >= 0) move_group<T, D>(g, row, row_of(g, head, to));
    __syncwarp();
  }
  if (index >= g.num_new[head]) return;
  const int token = g.order[static_cast<int64_t>(head) * g.frames.tokens + index];
  start_group<T, D>(g, old, head, token, row);
}

constexpr int kManyPlaces = 512;  // tokens of a frame whose places are settled by other blocks, too

// Grid: heads, layers.
template <typename T, int D>
__global__ void __launch_bounds__(kScanned)
    settle_kernel(const Groups* __restrict__ layers, int step) {
  const Groups& g = layers[blockIdx.y];
  const Retiring old = retiring(g, step);
  if (!old.is_due) return;
  const int head = blockIdx.x, warp = threadIdx.x / 32;
  const int tokens = g.frames.tokens, size = g.sizes[head], num_new = g.num_new[head];
  const Word cut = g.cuts[head];
  const int ties = g.cut_ties[head];
  const int64_t first = static_cast<int64_t>(head) * g.most_leaving();
  int32_t* leaving = g.leaving + first;
  int32_t* tails = g.tails + first;
  int32_t* destinations = g.destinations + first;
  int gone = 0;
  if (cut != 0) {
    int tied = 0;
    for (int begin = 0; begin < size; begin += kScanned) {
      const int group = begin + static_cast<int>(threadIdx.x);
      const Word order = group < size ? order_of(g, head, group) : kNobody;
      const Scan tie = block_scan(order == cut ? 1 : 0);
      const bool leaves = order < cut || (order == cut && tied + tie.before < ties);
      tied += tie.total;
      const Scan scan = block_scan(leaves ? 1 : 0);
      if (leaves) leaving[gone + scan.before] = group;
      gone += scan.total;
    }
    // As if they left one by one, the last first, and the last group took each one's number: what
    // stands at size - i when the i-th leaves.
    const int kept = size - gone;
    for (int i = threadIdx.x; i < gone; i += kScanned) {
      tails[i] = 0;
      destinations[i] = -1;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < gone; i += kScanned) {
      if (leaving[i] >= kept) tails[leaving[i] - kept] = gone - i;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < gone; i += kScanned) {
      if (leaving[i] >= kept) continue;
      int from = size - (gone - i);
      for (int before = tails[from - kept]; before != 0; before = tails[from - kept])
        from = size - before;
      destinations[from - kept] = leaving[i];
    }
  }
  const int kept = size - gone;
  if (threadIdx.x == 0) {
    g.num_gone[head] = gone;
    g.sizes[head] = kept + num_new;
    auto* merged = reinterpret_cast<Word*>(&g.counters->merged);
    auto* evicted = reinterpret_cast<Word*>(&g.counters->evicted);
    atomicAdd(merged, static_cast<Word>(tokens - num_new));
    atomicAdd(evicted, static_cast<Word>(gone));
  }
  if (tokens > kManyPlaces) return;
  __syncthreads();
  for (int index = warp; index < max(gone, num_new); index += kWarps)
    settle_place<T, D>(g, old, head, index, kept);
}

constexpr int kPlaceWarps = 8;

// Grid: blocks that share a head's places, heads, layers.
template <typename T, int D>
__global__ void __launch_bounds__(32 * kPlaceWarps)
    settle_places_kernel(const Groups* __restrict__ layers, int step) {
  const Groups& g = layers[blockIdx.z];
  const Retiring old = retiring(g, step);
  if (!old.is_due) return;
  const int head = blockIdx.y, num_new = g.num_new[head], kept = g.sizes[head] - num_new;
  const int count = max(g.num_gone[head], num_new);
  const int stride = gridDim.x * kPlaceWarps;
  for (int index = blockIdx.x * kPlaceWarps + threadIdx.x / 32; index < count; index += stride)
    settle_place<T, D>(g, old, head, index, kept);
}

// Grid: layers; a thread a head.
__global__ void __launch_bounds__(kScanned) share_kernel(const Groups* __restrict__ layers) {
  const Groups& g = layers[blockIdx.x];
  if (!g.takes_pages()) return;
  const int head = threadIdx.x;
  const bool is_head = head < g.layout.num_heads;
  const int room = g.frames.tokens * g.later_frames;
  const int have = is_head ? g.owned[head] : 0;
  const int want = is_head ? (g.sizes[head] + room + kPageKeys - 1) / kPageKeys : 0;
  const int count = *g.num_free;
  const Scan given = block_scan(max(0, have - want));
  const Scan taken = block_scan(max(0, want - have));
  int32_t* own = g.pages + static_cast<int64_t>(head) * g.most_pages;
  for (int i = 0; i < have - want; ++i) g.free_pages[count + given.before + i] = own[want + i];
  __syncthreads();
  const int top = count + given.total;
  for (int i = 0; i < want - have; ++i) own[have + i] = g.free_pages[top - 1 - taken.before - i];
  if (is_head) g.owned[head] = want;
  if (head != 0) return;
  *g.num_free = top - taken.total;
  *g.pool_used += taken.total - given.total;
}

}  // namespace

void pair_keys(const GroupBatch& batch, int step, cudaStream_t stream) {
  const Groups& groups = *batch.host;
  const dim3 grid(static_cast<unsigned>(groups.layout.num_heads),
                  static_cast<unsigned>(batch.count));
  const int bytes = kHeld * static_cast<int>(sizeof(Word)) + groups.frames.tokens;
  check(cudaFuncSetAttribute(pair_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
        "pairing keys");
  pair_kernel<<<grid, kScanned, static_cast<size_t>(bytes), stream>>>(batch.layers, step);
  check(cudaGetLastError(), "pairing keys");
  if (std::any_of(batch.host, batch.host + batch.count, [](const Groups& g) { return g.shares; }))
    choose_shared_kernel<<<static_cast<unsigned>(batch.count), kScanned, 0, stream>>>(batch.layers,
                                                                                      step);
  check(cudaGetLastError(), "choosing groups to go");
}

void join_groups(const GroupBatch& batch, int step, cudaStream_t stream) {
  const Groups& groups = *batch.host;
  const dim3 grid(static_cast<unsigned>((groups.frames.tokens + kMergeWarps - 1) / kMergeWarps),
                  static_cast<unsigned>(groups.layout.num_heads),
                  static_cast<unsigned>(batch.count));
  for_pages(batch, [&]<typename T, int D>() {
    join_kernel<T, D><<<grid, 32 * kMergeWarps, 0, stream>>>(batch.layers, step);
  });
  check(cudaGetLastError(), "joining groups");
}

void settle_groups(const GroupBatch& batch, int step, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(batch.host->layout.num_heads),
                  static_cast<unsigned>(batch.count));
  for_pages(batch, [&]<typename T, int D>() {
    settle_kernel<T, D><<<grid, kScanned, 0, stream>>>(batch.layers, step);
    const int tokens = batch.host->frames.tokens;
    if (tokens <= kManyPlaces) return;
    const dim3 places(static_cast<unsigned>((tokens + kPlaceWarps - 1) / kPlaceWarps), grid.x,
                      grid.y);
    settle_places_kernel<T, D><<<places, 32 * kPlaceWarps, 0, stream>>>(batch.layers, step);
  });
  check(cudaGetLastError(), "settling groups");
}

void share_pages(const GroupBatch& batch, cudaStream_t stream) {
  share_kernel<<<static_cast<unsigned>(batch.count), kScanned, 0, stream>>>(batch.layers);
  check(cudaGetLastError(), "sharing pages");
}

void merge_frames(const GroupBatch& batch, cudaStream_t stream) {
  int steps = 0;
  for (int i = 0; i < batch.count; ++i) steps = std::max(steps, batch.host[i].chunk_frames);
  for (int step = 0; step < steps; ++step) {
    begin_merge(batch, step, stream);
    map_keys(batch, step, stream);
    search_groups(batch, step, stream);
    pair_keys(batch, step, stream);
    join_groups(batch, step, stream);
    map_joined(batch, step, stream);
    settle_groups(batch, step, stream);
  }
  show_groups(batch, stream);
  if (std::any_of(batch.host, batch.host + batch.count,
                  [](const Groups& g) { return g.takes_pages(); }))
    share_pages(batch, stream);
}

}  // namespace longtake::cuda
