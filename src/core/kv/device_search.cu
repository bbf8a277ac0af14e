// Candidates of keys: codes of a frame's keys against codes of all groups of the head, then the
// exact distances of the few that look nearest.
//
// Both kinds of code are 8-bit vectors whose dot product ranks the groups: signs as +-1, of which
// 48 - dot is twice the number that differ, and quantised vectors, which with their scales give a
// squared distance. So the search is a product of matrices on the tensor cores, and what is left to
// do for a pair is one comparison with the query's bar. A warp keeps 32 queries; what passes a bar
// goes to the query's list in shared memory, and a list that is full is cut to its best 8, the last
// of which is the new bar.
//
// The first bar comes from a look at some of the groups that keeps no names: their lanes are
// disjoint parts, so that the 8th best of the parts' best is no better than the 8th best of all.
// Where keys are few (a frame of a small model) the 8 warps of a block share the groups of the same
// 32 queries, their parts and their lists; where they are many every warp has queries of its own,
// and what the warps read of the groups they read together.
#include <cmath>
#include <type_traits>

#include "kv/device_groups.cuh"

namespace longtake::cuda {
namespace {

constexpr int kWarps = 8, kTiles = 2;  // of a block; of 16 queries, a warp's
constexpr int kQueries = kTiles * 16;  // of a warp
constexpr int kStep = 8;               // groups a warp looks at at once
constexpr int kRoom = 40;              // of a list
using Word = unsigned long long;       // rank above, group below
constexpr Word kNone = ~0ULL;
constexpr unsigned kFarthest = ~0U;     // a rank
constexpr float kSumStart = 0x1.8p23F;  // of products of quantised codes: multiply_all()

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

// Floats (not NaN) in their order, and back.
__device__ inline unsigned rank_of(float x) {
  const unsigned bits = __float_as_uint(x);
  return bits >> 31 ? ~bits : bits | 0x80000000U;
}

__device__ inline float value_of(unsigned rank) {
  return __uint_as_float(rank >> 31 ? rank & 0x7fffffffU : ~rank);
}

// How near a group is to a query, by signs: their dot product, the more the nearer.
struct SignRule {
  using Value = int;
  static constexpr Value kWorst = -1000;

  __device__ static bool is_nearer(Value a, Value b) { return a > b; }

  __device__ static unsigned rank(Value x) { return static_cast<unsigned>(kSigns - x); }

  // What passes has a lower rank.
  __device__ static Value bar(unsigned rank) {
    return rank == kFarthest ? kWorst : kSigns - static_cast<int>(rank);
  }
};

// By quantised vectors: their squared distance.
struct QuantRule {
  using Value = float;
  static constexpr Value kWorst = INFINITY;

  __device__ static bool is_nearer(Value a, Value b) { return a < b; }

  __device__ static unsigned rank(Value x) { return rank_of(x); }

  __device__ static Value bar(unsigned rank) {
    return rank == kFarthest ? INFINITY : value_of(rank);
  }
};

// A warp's list of each of its queries.
struct Lists {
  Word words[kQueries][kRoom];
  int counts[kQueries];
};

// Ranks of the best of every part: of a query 8 by each warp.
struct Parts {
  unsigned best[kQueries][kWarps * 8];
};

union Room {
  Lists lists[kWarps];
  Parts parts;
};

// Eight groups: codes as right operand; of two of them scale, scale, square, square, or
// inverse_of() one and the other.
template <int kBytes>
struct Step {
  uint4 code[kBytes / 64];  // 16 bytes a lane; codes are read as they lie
  float4 numbers;
};

// The codes of a warp's queries as left operands, what is known of them, and their bars.
//
// Quantised codes: d = s^2 + o^2 - 2 s o dot is below the bar b if dot is above
// (o^2 / 2o) / s + (s^2 - b) / s / 2o, in two multiply-adds of numbers that either the query or the
// group has. What rounding may do is given away, so that this refuses only what is too far; the
// others are looked at again, rounded as on the CPU.
template <int kBytes, bool kSignCodes>
class Queries {
 public:
  static constexpr int kChunks = kBytes / 64;
  using Rule = std::conditional_t<kSignCodes, SignRule, QuantRule>;
  using Value = typename Rule::Value;

