// Candidates of keys: codes of a frame's keys against codes of all groups of the head, then the
// exact distances of the few that look nearest.
//
// Both kinds of code are 8-bit vectors whose dot product ranks the groups: signs as +-1, of which
// 48 - dot is twice the number that differ, and quantised vectors, which with their scales give a
// squared distance. So the search is a product of matrices on the tensor cores, and what is left to
// do for a pair is one comparison with the query's bar: of signs the products start at what the bar
// wants, so that it is the sign of the sum. A warp keeps 32 queries; what passes a bar goes to the
// query's list in shared memory, of which each of the four lanes that see the query fills a part
// without asking the others, and a list with a part that is full is cut to its best 8, the last of
// which is the new bar.
//
// The first bar comes from a look at some of the groups that keeps no names: lanes and turns are
// disjoint parts, so that the 8th best of the parts' best is no better than the 8th best of all.
// What passes costs more than what does not, so the look is worth half of all groups where they are
// many. Where keys are few (a frame of a small model) the 8 warps of a block share the groups of
// the same 32 queries, their parts and their lists; where they are many every warp has queries of
// its own, and what the warps read of the groups they read together.
#include <cmath>
#include <type_traits>

#include "kv/device_groups.cuh"

namespace longtake::cuda {
namespace {

constexpr int kWarps = 8, kTiles = 2;  // at most of a block; of 16 queries, a warp's
constexpr int kQueries = kTiles * 16;  // of a warp
constexpr int kStep = 8;               // groups a warp looks at at once
constexpr int kPageSteps = kPageKeys / kStep;
constexpr int kRoom = 12;               // of a lane's part of a query's list
constexpr unsigned kFarthest = ~0U;     // a rank
constexpr float kSumStart = 0x1.8p23F;  // of products of quantised codes: multiply()

// D = A B + C: 16 x 32 and 32 x 8 of 8 bits.
__device__ inline void multiply_32(int (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                   uint32_t b0, uint32_t b1, const int (&c)[4]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%10,%11,%12,%13};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]),
        "r"(c[3]));
}

