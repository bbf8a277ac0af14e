// Candidates of keys: codes of a frame's keys against codes of all groups of the head, then the
// exact distances of the few that look nearest.
//
// Both kinds of code are 8-bit vectors whose dot product ranks the groups: signs as +-1, of which
// 48 - dot is twice the number that differ, and quantised vectors, which with their scales give a
// squared distance. So the search is a product of matrices on the tensor cores, and what is left to
// do for a pair is one comparison. A warp keeps 32 queries; what passes a query's bar goes to its
// list in shared memory, and when a list is full the best 8 of it set a new bar.
#include <algorithm>
#include <cmath>

#include "kv/device_groups.cuh"

namespace longtake::cuda {
namespace {

constexpr int kWarps = 4, kTiles = 2;  // of a block; of 16 queries, a warp's
constexpr int kBlockQueries = kWarps * kTiles * 16;
constexpr int kRoom = 32;         // of a list, beside its best
constexpr int kStep = 8;          // groups a warp looks at at once
using Word = unsigned long long;  // rank above, group below
constexpr Word kNone = ~0ULL;

// D += A B: 16 x 32 and 32 x 8 of 8 bits.
__device__ inline void multiply(int (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ inline Word warp_min(Word x) {
  const auto high = static_cast<unsigned>(x >> 32);
  const unsigned least = __reduce_min_sync(~0U, high);
  const unsigned low = high == least ? static_cast<unsigned>(x) : ~0U;
  return static_cast<Word>(least) << 32 | __reduce_min_sync(~0U, low);
}

// The least of two words of every lane, kCandidates times over; lane i keeps the i-th.
__device__ inline Word best_of(Word a, Word b) {
  Word own = kNone;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kCandidates; ++i) {
    const Word least = warp_min(a < b ? a : b);
    if (lane == i) own = least;
    if (a == least) a = kNone;
    if (b == least) b = kNone;
  }
  return own;
}

// Floats (not NaN) in their order.
__device__ inline unsigned rank_of(float x) {
  const unsigned bits = __float_as_uint(x);
  return bits >> 31 ? ~bits : bits | 0x80000000U;
}

// A warp's list of one query: its best, then what came since.
struct Lists {
  Word words[kTiles * 16][kCandidates + kRoom];
};

// kBytes: of a code. kSignCodes: by hashing. Grid: tiles of queries, heads, splits of the groups.
template <int kBytes, bool kSignCodes>
__global__ void __launch_bounds__(kWarps * 32) search_kernel(Groups g, int step) {
  constexpr int kChunks = kBytes / 64;  // 16 bytes a lane; codes are read in the order they lie
  extern __shared__ Lists lists[];
  if (!retiring(g, step).is_due) return;
  const int head = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int quad = lane / 4, in_quad = lane % 4;
  const int tokens = g.frames.tokens;
  const int first = blockIdx.x * kBlockQueries + warp * kTiles * 16;
  if (first >= tokens) return;
  Lists& own = lists[warp];
  uint4 a[kTiles][2][kChunks];
  float scale[kTiles][2], square[kTiles][2];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = min(first + tile * 16 + half * 8 + quad, tokens - 1);
      const int64_t row = static_cast<int64_t>(head) * tokens + token;
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk)
        a[tile][half][chunk] =
            *reinterpret_cast<const uint4*>(g.new_codes + row * kBytes + chunk * 64 + in_quad * 16);
      if constexpr (!kSignCodes) {
        scale[tile][half] = g.new_scales[row];
        square[tile][half] = g.new_squares[row];
      }
    }
  }
  for (int i = lane; i < kTiles * 16 * (kCandidates + kRoom); i += 32)
    own.words[i / (kCandidates + kRoom)][i % (kCandidates + kRoom)] = kNone;
  __syncwarp();
  int count[kTiles][2] = {};
  // Passes what is nearer: signs by their dot product, else by the distance.
  int bar_dot[kTiles][2];
  float bar[kTiles][2];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    for (int half = 0; half < 2; ++half) {
      bar_dot[tile][half] = -1000;
      bar[tile][half] = INFINITY;
    }
  }
  // The list of row `row` of a tile is cut to its best, by the whole warp.
  const auto cut = [&](int tile, int half, int in_half) {
    Word* words = own.words[tile * 16 + half * 8 + in_half];
    __syncwarp();
    const Word best = best_of(words[lane], lane < kCandidates ? words[32 + lane] : kNone);
    __syncwarp();
    words[lane] = best;
    if (lane < kCandidates) words[32 + lane] = kNone;
    __syncwarp();
    const Word last = __shfl_sync(~0U, best, kCandidates - 1);
    if (quad == in_half) {
      count[tile][half] = 0;
      if (last != kNone) {
        const auto rank = static_cast<unsigned>(last >> 32);
        if constexpr (kSignCodes)
          bar_dot[tile][half] = kSigns - static_cast<int>(rank);
        else
          bar[tile][half] = __uint_as_float(rank >> 31 ? rank & 0x7fffffffU : ~rank);
      }
    }
  };
  const int size = g.sizes[head];
  const int steps = (size + kStep - 1) / kStep;
  const int begin = static_cast<int>(static_cast<int64_t>(steps) * blockIdx.z / gridDim.z);
  const int end = static_cast<int>(static_cast<int64_t>(steps) * (blockIdx.z + 1) / gridDim.z);
  const auto row_at = [&](int at) {
    return row_of(g, head, min(at * kStep, max(size - 1, 0)) / kStep * kStep);
  };
  const auto load = [&](int at, uint4(&b)[kChunks]) {
    const int8_t* code = g.codes + (row_at(at) + quad) * kBytes + in_quad * 16;
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk)
      b[chunk] = *reinterpret_cast<const uint4*>(code + chunk * 64);
  };
  uint4 b[kChunks] = {};
  if (begin < end) load(begin, b);
  for (int at = begin; at < end; ++at) {
    uint4 next[kChunks];
    load(min(at + 1, end - 1), next);
    float own_scale[2], own_square[2];
    if constexpr (!kSignCodes) {
      const int64_t row = row_at(at) + 2 * in_quad;
      for (int i = 0; i < 2; ++i) {
        own_scale[i] = g.scales[row + i];
        own_square[i] = g.squares[row + i];
      }
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      int dot[4] = {};
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        const uint4 low = a[tile][0][chunk], high = a[tile][1][chunk];
        multiply(dot, low.x, high.x, low.y, high.y, b[chunk].x, b[chunk].y);
        multiply(dot, low.z, high.z, low.w, high.w, b[chunk].z, b[chunk].w);
      }
      bool passes[4];
      float distance[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int half = i / 2;
        if constexpr (kSignCodes) {
          passes[i] = dot[i] > bar_dot[tile][half];
        } else {
          // Rounded as on the CPU.
          const float product =
              __fmul_rn(__fmul_rn(__fmul_rn(2.0F, scale[tile][half]), own_scale[i % 2]),
                        static_cast<float>(dot[i]));
          distance[i] = __fsub_rn(__fadd_rn(square[tile][half], own_square[i % 2]), product);
          passes[i] = distance[i] < bar[tile][half];
        }
      }
      if (!__any_sync(~0U, passes[0] || passes[1] || passes[2] || passes[3])) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int half = i / 2, group = at * kStep + 2 * in_quad + i % 2;
        const bool enters = passes[i] && group < size;
        const unsigned quads = __ballot_sync(~0U, enters) >> (lane & ~3) & 0xfU;
        if (enters) {
          const unsigned rank =
              kSignCodes ? static_cast<unsigned>(kSigns - dot[i]) : rank_of(distance[i]);
          own.words[tile * 16 + half * 8 + quad]
                   [kCandidates + count[tile][half] + __popc(quads & ((1U << in_quad) - 1))] =
              static_cast<Word>(rank) << 32 | static_cast<unsigned>(group);
        }
        count[tile][half] += __popc(quads);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        unsigned full = __ballot_sync(~0U, count[tile][half] > kRoom - kStep);
        for (; full != 0; full &= full - 1) {
          const int leader = __ffs(static_cast<int>(full)) - 1;
          if (leader % 4 == 0) cut(tile, half, leader / 4);
        }
      }
    }
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) b[chunk] = next[chunk];
  }
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 8; ++i) {
        const int token = first + tile * 16 + half * 8 + i;
        if (token >= tokens) break;
        cut(tile, half, i);
        if (lane < kCandidates)
          g.found[((static_cast<int64_t>(head) * tokens + token) * kMostSplits + blockIdx.z) *
                      kCandidates +
                  lane] = own.words[tile * 16 + half * 8 + i][lane];
      }
    }
  }
}