  __device__ Queries(const Groups& g, int head, int first) {
    const int lane = threadIdx.x % 32, quad = lane / 4, in_quad = lane % 4;
    const int tokens = g.frames.tokens;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int token = min(first + tile * 16 + half * 8 + quad, tokens - 1);
        const int64_t row = static_cast<int64_t>(head) * tokens + token;
#pragma unroll
        for (int chunk = 0; chunk < kChunks; ++chunk)
          code_[tile][half][chunk] = *reinterpret_cast<const uint4*>(g.new_codes + row * kBytes +
                                                                     chunk * 64 + in_quad * 16);
        if constexpr (!kSignCodes) {
          scale_[tile][half] = g.new_scales[row];
          square_[tile][half] = g.new_squares[row];
        }
      }
    }
  }

  // Products with rows quad and quad + 8 of the tile and groups 2 in_quad and 2 in_quad + 1, row by
  // row. Sums that start at the bits of 1.5 * 2^23 are floats as they stand: |dot| < 2^22.
  __device__ void multiply_all(int tile, const Step<kBytes>& step, int (&dot)[4]) const {
    for (int& x : dot) x = kSignCodes ? 0 : 0x4b400000;  // bits of kSumStart
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const uint4 low = code_[tile][0][chunk], high = code_[tile][1][chunk], b = step.code[chunk];
      multiply(dot, low.x, high.x, low.y, high.y, b.x, b.y);
      multiply(dot, low.z, high.z, low.w, high.w, b.z, b.w);
    }
  }

  // Of the i-th product; numbers: scales and squares.
  __device__ Value value(int tile, int i, int dot, const float4& numbers) const {
    if constexpr (kSignCodes) {
      return dot;
    } else {
      const float scale = i % 2 ? numbers.y : numbers.x;
      const float square = i % 2 ? numbers.w : numbers.z;
      const float product = __fmul_rn(__fmul_rn(__fmul_rn(2.0F, scale_[tile][i / 2]), scale),
                                      __fsub_rn(__int_as_float(dot), kSumStart));
      return __fsub_rn(__fadd_rn(square_[tile][i / 2], square), product);
    }
  }

  __device__ void set_bar(int tile, int half, Value bar) {
    bar_[tile][half] = bar;
    if constexpr (!kSignCodes) {
      const float scale = scale_[tile][half];
      inverse_[tile][half] = scale > 0 ? 1 / scale : 0;
      const float limit = (square_[tile][half] - bar) * inverse_[tile][half];
      limit_[tile][half] = scale > 0 ? fmaxf(limit - fabsf(limit) * 0x1p-20F, -1e30F) : -1e30F;
    }
  }

  __device__ Value bar(int tile, int half) const {
    return bar_[tile][half];
  }

  // Whether the i-th product may pass; numbers: inverses.
  __device__ bool may_pass(int tile, int i, int dot, const float4& numbers) const {
    if constexpr (kSignCodes) {
      return dot > bar_[tile][i / 2];
    } else {
      constexpr float kSlack = 4;
      const float inverse = i % 2 ? numbers.z : numbers.x;
      const float square = i % 2 ? numbers.w : numbers.y;
      const float least = fmaf(square, inverse_[tile][i / 2], kSumStart - kSlack);
      return __int_as_float(dot) > fmaf(limit_[tile][i / 2], inverse, least);
    }
  }

 private:
  uint4 code_[kTiles][2][kChunks];
  float scale_[kTiles][2], square_[kTiles][2], inverse_[kTiles][2], limit_[kTiles][2];
  Value bar_[kTiles][2];
};

// Reads what is known of one head's groups, eight at a time.
template <int kBytes, bool kSignCodes>
class Steps {
 public:
  __device__ Steps(const Groups& g, int head)
      : pages_(g.pages + static_cast<int64_t>(head) * g.most_pages),
        codes_(g.codes),
        scales_(g.scales),
        squares_(g.squares),
        inverses_(g.inverses) {}