// D += A B: 16 x 16 and 16 x 8 of 8 bits.
__device__ inline void multiply_16(int (&d)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
  asm("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5}, {%6}, "
      "{%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a0), "r"(a1), "r"(b0));
}

__device__ inline unsigned warp_min(unsigned x) {
  return __reduce_min_sync(~0U, x);
}

__device__ inline unsigned long long warp_min(unsigned long long x) {
  const auto high = static_cast<unsigned>(x >> 32);
  const unsigned least = __reduce_min_sync(~0U, high);
  const unsigned low = high == least ? static_cast<unsigned>(x) : ~0U;
  return static_cast<unsigned long long>(least) << 32 | __reduce_min_sync(~0U, low);
}

// The least of two words of every lane, kCandidates times over; lane i keeps the i-th.
template <typename Word>
__device__ inline Word best_of(Word a, Word b) {
  constexpr Word kNone = ~Word{0};
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
  using Word = unsigned;  // rank above, group below
  static constexpr int kGroupBits = 25;
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
  using Word = unsigned long long;
  static constexpr int kGroupBits = 32;
  static constexpr Value kWorst = INFINITY;

  __device__ static bool is_nearer(Value a, Value b) { return a < b; }

  __device__ static unsigned rank(Value x) { return rank_of(x); }

  __device__ static Value bar(unsigned rank) {
    return rank == kFarthest ? INFINITY : value_of(rank);
  }
};

// A warp's list of each of its queries, in parts; counts: of those that are done.
template <typename Word>
struct Lists {
  Word words[kQueries][4][kRoom];
  uint8_t counts[kQueries][4];
};

// Ranks of the best of every part: of a query 8 by each warp.
struct Parts {
  unsigned best[kQueries][kWarps * 8];
};

template <typename Word>
union Room {
  Lists<Word> lists[kWarps];
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
  using Sums = int[4];  // rows quad and quad + 8 of a tile by groups 2 in_quad and 2 in_quad + 1

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

  // Products without regard to the bar. Sums of quantised codes start at the bits of 1.5 * 2^23 and
  // are floats as they stand: |dot| < 2^22.
  __device__ void multiply(int tile, const Step<kBytes>& step, Sums& sums) const {
    constexpr int kStart = kSignCodes ? 0 : 0x4b400000;  // bits of kSumStart
    multiply_from({kStart, kStart, kStart, kStart}, tile, step, sums);
  }

  // Products of which refusal() and value() are asked.
  __device__ void compare(int tile, const Step<kBytes>& step, Sums& sums) const {
    if constexpr (kSignCodes)
      multiply_from(start_[tile], tile, step, sums);
    else
      multiply(tile, step, sums);
  }

  // Of the i-th of multiply()'s sums; numbers: scales and squares.
  __device__ Value plain_value(int tile, int i, int sum, const float4& numbers) const {
    if constexpr (kSignCodes) {
      return sum;
    } else {
      const float scale = i % 2 ? numbers.y : numbers.x;
      const float square = i % 2 ? numbers.w : numbers.z;
      const float product = __fmul_rn(__fmul_rn(__fmul_rn(2.0F, scale_[tile][i / 2]), scale),
                                      __fsub_rn(__int_as_float(sum), kSumStart));
      return __fsub_rn(__fadd_rn(square_[tile][i / 2], square), product);
    }
  }

  // Of the i-th of compare()'s.
  __device__ Value value(int tile, int i, int sum, const float4& numbers) const {
    if constexpr (kSignCodes)
      return sum - start_[tile][i];
    else
      return plain_value(tile, i, sum, numbers);
  }

  __device__ void set_bar(int tile, int half, Value bar) {
    if constexpr (kSignCodes) {
      start_[tile][2 * half] = start_[tile][2 * half + 1] = -bar - 1;
    } else {
      bar_[tile][half] = bar;
      const float scale = scale_[tile][half];
      inverse_[tile][half] = scale > 0 ? 1 / scale : 0;
      const float limit = (square_[tile][half] - bar) * inverse_[tile][half];
      limit_[tile][half] = scale > 0 ? fmaxf(limit - fabsf(limit) * 0x1p-20F, -1e30F) : -1e30F;
    }
  }

  __device__ Value bar(int tile, int half) const {
    if constexpr (kSignCodes)
      return -start_[tile][2 * half] - 1;
    else
      return bar_[tile][half];
  }

  // Negative: none of a tile's sums can pass; numbers: inverses.
  __device__ int refusal(int tile, const Sums& sums, const float4& numbers) const {
    if constexpr (kSignCodes) {
      return sums[0] & sums[1] & sums[2] & sums[3];
    } else {
      constexpr float kSlack = 4;
      bool any = false;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float inverse = i % 2 ? numbers.z : numbers.x;
        const float square = i % 2 ? numbers.w : numbers.y;
        const float least = fmaf(square, inverse_[tile][i / 2], kSumStart - kSlack);
        any |= __int_as_float(sums[i]) > fmaf(limit_[tile][i / 2], inverse, least);
      }
      return any ? 0 : -1;
    }
  }

 private:
  // Of signs every fourth of a code has 12 bytes that count (code_byte_of() in device_groups.cuh).
  __device__ void multiply_from(const int (&start)[4], int tile, const Step<kBytes>& step,
                                Sums& sums) const {
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const uint4 low = code_[tile][0][chunk], high = code_[tile][1][chunk], b = step.code[chunk];
      if (chunk == 0)
        multiply_32(sums, low.x, high.x, low.y, high.y, b.x, b.y, start);
      else
        multiply_32(sums, low.x, high.x, low.y, high.y, b.x, b.y, sums);
      if constexpr (kSignCodes)
        multiply_16(sums, low.z, high.z, b.z);
      else
        multiply_32(sums, low.z, high.z, low.w, high.w, b.z, b.w, sums);
    }
  }

  uint4 code_[kTiles][2][kChunks];
  float scale_[kTiles][2], square_[kTiles][2], inverse_[kTiles][2], limit_[kTiles][2];
  Value bar_[kTiles][2];  // of quantised codes
  Sums start_[kTiles];    // of signs: sums that start here are not negative if they pass
};

// Reads what is known of one head's groups, eight at a time.
template <int kBytes, bool kSignCodes>
class Steps {
 public:
  __device__ Steps(const Groups& g, int head)
      : pages_(g.pages + static_cast<int64_t>(head) * g.most_pages),
        codes_(g.codes + threadIdx.x % 32 / 4 * kBytes + threadIdx.x % 4 * 16),
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