// Whether the group's key would stay within the error of all its members.
template <int D>
__device__ bool may_join(const Groups& g, int64_t key, int64_t row) {
  if (g.most_error == 0) return true;
  float square = 0;
  for (int d = threadIdx.x % 32; d < D; d += 32) {
    const float way = g.new_keys[key * D + d] - g.keys[row * D + d];
    square = fmaf(way, way, square);
  }
  const float distance = sqrtf(warp_sum(square));
  const float share =
      g.key == GroupKey::kMean ? 1.0F / static_cast<float>(g.counts[row] + 1) : 1.0F;
  const float radius = fmaxf(g.radii[row] + share * distance, (1 - share) * distance);
  return static_cast<double>(__int_as_float(*g.longest_query)) * radius <=
         static_cast<double>(g.most_error);
}

// A warp a key.
template <int D>
__global__ void __launch_bounds__(256) measure_kernel(Groups g, int step, int splits) {
  if (!retiring(g, step).is_due) return;
  const int lane = threadIdx.x % 32, head = blockIdx.y, tokens = g.frames.tokens;
  const int token = blockIdx.x * 8 + threadIdx.x / 32;
  if (token >= tokens) return;
  const int64_t key = static_cast<int64_t>(head) * tokens + token;
  const Word* found = g.found + key * kMostSplits * kCandidates;
  const int count = splits * kCandidates;
  const Word best =
      best_of(lane < count ? found[lane] : kNone, lane + 32 < count ? found[lane + 32] : kNone);
  int64_t rows[kCandidates];
  int groups[kCandidates];
  float squares[kCandidates] = {};
#pragma unroll
  for (int i = 0; i < kCandidates; ++i) {
    const Word word = __shfl_sync(~0U, best, i);
    groups[i] = word == kNone ? -1 : static_cast<int>(word & 0xffffffffU);
    rows[i] = groups[i] < 0 ? 0 : row_of(g, head, groups[i]);
  }
  for (int d = lane; d < D; d += 32) {
    const float own = g.new_mapped[key * D + d];
#pragma unroll
    for (int i = 0; i < kCandidates; ++i) {
      const float way = own - (groups[i] < 0 ? 0.0F : g.mapped[rows[i] * D + d]);
      squares[i] = fmaf(way, way, squares[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < kCandidates; ++i) {
    const float square = warp_sum(squares[i]);
    bool near = groups[i] >= 0 && square < g.most_square;
    if (near) near = may_join<D>(g, key, rows[i]);
    if (lane != 0) continue;
    g.candidates[key * kCandidates + i] = groups[i];
    g.distances[key * kCandidates + i] = near ? square : INFINITY;
  }
}

}  // namespace

void search_groups(const Groups& groups, int step, cudaStream_t stream) {
  const int tiles = (groups.frames.tokens + kBlockQueries - 1) / kBlockQueries;
  const int heads = groups.layout.num_heads;
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(heads),
                  static_cast<unsigned>(search_splits(groups)));
  constexpr int kBytes = kWarps * static_cast<int>(sizeof(Lists));
  const auto launch = [&](auto kernel) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
          "search");
    kernel<<<grid, kWarps * 32, kBytes, stream>>>(groups, step);
  };
  if (groups.ann == AnnEngine::kLsh)
    launch(search_kernel<64, true>);
  else if (groups.layout.head_dim == 64)
    launch(search_kernel<64, false>);
  else
    launch(search_kernel<128, false>);
  check(cudaGetLastError(), "search");
}

int search_splits(const Groups& groups) {
  constexpr int kWarpsWanted = 132 * 16;
  const int tiles = (groups.frames.tokens + kBlockQueries - 1) / kBlockQueries;
  return std::clamp(kWarpsWanted / (tiles * kWarps * groups.layout.num_heads), 1, kMostSplits);
}

void measure_candidates(const Groups& groups, int step, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((groups.frames.tokens + 7) / 8),
                  static_cast<unsigned>(groups.layout.num_heads));
  for_head_dim(groups.layout.head_dim, [&]<int D>() {
    measure_kernel<D><<<grid, 256, 0, stream>>>(groups, step, search_splits(groups));
  });
  check(cudaGetLastError(), "measuring candidates");
}

}  // namespace longtake::cuda