  // Calls body(at, step) for at = begin, begin + stride, ... < end; loads run ahead. kExact: steps
  // come with scales and squares, else with inverses.
  template <bool kExact, typename Body>
  __device__ void for_each(int begin, int end, int stride, const Body& body) const {
    constexpr int kAhead = 2;
    if (begin >= end) return;
    Step<kBytes> ahead[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) ahead[i] = load<kExact>(min(begin + i * stride, end - 1));
    for (int at = begin; at < end; at += kAhead * stride) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int own = at + i * stride;
        if (own >= end) break;
        const Step<kBytes> step = ahead[i];
        ahead[i] = load<kExact>(min(own + kAhead * stride, end - 1));
        body(own, step);
      }
    }
  }

  // Scales and squares.
  __device__ float4 numbers(int at) const {
    if constexpr (kSignCodes) {
      return {};
    } else {
      const int64_t row = row_of_step(at) + 2 * (threadIdx.x % 4);
      const float2 scale = __ldg(reinterpret_cast<const float2*>(scales_ + row));
      const float2 square = __ldg(reinterpret_cast<const float2*>(squares_ + row));
      return {scale.x, scale.y, square.x, square.y};
    }
  }

 private:
  __device__ int64_t row_of_step(int at) const {
    constexpr int kPerPage = kPageKeys / kStep;
    return int64_t{__ldg(pages_ + at / kPerPage)} * kPageKeys + at % kPerPage * kStep;
  }

  template <bool kExact>
  __device__ Step<kBytes> load(int at) const {
    const int lane = threadIdx.x % 32;
    const int64_t row = row_of_step(at);
    const int8_t* code = codes_ + (row + lane / 4) * kBytes + lane % 4 * 16;
    Step<kBytes> out;
#pragma unroll
    for (int chunk = 0; chunk < kBytes / 64; ++chunk)
      out.code[chunk] = __ldg(reinterpret_cast<const uint4*>(code + chunk * 64));
    if constexpr (kExact)
      out.numbers = numbers(at);
    else if constexpr (!kSignCodes)
      out.numbers = __ldg(reinterpret_cast<const float4*>(inverses_ + row + 2 * (lane % 4)));
    return out;
  }

  const int32_t* pages_;
  const int8_t* codes_;
  const float *scales_, *squares_;
  const float2* inverses_;
};

// Whether the group's key would stay within the error of all its members. By a warp.
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

// A warp: exact distances of the candidates that its first lanes hold, from the nearest on.
template <int D>
__device__ void write_candidates(const Groups& g, int head, int token, Word best) {
  const int lane = threadIdx.x % 32;
  const int64_t key = static_cast<int64_t>(head) * g.frames.tokens + token;
  int64_t rows[kCandidates];
  int groups[kCandidates];
  float squares[kCandidates] = {};
#pragma unroll
  for (int i = 0; i < kCandidates; ++i) {
    const Word word = __shfl_sync(~0U, best, i);
    groups[i] = word == kNone ? -1 : static_cast<int>(word & 0xffffffffU);
    rows[i] = groups[i] < 0 ? 0 : row_of(g, head, groups[i]);
  }
#pragma unroll
  for (int d = lane; d < D; d += 32) {
    const float own = g.new_mapped[key * D + d];
#pragma unroll
    for (int i = 0; i < kCandidates; ++i) {
      const float way = own - (groups[i] < 0 ? 0.0F : g.mapped[rows[i] * D + d]);
      squares[i] = fmaf(way, way, squares[i]);
    }
  }
  float own_square = INFINITY;
  int own_group = -1;
#pragma unroll
  for (int i = 0; i < kCandidates; ++i) {
    const float square = warp_sum(squares[i]);
    bool near = groups[i] >= 0 && square < g.most_square;
    if (near) near = may_join<D>(g, key, rows[i]);
    if (lane != i) continue;
    own_group = groups[i];
    own_square = near ? square : INFINITY;
  }
  int place = 0;
#pragma unroll
  for (int i = 0; i < kCandidates; ++i) {
    const float square = __shfl_sync(~0U, own_square, i);
    const int group = __shfl_sync(~0U, own_group, i);
    const bool is_before =
        square < own_square ||
        (square == own_square && (group < own_group || (group == own_group && i < lane)));
    place += is_before ? 1 : 0;
  }
  if (lane >= kCandidates) return;
  g.candidates[key * kCandidates + place] = own_group;
  g.distances[key * kCandidates + place] = own_square;
}