  // Calls body(at, pair, a, b, load) for every two of 0, kStride, 2 kStride, ... of all pages up to
  // the one of end - 1, whose last may lie behind the end: page after page, so that a step costs
  // one load and no search for its place. pair: 0, 1 in turn, or always 0; load() once a and b have
  // been read.
  template <bool kExact, int kStride, typename Body>
  __device__ void for_pairs(int end, const Body& body) const {
    constexpr int kPairs = kSignCodes ? 2 : 1;  // under way
    constexpr int kEach = 2 * kPairs;
    static_assert(kPageSteps % (kEach * kStride) == 0);
    const int pages = (end + kPageSteps - 1) / kPageSteps;
    if (pages == 0) return;
    Step<kBytes> ahead[kEach];
    int64_t row = row_of_page(0);
    const int8_t* code = codes_ + row * kBytes;
#pragma unroll
    for (int i = 0; i < kEach; ++i) ahead[i] = load<kExact>(code, row, i * kStride);
    for (int page = 0; page < pages; ++page) {
      const int64_t next_row = row_of_page(min(page + 1, pages - 1));
      const int8_t* const next_code = codes_ + next_row * kBytes;
#pragma unroll 1
      for (int at = 0; at < kPageSteps; at += kEach * kStride) {
        const bool turns = at + kEach * kStride == kPageSteps;
        code = turns ? next_code : code + kEach * kStride * kStep * kBytes;
        if constexpr (!kSignCodes) row = turns ? next_row : row + kEach * kStride * kStep;
#pragma unroll
        for (int i = 0; i < kEach; i += 2) {
          body(page * kPageSteps + at + i * kStride, i / 2, ahead[i], ahead[i + 1], [&] {
            ahead[i] = load<kExact>(code, row, i * kStride);
            ahead[i + 1] = load<kExact>(code, row, (i + 1) * kStride);
          });
        }
      }
    }
  }

  // Scales and squares.
  __device__ float4 numbers(int at) const {
    if constexpr (kSignCodes)
      return {};
    else
      return exact_numbers(row_of_step(at));
  }

 private:
  __device__ int64_t row_of_page(int page) const {
    return int64_t{__ldg(pages_ + page)} * kPageKeys;
  }

  __device__ int64_t row_of_step(int at) const {
    return row_of_page(at / kPageSteps) + at % kPageSteps * kStep;
  }

  __device__ float4 exact_numbers(int64_t row) const {
    row += 2 * (threadIdx.x % 4);
    const float2 scale = __ldg(reinterpret_cast<const float2*>(scales_ + row));
    const float2 square = __ldg(reinterpret_cast<const float2*>(squares_ + row));
    return {scale.x, scale.y, square.x, square.y};
  }

  template <bool kExact>
  __device__ Step<kBytes> load(int at) const {
    const int64_t row = row_of_step(at);
    return load<kExact>(codes_ + row * kBytes, row, 0);
  }

  // The step `ahead` of those that begin at a row; code: what this lane reads of the first.
  template <bool kExact>
  __device__ Step<kBytes> load(const int8_t* code, int64_t row, int ahead) const {
    Step<kBytes> out;
#pragma unroll
    for (int chunk = 0; chunk < kBytes / 64; ++chunk)
      out.code[chunk] =
          __ldg(reinterpret_cast<const uint4*>(code + ahead * kStep * kBytes) + 4 * chunk);
    row += ahead * kStep;
    if constexpr (kSignCodes)
      out.numbers = {};
    else if constexpr (kExact)
      out.numbers = exact_numbers(row);
    else
      out.numbers = __ldg(reinterpret_cast<const float4*>(inverses_ + row + 2 * (threadIdx.x % 4)));
    return out;
  }

  const int32_t* pages_;
  const int8_t* codes_;  // the lane's part of the first step's
  const float *scales_, *squares_;
  const float2* inverses_;
};

// Calls body.template operator()<T>() for the pages' type.
template <typename Body>
__device__ void for_format(const Groups& g, const Body& body) {
  if (g.layout.format == PageFormat::kF32)
    body.template operator()<float>();
  else
    body.template operator()<__nv_bfloat16>();
}

