// Keys join groups, groups over the budget go, and keys without a partner start groups. A block a
// head.
//
// Pairs are taken from the nearest on, each key and each group once, as if all were sorted. A pair
// that is the least of all that its key and all that its group still have comes before every other
// of theirs in that order, so that all such pairs can be taken at once; rounds of that end with the
// same pairs as the sorted list, after few of them.
#include <cmath>

#include "kv/device_groups.cuh"

namespace longtake::cuda {
namespace {

constexpr int kThreads = 1024, kWarps = kThreads / 32;
using Word = unsigned long long;
constexpr Word kNobody = ~0ULL;
constexpr Word kTaken = 0;

// Exclusive sums over the block's threads, and the total.
struct Scan {
  int before, total;
};

__device__ Scan block_scan(int value) {
  __shared__ int sums[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int sum = value;
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(~0U, sum, step);
    if (lane >= step) sum += other;
  }
  __syncthreads();
  if (lane == 31) sums[warp] = sum;
  __syncthreads();
  if (warp == 0) {
    int all = sums[lane];
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(~0U, all, step);
      if (lane >= step) all += other;
    }
    sums[lane] = all;
  }
  __syncthreads();
  return {sum - value + (warp > 0 ? sums[warp - 1] : 0), sums[kWarps - 1]};
}

// As KeyGroups::see: a sighting at `frame` joins the others, of which two become one if they are
// too many.
__device__ void see(Seen* seen, int frame) {
  Seen all[kSeen + 1];
  int used = 0;
#pragma unroll
  for (int i = 0; i < kSeen; ++i) {
    all[i] = seen[i];
    if (all[i].count > 0) used = i + 1;
  }
  int place = 0;
  while (place < used && all[place].last < frame) ++place;
  if (place < used && all[place].first <= frame) {
    ++all[place].count;
  } else {
    for (int i = used; i > place; --i) all[i] = all[i - 1];
    all[place] = {frame, frame, 1};
    ++used;
  }
  const auto middle = [&](int i) { return all[i].first + (all[i].last - all[i].first) / 2; };
  if (used > kSeen) {
    constexpr double kYoung = 4;  // frames; as on the CPU
    const int newest = all[used - 1].last;
    int least = 0;
    double least_gap = INFINITY;
    for (int i = 0; i + 1 < used; ++i) {
      const double gap = (middle(i + 1) - middle(i)) / (newest - middle(i + 1) + kYoung);
      if (gap < least_gap) {
        least = i;
        least_gap = gap;
      }
    }
    all[least].last = all[least + 1].last;
    all[least].count += all[least + 1].count;
    for (int i = least + 1; i + 1 < used; ++i) all[i] = all[i + 1];
    --used;
  }
  for (int i = 0; i < kSeen; ++i) seen[i] = i < used ? all[i] : Seen{};
}

// A warp: key `key` of the frame joins the group at `row`. buffer [D] in shared memory.
template <typename T, int D>
__device__ void merge(const Groups& g, int64_t key, int64_t row, int frame, const Page<T>& page,
                      int slot, float* buffer) {
  const int lane = threadIdx.x % 32;
  const int count = g.counts[row] + 1;
  const auto share = static_cast<float>(1.0 / static_cast<double>(count));
  const bool is_mean = g.key == GroupKey::kMean;
  float square = 0;
  for (int d = lane; d < D; d += 32) {
    float& own = g.keys[row * D + d];
    const float before = own, joining = g.new_keys[key * D + d];
    square = fmaf(joining - before, joining - before, square);
    own = is_mean ? before + share * (joining - before) : joining;
    float& image = g.mapped[row * D + d];
    const float moved = image + (is_mean ? share : 1.0F) * (g.new_mapped[key * D + d] - image);
    image = moved;
    buffer[d] = moved;
  }
  constexpr int kPerChunk = Page<T>::kPerChunk;
  for (int chunk = lane; chunk < D / kPerChunk; chunk += 32) {
    float value[kPerChunk];
    unpack<T>(page.value_chunk(slot, chunk), value);
    float* own = g.values + row * D + chunk * kPerChunk;
    for (int i = 0; i < kPerChunk; ++i) own[i] += share * (value[i] - own[i]);
  }
  const float distance = sqrtf(warp_sum(square));
  __syncwarp();
  write_code<D>(g, buffer, g.codes + row * Groups::code_bytes_of(g.ann, D), g.scales + row,
                g.squares + row);
  if (lane == 0) {
    const float way = is_mean ? share : 1.0F;
    g.radii[row] = fmaxf(g.radii[row] + way * distance, (1 - way) * distance);
    see(g.seen + row * kSeen, frame);
    g.counts[row] = count;
    g.newest[row] = frame;
    g.stale[row] = 1;
  }
  __syncwarp();
}

// The place of a group in the order of forgetting: least recently merged, then smallest.
__device__ Word order_of(const Groups& g, int head, int group) {
  const int64_t row = row_of(g, head, group);
  return static_cast<Word>(static_cast<unsigned>(g.newest[row])) << 32 |
         static_cast<unsigned>(g.counts[row]);
}

// For heads [first, first + heads): the order of the `leave`-th group to go, and how many at that
// order go. By the whole block, digit by digit; digits that all share are known beforehand.
__device__ void choose(const Groups& g, int first, int heads, int leave) {
  __shared__ int histogram[256];
  __shared__ Word prefix, some, all;
  __shared__ int left;
  const auto for_groups = [&](const auto& look) {
    for (int head = first; head < first + heads; ++head) {
      for (int group = threadIdx.x; group < g.sizes[head]; group += kThreads)
        look(order_of(g, head, group));
    }
  };
  if (threadIdx.x == 0) {
    left = leave;
    some = 0;
    all = ~Word{0};
  }
  __syncthreads();
  Word own_some = 0, own_all = ~Word{0};
  for_groups([&](Word order) {
    own_some |= order;
    own_all &= order;
  });
  atomicOr(&some, own_some);
  atomicAnd(&all, own_all);
  __syncthreads();
  const Word differing = some & ~all;
  if (threadIdx.x == 0) prefix = all;
  __syncthreads();
  for (int shift = 56; shift >= 0; shift -= 8) {
    if ((differing >> shift & 0xff) == 0) continue;
    for (int i = threadIdx.x; i < 256; i += kThreads) histogram[i] = 0;
    __syncthreads();
    const Word known = shift == 56 ? 0 : prefix >> (shift + 8);
    for_groups([&](Word order) {
      if (shift < 56 && order >> (shift + 8) != known) return;
      atomicAdd(&histogram[order >> shift & 0xff], 1);
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
    for (int group = threadIdx.x; group < g.sizes[head]; group += kThreads)
      ties += order_of(g, head, group) == prefix ? 1 : 0;
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

template <typename T, int D>
__global__ void __launch_bounds__(kThreads) join_kernel(Groups g, int step) {
  __shared__ float buffers[kWarps][D];
  const Retiring old = retiring(g, step);
  if (!old.is_due) return;
  const int head = blockIdx.x, tokens = g.frames.tokens;
  const int64_t first = static_cast<int64_t>(head) * tokens;
  const int32_t* candidates = g.candidates + first * kCandidates;
  const float* distances = g.distances + first * kCandidates;
  int32_t* joins = g.joins + first;
  const auto claim_of = [&](int token, int i) {
    return g.claims + row_of(g, head, candidates[token * kCandidates + i]);
  };
  const auto word_of = [&](int token, int i) {
    return static_cast<Word>(__float_as_uint(distances[token * kCandidates + i])) << 32 |
           static_cast<unsigned>(token + 1);
  };
  const auto is_pair = [&](int token, int i) {
    return distances[token * kCandidates + i] < INFINITY;
  };
  for (int token = threadIdx.x; token < tokens; token += kThreads) joins[token] = -1;
  for (bool goes_on = true; goes_on;) {
    for (int token = threadIdx.x; token < tokens; token += kThreads) {
      if (joins[token] >= 0) continue;
      for (int i = 0; i < kCandidates; ++i) {
        if (is_pair(token, i)) atomicMin(claim_of(token, i), word_of(token, i));
      }
    }
    __syncthreads();
    int taken = 0;
    for (int token = threadIdx.x; token < tokens; token += kThreads) {
      if (joins[token] >= 0) continue;
      // The nearest group that nobody has taken; of two as near, the one with the lower number.
      int best = -1;
      for (int i = 0; i < kCandidates; ++i) {
        if (!is_pair(token, i) || __ldcg(claim_of(token, i)) == kTaken) continue;
        if (best < 0) {
          best = i;
          continue;
        }
        const float a = distances[token * kCandidates + i];
        const float b = distances[token * kCandidates + best];
        if (a < b || (a == b &&
                      candidates[token * kCandidates + i] < candidates[token * kCandidates + best]))
          best = i;
      }
      if (best < 0 || __ldcg(claim_of(token, best)) != word_of(token, best)) continue;
      joins[token] = candidates[token * kCandidates + best];
      ++taken;
    }
    goes_on = __syncthreads_or(taken) != 0;
    // What was claimed is free again, but for what was taken.
    for (int token = threadIdx.x; token < tokens && goes_on; token += kThreads) {
      for (int i = 0; i < kCandidates; ++i) {
        if (is_pair(token, i) && __ldcg(claim_of(token, i)) != kTaken)
          __stcg(claim_of(token, i), kNobody);
      }
    }
    __syncthreads();
    for (int token = threadIdx.x; token < tokens && goes_on; token += kThreads) {
      if (joins[token] >= 0) __stcg(g.claims + row_of(g, head, joins[token]), kTaken);
    }
    __syncthreads();
  }
  for (int token = threadIdx.x; token < tokens; token += kThreads) {
    for (int i = 0; i < kCandidates; ++i) {
      if (is_pair(token, i)) __stcg(claim_of(token, i), kNobody);
    }
  }
  __syncthreads();
  const int warp = threadIdx.x / 32;
  for (int token = warp; token < tokens; token += kWarps) {
    if (joins[token] < 0) continue;
    const Page<T> page =
        Page<T>::of(g.layout, g.layout.history(head, old.page + token / kPageKeys));
    merge<T, D>(g, first + token, row_of(g, head, joins[token]), static_cast<int>(old.frame), page,
                token % kPageKeys, buffers[warp]);
  }
  int num_new = 0;
  for (int begin = 0; begin < tokens; begin += kThreads) {
    const int token = begin + static_cast<int>(threadIdx.x);
    const bool is_new = token < tokens && joins[token] < 0;
    const Scan scan = block_scan(is_new ? 1 : 0);
    if (is_new) g.ranks[first + token] = num_new + scan.before;
    num_new += scan.total;
  }
  if (threadIdx.x == 0) g.num_new[head] = num_new;
  __syncthreads();
  if (g.shares) return;
  const int over = g.capacity > 0 ? g.sizes[head] + num_new - g.capacity : 0;
  if (over > 0)
    choose(g, head, 1, over);
  else
    choose_none(g, head);
}

// One block: heads share their budgets.
__global__ void __launch_bounds__(kThreads) choose_shared_kernel(Groups g, int step) {
  if (!retiring(g, step).is_due) return;
  const int heads = g.layout.num_heads;
  int over = -g.capacity * heads;
  for (int head = 0; head < heads; ++head) over += g.sizes[head] + g.num_new[head];
  if (over > 0) {
    choose(g, 0, heads, over);
    return;
  }
  for (int head = 0; head < heads; ++head) choose_none(g, head);
}

// A warp: the group at row `from` gets row `to`, page and all.
template <typename T, int D>
__device__ void move_group(const Groups& g, int64_t from, int64_t to) {
  const int lane = threadIdx.x % 32;
  for (int d = lane; d < D; d += 32) {
    g.keys[to * D + d] = g.keys[from * D + d];
    g.values[to * D + d] = g.values[from * D + d];
    g.mapped[to * D + d] = g.mapped[from * D + d];
  }
  const int bytes = Groups::code_bytes_of(g.ann, D);
  for (int i = lane; i < bytes; i += 32) g.codes[to * bytes + i] = g.codes[from * bytes + i];
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
    g.scales[to] = g.scales[from];
    g.squares[to] = g.squares[from];
    g.counts[to] = g.counts[from];
    g.newest[to] = g.newest[from];
    g.radii[to] = g.radii[from];
    g.stale[to] = g.stale[from];
  }
}

template <typename T, int D>
__global__ void __launch_bounds__(kThreads) settle_kernel(Groups g, int step) {
  const Retiring old = retiring(g, step);
  if (!old.is_due) return;
  const int head = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int tokens = g.frames.tokens, size = g.sizes[head];
  const Word cut = g.cuts[head];
  const int ties = g.cut_ties[head];
  int32_t* leaving = g.leaving + static_cast<int64_t>(head) * g.most_leaving();
  int32_t* tails = g.tails + static_cast<int64_t>(head) * g.most_leaving();
  int gone = 0;
  if (cut != 0) {
    int tied = 0;
    for (int begin = 0; begin < size; begin += kThreads) {
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
    for (int i = threadIdx.x; i < gone; i += kThreads) tails[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < gone; i += kThreads) {
      if (leaving[i] >= kept) tails[leaving[i] - kept] = gone - i;
    }
    __syncthreads();
    for (int i = warp; i < gone; i += kWarps) {
      if (leaving[i] >= kept) continue;
      int from = size - (gone - i);
      for (int before = tails[from - kept]; before != 0; before = tails[from - kept])
        from = size - before;
      move_group<T, D>(g, row_of(g, head, from), row_of(g, head, leaving[i]));
    }
    __syncthreads();
  }
  const int kept = size - gone, bytes = Groups::code_bytes_of(g.ann, D);
  constexpr int kPerChunk = Page<T>::kPerChunk;
  for (int token = warp; token < tokens; token += kWarps) {
    const int64_t key = static_cast<int64_t>(head) * tokens + token;
    if (g.joins[key] >= 0) continue;
    const int64_t row = row_of(g, head, kept + g.ranks[key]);
    for (int d = lane; d < D; d += 32) {
      g.keys[row * D + d] = g.new_keys[key * D + d];
      g.mapped[row * D + d] = g.new_mapped[key * D + d];
    }
    for (int i = lane; i < bytes; i += 32) g.codes[row * bytes + i] = g.new_codes[key * bytes + i];
    const auto frame = static_cast<int>(old.frame);
    if (lane < kSeen) g.seen[row * kSeen + lane] = lane == 0 ? Seen{frame, frame, 1} : Seen{};
    // A group of one shows the very bits of its key.
    const Page<T> source =
        Page<T>::of(g.layout, g.layout.history(head, old.page + token / kPageKeys));
    const Page<T> target = Page<T>::of(g.layout, g.pool + static_cast<int>(row / kPageKeys));
    const int slot = static_cast<int>(row % kPageKeys);
    for (int chunk = lane; chunk < D / kPerChunk; chunk += 32) {
      const uint4 value = source.value_chunk(token % kPageKeys, chunk);
      target.key_chunk(slot, chunk) = source.key_chunk(token % kPageKeys, chunk);
      target.value_chunk(slot, chunk) = value;
      unpack<T>(value, g.values + row * D + chunk * kPerChunk);
    }
    if (lane == 0) {
      target.weights()[slot] = 1;
      g.scales[row] = g.new_scales[key];
      g.squares[row] = g.new_squares[key];
      g.counts[row] = 1;
      g.newest[row] = frame;
      g.radii[row] = 0;
      g.stale[row] = 0;
    }
  }
  if (threadIdx.x == 0) {
    const int num_new = g.num_new[head];
    g.sizes[head] = kept + num_new;
    auto* merged = reinterpret_cast<Word*>(&g.counters->merged);
    auto* evicted = reinterpret_cast<Word*>(&g.counters->evicted);
    atomicAdd(merged, static_cast<Word>(tokens - num_new));
    atomicAdd(evicted, static_cast<Word>(gone));
  }
}

// One block, a thread a head.
__global__ void __launch_bounds__(kThreads) share_kernel(Groups g) {
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

void join_groups(const Groups& groups, int step, cudaStream_t stream) {
  for_pages(groups.layout, [&]<typename T, int D>() {
    join_kernel<T, D>
        <<<static_cast<unsigned>(groups.layout.num_heads), kThreads, 0, stream>>>(groups, step);
  });
  check(cudaGetLastError(), "joining groups");
}

void settle_groups(const Groups& groups, int step, cudaStream_t stream) {
  if (groups.shares) choose_shared_kernel<<<1, kThreads, 0, stream>>>(groups, step);
  for_pages(groups.layout, [&]<typename T, int D>() {
    settle_kernel<T, D>
        <<<static_cast<unsigned>(groups.layout.num_heads), kThreads, 0, stream>>>(groups, step);
  });
  check(cudaGetLastError(), "settling groups");
}

void share_pages(const Groups& groups, cudaStream_t stream) {
  share_kernel<<<1, kThreads, 0, stream>>>(groups);
  check(cudaGetLastError(), "sharing pages");
}

}  // namespace longtake::cuda