// kBytes: of a code. kSignCodes: by hashing. kShares: warps that share the groups of the same
// queries. Grid: tiles of queries, heads, layers.
template <int D, int kBytes, bool kSignCodes, int kShares>
__global__ void __launch_bounds__(kWarps * 32, 2)
    search_kernel(const Groups* __restrict__ layers, int step) {
  using Own = Queries<kBytes, kSignCodes>;
  using Rule = typename Own::Rule;
  using Value = typename Rule::Value;
  extern __shared__ uint4 memory[];
  auto& room = *reinterpret_cast<Room*>(memory);
  const Groups& g = layers[blockIdx.z];
  if (!retiring(g, step).is_due) return;
  const int head = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int quad = lane / 4, in_quad = lane % 4;
  const int share = warp % kShares;
  const int tokens = g.frames.tokens;
  const int first = (blockIdx.x * (kWarps / kShares) + warp / kShares) * kQueries;
  if (first >= tokens) return;  // of all warps that share
  const int size = g.most_square > 0 ? g.sizes[head] : 0;
  Own queries(g, head, first);
  const Steps<kBytes, kSignCodes> steps(g, head);
  // Shares are every kShares-th step.
  const int all_steps = (size + kStep - 1) / kStep, full_steps = size / kStep;

  // The first bar.
  Value best[kTiles][4];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    for (Value& x : best[tile]) x = Rule::kWorst;
  }
  constexpr int kEnough = 512;  // steps of which every one is looked at
  const int apart = min(max(full_steps / kEnough, 1), 4);
  steps.template for_each<true>(
      share, full_steps, kShares * apart, [&](int, const Step<kBytes>& groups) {
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          int dot[4];
          queries.multiply_all(tile, groups, dot);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const Value x = queries.value(tile, i, dot[i], groups.numbers);
            if (Rule::is_nearer(x, best[tile][i])) best[tile][i] = x;
          }
        }
      });
  if constexpr (kShares == 1) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Value a = best[tile][2 * half], b = best[tile][2 * half + 1];
        Value last = Rule::is_nearer(a, b) ? b : a;
        for (int way = 1; way < 4; way *= 2) {
          const Value other = __shfl_xor_sync(~0U, last, way);
          if (Rule::is_nearer(last, other)) last = other;
        }
        queries.set_bar(tile, half,
                        last == Rule::kWorst ? Rule::kWorst : Rule::bar(Rule::rank(last) + 1));
      }
    }
  } else {
    static_assert(kShares == kWarps, "parts of a block's warps");
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Value x = best[tile][i];
        room.parts.best[tile * 16 + i / 2 * 8 + quad][share * 8 + in_quad * 2 + i % 2] =
            x == Rule::kWorst ? kFarthest : Rule::rank(x);
      }
    }
    __syncthreads();
    constexpr int kOwn = kQueries / kWarps;
    unsigned last[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const unsigned* parts = room.parts.best[warp * kOwn + i];
      const Word found = best_of(static_cast<Word>(parts[lane]) << 32 | lane,
                                 static_cast<Word>(parts[32 + lane]) << 32 | (32 + lane));
      last[i] = static_cast<unsigned>(__shfl_sync(~0U, found, kCandidates - 1) >> 32);
    }
    __syncthreads();
    if (lane == 0) {
      for (int i = 0; i < kOwn; ++i) room.parts.best[warp * kOwn + i][0] = last[i];
    }
    __syncthreads();
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const unsigned rank = room.parts.best[tile * 16 + half * 8 + quad][0];
        queries.set_bar(tile, half, rank == kFarthest ? Rule::kWorst : Rule::bar(rank + 1));
      }
    }
    __syncthreads();
  }

  // What passes.
  Lists& own = room.lists[warp];
  own.counts[lane] = 0;
  __syncwarp();
  // The list of a query is cut to its best, by the whole warp.
  const auto cut = [&](int query) {
    Word* words = own.words[query];
    const int count = own.counts[query];
    __syncwarp();
    const Word found =
        best_of(lane < count ? words[lane] : kNone, lane + 32 < count ? words[lane + 32] : kNone);
    __syncwarp();
    if (lane < kCandidates) words[lane] = found;
    if (lane == 0) own.counts[query] = min(count, kCandidates);
    __syncwarp();
    const Word last = __shfl_sync(~0U, found, kCandidates - 1);
    if (last == kNone) return;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (query == tile * 16 + half * 8 + quad)
          queries.set_bar(tile, half, Rule::bar(static_cast<unsigned>(last >> 32)));
      }
    }
  };
  steps.template for_each<false>(
      share, all_steps, kShares, [&](int at, const Step<kBytes>& groups) {
        int dot[kTiles][4];
        bool any = false;
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          queries.multiply_all(tile, groups, dot[tile]);
#pragma unroll
          for (int i = 0; i < 4; ++i)
            any |= queries.may_pass(tile, i, dot[tile][i], groups.numbers);
        }
        if (!__any_sync(~0U, any)) return;
        const float4 numbers = steps.numbers(at);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int group = at * kStep + 2 * in_quad + i % 2;
            const Value x = queries.value(tile, i, dot[tile][i], numbers);
            if (!Rule::is_nearer(x, queries.bar(tile, i / 2)) || group >= size) continue;
            const int query = tile * 16 + i / 2 * 8 + quad;
            const int place = atomicAdd(&own.counts[query], 1);
            own.words[query][place] =
                static_cast<Word>(Rule::rank(x)) << 32 | static_cast<unsigned>(group);
          }
        }
        __syncwarp();
        unsigned full = __ballot_sync(~0U, own.counts[lane] > kRoom - kStep);
        for (; full != 0; full &= full - 1) cut(__ffs(static_cast<int>(full)) - 1);
      });

  // The best of all shares, exactly.
  if constexpr (kShares == 1) {
    __syncwarp();
    for (int query = 0; query < min(kQueries, tokens - first); ++query) {
      const Word* words = own.words[query];
      const int count = own.counts[query];
      const Word found =
          best_of(lane < count ? words[lane] : kNone, lane + 32 < count ? words[lane + 32] : kNone);
      write_candidates<D>(g, head, first + query, found);
    }
  } else {
    __syncthreads();
    constexpr int kOwn = kQueries / kWarps;
    for (int i = 0; i < kOwn; ++i) {
      const int query = warp * kOwn + i;
      if (first + query >= tokens) break;
      int counts[kShares], total = 0;
#pragma unroll
      for (int other = 0; other < kShares; ++other) {
        counts[other] = room.lists[other].counts[query];
        total += counts[other];
      }
      Word found = kNone;
      for (int begin = 0; begin < total; begin += 32) {
        Word word = kNone;
        int at = begin + lane;
#pragma unroll
        for (int other = 0; other < kShares; ++other) {
          if (at >= 0 && at < counts[other]) word = room.lists[other].words[query][at];
          at -= counts[other];
        }
        found = best_of(word, found);
      }
      write_candidates<D>(g, head, first + query, found);
    }
  }
}

}  // namespace