__device__ inline float square_between(float4 a, float4 b, float sum) {
  const float x = a.x - b.x, y = a.y - b.y, z = a.z - b.z, w = a.w - b.w;
  return fmaf(w, w, fmaf(z, z, fmaf(y, y, fmaf(x, x, sum))));
}

// Whether the group's key would stay within the error of all its members. By a warp.
template <typename T, int D>
__device__ bool may_join(const Groups& g, int64_t key, int64_t row) {
  const int d = threadIdx.x % 32 * 4;
  float square = 0;
  if (d < D)
    square = square_between(*reinterpret_cast<const float4*>(g.new_keys + key * D + d),
                            load_vector<T>(g.keys, row * D + d), 0);
  const float distance = sqrtf(warp_sum(square));
  const float share =
      g.key == GroupKey::kMean ? 1.0F / static_cast<float>(g.counts[row] + 1) : 1.0F;
  const float radius = fmaxf(g.radii[row] + share * distance, (1 - share) * distance);
  return static_cast<double>(__int_as_float(*g.longest_query)) * radius <=
         static_cast<double>(g.most_error);
}

// The i-th of kCount sums over all lanes, in lanes i and beyond, kCount apart.
template <int kCount>
__device__ float warp_sums(float (&x)[kCount]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = kCount / 2; half > 0; half /= 2) {
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const bool upper = (lane & half) != 0;
      const float sent = upper ? x[i] : x[i + half];
      x[i] = (upper ? x[i + half] : x[i]) + __shfl_xor_sync(~0U, sent, half);
    }
  }
  float sum = x[0];
#pragma unroll
  for (int way = kCount; way < 32; way *= 2) sum += __shfl_xor_sync(~0U, sum, way);
  return sum;
}

// A warp: exact distances of the candidates, whose groups its first lanes hold (-1: none), from the
// nearest on.
template <int D>
__device__ void write_candidates(const Groups& g, int head, int token, int group) {
  const int lane = threadIdx.x % 32;
  const int64_t key = static_cast<int64_t>(head) * g.frames.tokens + token;
  if (lane >= kCandidates) group = -1;
  const int64_t row = group < 0 ? 0 : row_of(g, head, group);
  float squares[kCandidates] = {};
  const int d = lane * 4;
  for_format(g, [&]<typename T>() {
    const float4 own = d < D ? load_mapped<T>(g.new_mapped, key * D + d) : float4{};
#pragma unroll
    for (int i = 0; i < kCandidates; ++i) {
      const int64_t other = __shfl_sync(~0U, row, i);
      if (d < D) squares[i] = square_between(own, load_mapped<T>(g.mapped, other * D + d), 0);
    }
  });
  float square = warp_sums(squares);  // lane i: the i-th
  bool near = group >= 0 && square < g.most_square;
  if (g.most_error != 0) {
    for (unsigned left = __ballot_sync(~0U, near); left != 0; left &= left - 1) {
      const int i = __ffs(static_cast<int>(left)) - 1;
      bool joins = false;
      for_format(g,
                 [&]<typename T>() { joins = may_join<T, D>(g, key, __shfl_sync(~0U, row, i)); });
      if (lane == i) near = joins;
    }
  }
  if (!near) square = INFINITY;
  int place = 0;
#pragma unroll
  for (int i = 0; i < kCandidates; ++i) {
    const float other = __shfl_sync(~0U, square, i);
    const int other_group = __shfl_sync(~0U, group, i);
    const bool is_before =
        other < square ||
        (other == square && (other_group < group || (other_group == group && i < lane)));
    place += is_before ? 1 : 0;
  }
  if (lane >= kCandidates) return;
  g.candidates[key * kCandidates + place] = group;
  g.distances[key * kCandidates + place] = square;
}

// The 8th best of a query's 16 parts, of which every lane of a quad has four.
template <typename Rule>
__device__ typename Rule::Value eighth_of(const typename Rule::Value (&own)[4]) {
  using Value = typename Rule::Value;
  int as_near[4] = {};
#pragma unroll
  for (int way = 0; way < 4; ++way) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const Value other = way == 0 ? own[j] : __shfl_xor_sync(~0U, own[j], way);
#pragma unroll
      for (int k = 0; k < 4; ++k) as_near[k] += Rule::is_nearer(own[k], other) ? 0 : 1;
    }
  }
  Value best = Rule::kWorst;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if (as_near[k] >= kCandidates && Rule::is_nearer(own[k], best)) best = own[k];
  }
#pragma unroll
  for (int way = 1; way < 4; way *= 2) {
    const Value other = __shfl_xor_sync(~0U, best, way);
    if (Rule::is_nearer(other, best)) best = other;
  }
  return best;
}

// kBytes: of a code. kSignCodes: by hashing. kShares: warps that share the groups of the same
// queries. Grid: tiles of queries, heads, layers.
template <int D, int kBytes, bool kSignCodes, int kShares>
__global__ void __launch_bounds__(kWarps * 32, kSignCodes ? 3 : 2)
    search_kernel(const Groups* __restrict__ layers, int step) {
  using Own = Queries<kBytes, kSignCodes>;
  using Rule = typename Own::Rule;
  using Value = typename Rule::Value;
  using Word = typename Rule::Word;
  using Sums = typename Own::Sums;
  constexpr Word kNone = ~Word{0};
  extern __shared__ uint4 memory[];
  auto& room = *reinterpret_cast<Room<Word>*>(memory);
  const Groups& g = layers[blockIdx.z];
  if (!retiring(g, step).is_due) return;
  const int head = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int quad = lane / 4, in_quad = lane % 4;
  const int share = warp % kShares;
  const int tokens = g.frames.tokens;
  const int first = (blockIdx.x * (blockDim.x / 32 / kShares) + warp / kShares) * kQueries;
  if (first >= tokens) return;  // of all warps that share
  const int size = g.most_square > 0 ? g.sizes[head] : 0;
  Own queries(g, head, first);
  const Steps<kBytes, kSignCodes> steps(g, head);
  const int all_steps = (size + kStep - 1) / kStep, full_steps = size / kStep;
  constexpr int kEnough = 512;  // steps of which every one is looked at

  // The first bar.
  if constexpr (kShares == 1) {
    Value best[4][kTiles][2];  // of turns of signs, and of turns and columns
#pragma unroll
    for (auto& part : best) {
#pragma unroll
      for (auto& tile : part) tile[0] = tile[1] = Rule::kWorst;
    }
    const auto look = [&](auto stride) {
      constexpr int kStride = decltype(stride)::value;
      steps.template for_pairs<true, kStride>(
          full_steps,
          [&](int at, int pair, const Step<kBytes>& a, const Step<kBytes>& b, const auto& load) {
            Sums sums[2][kTiles];
            const float4 numbers[2] = {a.numbers, b.numbers};
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile) {
              queries.multiply(tile, a, sums[0][tile]);
              queries.multiply(tile, b, sums[1][tile]);
            }
            load();
#pragma unroll
            for (int turn = 0; turn < 2; ++turn) {
              if (at + turn * kStride >= full_steps) break;
#pragma unroll
              for (int tile = 0; tile < kTiles; ++tile) {
                const Sums& own = sums[turn][tile];
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                  if constexpr (kSignCodes) {
                    Value& most = best[2 * pair + turn][tile][half];
                    most = __vimax3_s32(most, own[2 * half], own[2 * half + 1]);
                  } else {
#pragma unroll
                    for (int column = 0; column < 2; ++column) {
                      const int i = 2 * half + column;
                      Value& least = best[2 * turn + column][tile][half];
                      least = fminf(least, queries.plain_value(tile, i, own[i], numbers[turn]));
                    }
                  }
                }
              }
            }
          });
    };
    if (full_steps > kEnough)
      look(std::integral_constant<int, 2>());
    else
      look(std::integral_constant<int, 1>());
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Value own[4] = {best[0][tile][half], best[1][tile][half], best[2][tile][half],
                              best[3][tile][half]};
        const Value last = eighth_of<Rule>(own);
        queries.set_bar(tile, half,
                        last == Rule::kWorst ? Rule::kWorst : Rule::bar(Rule::rank(last) + 1));
      }
    }
  } else {
    static_assert(kShares == kWarps, "parts of a block's warps");
    Value best[kTiles][4];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      for (Value& x : best[tile]) x = Rule::kWorst;
    }
    // Shares are every kShares-th step.
    const int apart = min(max(full_steps / kEnough, 1), 4);
    steps.template for_each<true>(
        share, full_steps, kShares * apart, [&](int, const Step<kBytes>& groups) {
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile) {
            Sums sums;
            queries.multiply(tile, groups, sums);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const Value x = queries.plain_value(tile, i, sums[i], groups.numbers);
              if (Rule::is_nearer(x, best[tile][i])) best[tile][i] = x;
            }
          }
        });
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
      using Ranked = unsigned long long;  // parts may have one rank
      const Ranked found = best_of(static_cast<Ranked>(parts[lane]) << 32 | lane,
                                   static_cast<Ranked>(parts[32 + lane]) << 32 | (32 + lane));
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

  // What passes. held: of the lane's parts of lists how much, a byte each of (tile, half).
  Lists<Word>& own = room.lists[warp];
  unsigned held = 0;
  const auto held_of = [](unsigned all, int part) {
    return static_cast<int>(all >> 8 * part & 255);
  };
  const auto rank_in = [](Word word) { return static_cast<unsigned>(word >> Rule::kGroupBits); };
  const auto group_in = [](Word word) {
    return word == kNone ? -1 : static_cast<int>(word & ((Word{1} << Rule::kGroupBits) - 1));
  };
  const auto query_of = [](int part, int of_quad) { return part * 8 + of_quad; };
  // The best of the list of a quad's query, by the whole warp.
  const auto best_in = [&](int part, int of_quad) {
    const auto& words = own.words[query_of(part, of_quad)];
    Word two[2];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int at = lane + 32 * n, lane_part = min(at / kRoom, 3);
      const int count = held_of(__shfl_sync(~0U, held, of_quad * 4 + lane_part), part);
      two[n] = at < 4 * kRoom && at % kRoom < count ? words[lane_part][at % kRoom] : kNone;
    }
    static_assert(4 * kRoom <= 64);
    return best_of(two[0], two[1]);
  };
  const auto cut = [&](int part, int of_quad) {
    __syncwarp();
    const Word found = best_in(part, of_quad);
    __syncwarp();
    constexpr int kEach = kCandidates / 4;
    if (lane < kCandidates) own.words[query_of(part, of_quad)][lane / kEach][lane % kEach] = found;
    __syncwarp();
    const unsigned kept = __ballot_sync(~0U, found != kNone) & ((1U << kCandidates) - 1);
    const Word last = __shfl_sync(~0U, found, kCandidates - 1);
    if (quad != of_quad) return;
    const auto count = static_cast<unsigned>(__popc(kept >> kEach * in_quad & ((1U << kEach) - 1)));
    held = (held & ~(255U << 8 * part)) | count << 8 * part;
    if (last == kNone) return;
#pragma unroll
    for (int p = 0; p < 2 * kTiles; ++p) {
      if (p == part) queries.set_bar(p / 2, p % 2, Rule::bar(rank_in(last)));
    }
  };
  // Of the lane's sums of a step and tile those that do.
  const auto take = [&](int at, int tile, const Sums& sums) {
    const float4 numbers = steps.numbers(at);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int group = at * kStep + 2 * in_quad + i % 2, part = 2 * tile + i / 2;
      const Value x = queries.value(tile, i, sums[i], numbers);
      if (!Rule::is_nearer(x, queries.bar(tile, i / 2)) || group >= size) continue;
      own.words[query_of(part, quad)][in_quad][held_of(held, part)] =
          static_cast<Word>(Rule::rank(x)) << Rule::kGroupBits | static_cast<Word>(group);
      held += 1U << 8 * part;
    }
  };
  // A part takes up to four words of two steps.
  const auto cut_full = [&] {
    const auto full = [&] {
      constexpr unsigned kMost = 127 - (kRoom - 4);
      return (held + kMost * 0x01010101U & 0x80808080U);
    };
    for (unsigned lanes = __ballot_sync(~0U, full() != 0); lanes != 0;
         lanes = __ballot_sync(~0U, full() != 0)) {
      const int first_lane = __ffs(static_cast<int>(lanes)) - 1;
      const unsigned parts = __shfl_sync(~0U, full(), first_lane);
      cut((__ffs(static_cast<int>(parts)) - 8) / 8, first_lane / 4);
    }
  };
  if constexpr (kShares == 1) {
    steps.template for_pairs<false, 1>(all_steps, [&](int at, int /*pair*/, const Step<kBytes>& a,
                                                      const Step<kBytes>& b, const auto& load) {
      Sums sums[2][kTiles];
      int refused[2][kTiles];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        queries.compare(tile, a, sums[0][tile]);
        queries.compare(tile, b, sums[1][tile]);
        refused[0][tile] = queries.refusal(tile, sums[0][tile], a.numbers);
        refused[1][tile] = queries.refusal(tile, sums[1][tile], b.numbers);
      }
      load();
      const int all = refused[0][0] & refused[0][1] & refused[1][0] & refused[1][1];
      if (__all_sync(~0U, all < 0)) return;
      if (all >= 0) {
#pragma unroll
        for (int turn = 0; turn < 2; ++turn) {
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile) {
            if (refused[turn][tile] >= 0) take(at + turn, tile, sums[turn][tile]);
          }
        }
      }
      cut_full();
    });
  } else {
    steps.template for_each<false>(
        share, all_steps, kShares, [&](int at, const Step<kBytes>& groups) {
          Sums sums[kTiles];
          int refused[kTiles];
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile) {
            queries.compare(tile, groups, sums[tile]);
            refused[tile] = queries.refusal(tile, sums[tile], groups.numbers);
          }
          const int all = refused[0] & refused[1];
          if (__all_sync(~0U, all < 0)) return;
          if (all >= 0) {
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile) {
              if (refused[tile] >= 0) take(at, tile, sums[tile]);
            }
          }
          cut_full();
        });
  }

  // The best of all shares, exactly.
  __syncwarp();
  if constexpr (kShares == 1) {
    for (int query = 0; query < min(kQueries, tokens - first); ++query)
      write_candidates<D>(g, head, first + query, group_in(best_in(query / 8, query % 8)));
  } else {
#pragma unroll
    for (int part = 0; part < 2 * kTiles; ++part)
      own.counts[query_of(part, quad)][in_quad] = static_cast<uint8_t>(held_of(held, part));
    __syncthreads();
    constexpr int kOwn = kQueries / kWarps;
    static_assert(kShares * 4 == 32, "a lane for every part of a query's lists");
    for (int i = 0; i < kOwn; ++i) {
      const int query = warp * kOwn + i;
      if (first + query >= tokens) break;
      const Lists<Word>& list = room.lists[lane / 4];
      const int count = list.counts[query][lane % 4];
      const int most = __reduce_max_sync(~0U, count);
      Word found = kNone;
      for (int n = 0; n < most; ++n)
        found = best_of(n < count ? list.words[query][lane % 4][n] : kNone, found);
      write_candidates<D>(g, head, first + query, group_in(found));
    }
  }
}

}  // namespace