void search_groups(const GroupBatch& batch, int step, cudaStream_t stream) {
  const Groups& groups = *batch.host;
  const int tokens = groups.frames.tokens;
  const auto launch = [&](auto kernel, int shares) {
    const int block_queries = kWarps / shares * kQueries;
    const dim3 grid(static_cast<unsigned>((tokens + block_queries - 1) / block_queries),
                    static_cast<unsigned>(groups.layout.num_heads),
                    static_cast<unsigned>(batch.count));
    constexpr int kBytes = static_cast<int>(sizeof(Room));
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
          "search");
    kernel<<<grid, kWarps * 32, kBytes, stream>>>(batch.layers, step);
  };
  constexpr int kMany = 512;  // tokens of a frame
  for_head_dim(groups.layout.head_dim, [&]<int D>() {
    const bool shared = tokens <= kMany;
    if (groups.ann == AnnEngine::kLsh)
      shared ? launch(search_kernel<D, 64, true, kWarps>, kWarps)
             : launch(search_kernel<D, 64, true, 1>, 1);
    else
      shared ? launch(search_kernel<D, D, false, kWarps>, kWarps)
             : launch(search_kernel<D, D, false, 1>, 1);
  });
  check(cudaGetLastError(), "search");
}

}  // namespace longtake::cuda