void search_groups(const GroupBatch& batch, int step, cudaStream_t stream) {
  const Groups& groups = *batch.host;
  const int tokens = groups.frames.tokens;
  // Blocks of warps with queries of their own are as alike as the number of tokens allows.
  const int warps = (tokens + kQueries - 1) / kQueries, blocks = (warps + kWarps - 1) / kWarps;
  const auto launch = [&](auto kernel, int shares, size_t bytes) {
    const bool shared = shares > 1;
    const dim3 grid(static_cast<unsigned>(shared ? warps : blocks),
                    static_cast<unsigned>(groups.layout.num_heads),
                    static_cast<unsigned>(batch.count));
    const int block_warps = shared ? kWarps : (warps + blocks - 1) / blocks;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(bytes)),
          "search");
    kernel<<<grid, block_warps * 32, bytes, stream>>>(batch.layers, step);
  };
  constexpr int kMany = 512;  // tokens of a frame
  constexpr size_t kSigned = sizeof(Room<SignRule::Word>),
                   kQuantised = sizeof(Room<QuantRule::Word>);
  for_head_dim(groups.layout.head_dim, [&]<int D>() {
    const bool shared = tokens <= kMany;
    if (groups.ann == AnnEngine::kLsh)
      shared ? launch(search_kernel<D, 64, true, kWarps>, kWarps, kSigned)
             : launch(search_kernel<D, 64, true, 1>, 1, kSigned);
    else
      shared ? launch(search_kernel<D, D, false, kWarps>, kWarps, kQuantised)
             : launch(search_kernel<D, D, false, 1>, 1, kQuantised);
  });
  check(cudaGetLastError(), "search");
}

}  // namespace longtake::cuda
