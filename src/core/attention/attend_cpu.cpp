// attend on the CPU, flash style (Dao et al. 2022) over packed pages.
//
// One task is one head and up to kTileQueries queries. Pages (16 KiB at D = 64 in bf16) are the
// outer loop, so each is read from memory once per tile and stays in the first-level cache while
// the tile's blocks of kRows queries go over it. A block is two small matrix products with the same
// register kernel: scores [rows, 64] = q k^T, then out [rows, D] += p v, with the softmax between.
// Both are bound by the dot-product units: 4 D flop per query and key against at most 4 D / 64
// bytes.
//
// The running maximum is lazy: accumulators are rescaled only when a score passes the reference by
// 2^kSlack, which after the first page is rare; probabilities up to 2^kSlack lose no precision.
// A row's result depends on its own pages alone: tiles and threads do not change a bit of it.
#include <algorithm>

#include "attention/attend.h"
#include "attention/tile.h"
#include "device/dispatch.h"
#include "device/parallel.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "attention/attend_cpu.cpp"
#include "hwy/foreach_target.h"  // stands first: it parses this file once per target

#include "hwy/highway.h"
#include "ops/simd-inl.h"

HWY_BEFORE_NAMESPACE();

namespace longtake::HWY_NAMESPACE {

using DF = hn::ScalableTag<float>;
using VF = hn::Vec<DF>;

constexpr bool kAvx512 = HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_AVX3_DL;
constexpr int kCols = 4;  // vectors of one register tile
constexpr int kRows =
    kAvx512 ? 6 : 3;  // its queries: kRows * kCols accumulators fill the registers
constexpr int kVectors =
    kPageTokens / static_cast<int64_t>(hn::MaxLanes(DF()));  // of one row of scores
constexpr float kSlack = 8.0F;                               // log2
constexpr float kNone = -1e30F;  // threshold of a row that has seen no key: any score passes
constexpr float kLog2E = 1.44269504088896340736F;

// The ways to multiply and add one element (f32) or one pair of elements (bf16) per lane.
struct DotF32 {
  using T = float;
  using Operand = VF;
  static constexpr int64_t kPair = 1;
  static constexpr int kDegree = 5;

  static HWY_INLINE Operand broadcast(const T* p) { return hn::Set(DF(), *p); }

  static HWY_INLINE Operand load(const T* p) { return hn::LoadU(DF(), p); }

  static HWY_INLINE VF mul_add(Operand a, Operand b, VF sum) { return hn::MulAdd(a, b, sum); }

  static HWY_INLINE void store(VF lo, VF hi, T* p) {
    hn::StoreU(lo, DF(), p);
    hn::StoreU(hi, DF(), p + hn::Lanes(DF()));
  }
};

// Machines without a bf16 dot product: halves of a pair become two f32 vectors.
struct DotBf16Wide {
  using T = bf16;

  struct Operand {
    VF even, odd;
  };

  static constexpr int64_t kPair = 2;
  static constexpr int kDegree = 3;

  static HWY_INLINE Operand split(hn::Vec<hn::RebindToUnsigned<DF>> pairs) {
    const hn::RebindToUnsigned<DF> du;
    return {hn::BitCast(DF(), hn::ShiftLeft<16>(pairs)),
            hn::BitCast(DF(), hn::And(pairs, hn::Set(du, 0xffff0000U)))};
  }

  static HWY_INLINE Operand broadcast(const T* p) {
    uint32_t pair;
    hwy::CopyBytes<4>(p, &pair);
    return split(hn::Set(hn::RebindToUnsigned<DF>(), pair));
  }

  static HWY_INLINE Operand load(const T* p) {
    return split(hn::LoadU(hn::RebindToUnsigned<DF>(), reinterpret_cast<const uint32_t*>(p)));
  }

  static HWY_INLINE VF mul_add(Operand a, Operand b, VF sum) {
    return hn::MulAdd(a.odd, b.odd, hn::MulAdd(a.even, b.even, sum));
  }

  static HWY_INLINE void store(VF lo, VF hi, T* p) {
    store_f32(DF(), lo, p);
    store_f32(DF(), hi, p + hn::Lanes(DF()));
  }
};

#if HWY_TARGET <= HWY_AVX3
// AVX512_BF16 is not among Highway 1.0.3's targets, so the two instructions are spelled out here;
// the caller has asked the CPU.
struct DotBf16Native {
  using T = bf16;
  using Operand = __m512i;
  static constexpr int64_t kPair = 2;
  static constexpr int kDegree = 3;

  static HWY_INLINE Operand broadcast(const T* p) {
    int32_t pair;
    hwy::CopyBytes<4>(p, &pair);
    return _mm512_set1_epi32(pair);
  }

  static HWY_INLINE Operand load(const T* p) { return _mm512_loadu_si512(p); }

  static HWY_INLINE VF mul_add(Operand a, Operand b, VF sum) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum.raw) : "v"(b), "v"(a));
    return sum;
  }

  static HWY_INLINE void store(VF lo, VF hi, T* p) {
    __m512i both;
    asm("vcvtne2ps2bf16 %2, %1, %0" : "=v"(both) : "v"(hi.raw), "v"(lo.raw));
    _mm512_storeu_si512(p, both);
  }
};
#endif

// 2^t for t <= kSlack, exactly 0 for t below -127 and -inf. A degree of 3 errs by 1e-4 (a
// probability is then rounded to bf16, 4e-3), 5 by 1e-7. Minimax fits of 2^f on [0, 1).
template <int kDegree>
HWY_INLINE VF exp2_lanes(VF t) {
  const DF d;
#if HWY_TARGET <= HWY_AVX3
  // t - floor(t); 0 for -inf. scalef multiplies by 2^floor(t).
  const VF f{_mm512_reduce_ps(t.raw, 1)};
#else
  t = hn::Max(t, hn::Set(d, -127.0F));
  const VF whole = hn::Floor(t);
  const VF f = hn::Sub(t, whole);
#endif
  VF p;
  if constexpr (kDegree == 3) {
    p = hn::Set(d, 0.0780243571F);
    p = hn::MulAdd(p, f, hn::Set(d, 0.226067736F));
    p = hn::MulAdd(p, f, hn::Set(d, 0.695833132F));
    p = hn::MulAdd(p, f, hn::Set(d, 0.99992528F));
  } else {
    p = hn::Set(d, 0.00187757805F);
    p = hn::MulAdd(p, f, hn::Set(d, 0.00898934372F));
    p = hn::MulAdd(p, f, hn::Set(d, 0.0558263076F));
    p = hn::MulAdd(p, f, hn::Set(d, 0.240153624F));
    p = hn::MulAdd(p, f, hn::Set(d, 0.693153072F));
    p = hn::MulAdd(p, f, hn::Set(d, 0.999999925F));
  }
#if HWY_TARGET <= HWY_AVX3
  return VF{_mm512_scalef_ps(p.raw, t.raw)};
#else
  // 2^-127 becomes an exponent of 0, the number 0.
  const auto exponent = hn::Add(hn::ConvertTo(hn::RebindToSigned<DF>(), whole),
                                hn::Set(hn::RebindToSigned<DF>(), 127));
  return hn::Mul(p, hn::BitCast(d, hn::ShiftLeft<23>(exponent)));
#endif
}

// The register kernel: c [kR, kC vectors] (+)= a [kR, size] b [size, ...], b packed in pairs as in
// kv/page.h with `b_width` elements (times the pair) from one step to the next.
template <class Dot, int kR, int kC>
HWY_INLINE void multiply(const typename Dot::T* HWY_RESTRICT a, int64_t a_stride,
                         const typename Dot::T* HWY_RESTRICT b, int64_t b_width, int64_t size,
                         bool accumulate, float* HWY_RESTRICT c, int64_t c_stride) {
  const DF d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  VF sum[kR][kC];
#pragma GCC unroll 8
  for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < kC; ++j)
      sum[r][j] = accumulate ? hn::LoadU(d, c + r * c_stride + j * lanes) : hn::Zero(d);
  }
  for (int64_t k = 0; k < size; k += Dot::kPair) {
    typename Dot::Operand column[kC];
#pragma GCC unroll 8
    for (int j = 0; j < kC; ++j) column[j] = Dot::load(b + k * b_width + j * lanes * Dot::kPair);
#pragma GCC unroll 8
    for (int r = 0; r < kR; ++r) {
      const auto row = Dot::broadcast(a + r * a_stride + k);
#pragma GCC unroll 8
      for (int j = 0; j < kC; ++j) sum[r][j] = Dot::mul_add(row, column[j], sum[r][j]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < kC; ++j) hn::StoreU(sum[r][j], d, c + r * c_stride + j * lanes);
  }
}

// The same for any width that is a multiple of the vector.
template <class Dot, int kR>
HWY_INLINE void multiply_wide(const typename Dot::T* a, int64_t a_stride, const typename Dot::T* b,
                              int64_t width, int64_t size, bool accumulate, float* c,
                              int64_t c_stride) {
  const auto lanes = static_cast<int64_t>(hn::Lanes(DF()));
  int64_t j = 0;
  for (; j + kCols * lanes <= width; j += kCols * lanes)
    multiply<Dot, kR, kCols>(a, a_stride, b + j * Dot::kPair, width, size, accumulate, c + j,
                             c_stride);
  for (; j < width; j += lanes)
    multiply<Dot, kR, 1>(a, a_stride, b + j * Dot::kPair, width, size, accumulate, c + j, c_stride);
}

// What a query carries from page to page, in the tile's scratch memory.
struct RowState {
  float* out;        // [D], relative to 2^reference
  float* sums;       // one vector of partial sums of probabilities
  float* reference;  // log2; probabilities are 2^(score - reference)
  float* threshold;  // scores above reference + threshold move the reference
};

// Moves the reference to the row's maximum `top` (above the old reference) and rescales.
HWY_NOINLINE void raise_reference(const RowState& row, float top, int64_t head_dim) {
  const DF d;
  const float rise = top - *row.reference;
  // A row that has seen no key holds zeros only; its "reference" is 0 and may also sink.
  const VF factor = exp2_lanes<5>(hn::Set(d, *row.threshold == kNone ? 0.0F : -rise));
  hn::StoreU(hn::Mul(hn::LoadU(d, row.sums), factor), d, row.sums);
  for (int64_t i = 0; i < head_dim; i += static_cast<int64_t>(hn::Lanes(d)))
    hn::StoreU(hn::Mul(hn::LoadU(d, row.out + i), factor), d, row.out + i);
  *row.reference = top;
  *row.threshold = kSlack;
}

// kR queries against one page.
template <class Dot, int kR>
HWY_INLINE void attend_block(const AttendTile& tile, const KvPage& page, int64_t first,
                             const float* bias, const RowState& state) {
  using T = typename Dot::T;
  const DF d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  const int64_t dim = tile.head_dim;
  HWY_ALIGN float scores[kR * kPageTokens];
  HWY_ALIGN T probabilities[kR * kPageTokens];
  const T* q = reinterpret_cast<const T*>(tile.q) + first * tile.row_stride;
  multiply_wide<Dot, kR>(q, tile.row_stride, reinterpret_cast<const T*>(page.keys), kPageTokens,
                         dim, /*accumulate=*/false, scores, kPageTokens);

  const VF scale = hn::Set(d, tile.scale * kLog2E);
  for (int r = 0; r < kR; ++r) {
    float* row = scores + r * kPageTokens;
    const RowState mine{state.out + (first + r) * dim, state.sums + (first + r) * lanes,
                        state.reference + first + r, state.threshold + first + r};
    const VF minus_reference = hn::Set(d, -*mine.reference);
    VF t[kVectors];  // log2 of the probabilities, relative to the reference
    VF top = hn::Set(d, kNone);
#pragma GCC unroll 16
    for (int j = 0; j < kVectors; ++j) {
      VF offset = minus_reference;
      if (bias != nullptr) offset = hn::Add(offset, hn::LoadU(d, bias + j * lanes));
      t[j] = hn::MulAdd(hn::LoadU(d, row + j * lanes), scale, offset);
      top = hn::Max(top, t[j]);
    }
    if (HWY_UNLIKELY(!hn::AllFalse(d, hn::Gt(top, hn::Set(d, *mine.threshold))))) {
      const float rise = hn::GetLane(hn::MaxOfLanes(d, top));
      raise_reference(mine, *mine.reference + rise, dim);
#pragma GCC unroll 16
      for (int j = 0; j < kVectors; ++j) t[j] = hn::Sub(t[j], hn::Set(d, rise));
    }
    VF sum = hn::LoadU(d, mine.sums);
#pragma GCC unroll 16
    for (int j = 0; j < kVectors; j += 2) {
      const VF lo = exp2_lanes<Dot::kDegree>(t[j]);
      const VF hi = exp2_lanes<Dot::kDegree>(t[j + 1]);
      sum = hn::Add(sum, hn::Add(lo, hi));
      Dot::store(lo, hi, probabilities + r * kPageTokens + j * lanes);
    }
    hn::StoreU(sum, d, mine.sums);
  }

  multiply_wide<Dot, kR>(probabilities, kPageTokens, reinterpret_cast<const T*>(page.values), dim,
                         kPageTokens, /*accumulate=*/true, state.out + first * dim, dim);
}

template <class Dot, int kR>
HWY_INLINE void attend_tail(int64_t rows, const AttendTile& tile, const KvPage& page, int64_t first,
                            const float* bias, const RowState& state) {
  if constexpr (kR > 0) {
    if (rows == kR)
      attend_block<Dot, kR>(tile, page, first, bias, state);
    else
      attend_tail<Dot, kR - 1>(rows, tile, page, first, bias, state);
  }
}

template <class Dot>
void attend_tile_with(const AttendTile& tile) {
  const DF d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  const int64_t dim = tile.head_dim;
  const int64_t count = tile.num_queries;
  const RowState state{tile.scratch, tile.scratch + count * dim,
                       tile.scratch + count * (dim + lanes),
                       tile.scratch + count * (dim + lanes + 1)};
  std::fill_n(tile.scratch, count * (dim + lanes + 1), 0.0F);
  std::fill_n(state.threshold, count, kNone);

  for (int64_t i = 0; i < tile.num_pages; ++i) {
    const KvPage& page = tile.pages[tile.selected != nullptr ? tile.selected[i] : i];
    HWY_ALIGN float scaled_bias[kPageTokens];
    const float* bias = nullptr;
    if (page.has_bias) {
      for (int64_t j = 0; j < kPageTokens; ++j) scaled_bias[j] = page.bias[j] * kLog2E;
      bias = scaled_bias;
    }
    int64_t first = 0;
    for (; first + kRows <= count; first += kRows)
      attend_block<Dot, kRows>(tile, page, first, bias, state);
    attend_tail<Dot, kRows - 1>(count - first, tile, page, first, bias, state);
  }

  for_float_type(tile.out_dtype, [&]<typename Out>() {
    for (int64_t r = 0; r < count; ++r) {
      const float sum = hn::GetLane(hn::SumOfLanes(d, hn::LoadU(d, state.sums + r * lanes)));
      const float inverse = sum > 0.0F ? 1.0F / sum : 0.0F;
      Out* out = reinterpret_cast<Out*>(tile.out) + r * tile.row_stride;
      for_lanes(static_cast<size_t>(dim), [&](auto dl, size_t i) HWY_ATTR {
        store_f32(dl,
                  hn::Mul(hn::LoadU(dl, state.out + r * dim + static_cast<int64_t>(i)),
                          hn::Set(dl, inverse)),
                  out + i);
      });
    }
  });
}

void attend_tile(const AttendTile& tile) {
  if (tile.dtype == DType::kF32) return attend_tile_with<DotF32>(tile);
#if HWY_TARGET <= HWY_AVX3
  static const bool native = __builtin_cpu_supports("avx512bf16");
  if (native) return attend_tile_with<DotBf16Native>(tile);
#endif
  attend_tile_with<DotBf16Wide>(tile);
}

}  // namespace longtake::HWY_NAMESPACE

HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace longtake::cpu {
namespace {

HWY_EXPORT(attend_tile);

constexpr int64_t kTileQueries = 128;
constexpr int64_t kCutQueries = 6;  // threads share a tile in steps of so many

}  // namespace

void attend(Context& ctx, View q, const KvView& kv, const Selection* selection, float scale,
            View out) {
  const int64_t queries = q.dim(0);
  const int64_t heads = q.dim(1);
  const int64_t dim = q.dim(2);
  const int64_t tile_queries = selection != nullptr ? selection->tile_queries : kTileQueries;
  const int64_t tiles = (queries + tile_queries - 1) / tile_queries;
  const int64_t scratch_floats = AttendTile::scratch_floats(std::min(queries, tile_queries), dim);
  const Workspace::Scope scope(ctx.workspace());
  const View scratch = ctx.workspace().take(DType::kF32, {ctx.threads(), scratch_floats});
  const auto attend_tile = HWY_DYNAMIC_DISPATCH(attend_tile);

  const auto tile_of = [&](int64_t task) {
    const int64_t head = task / tiles;
    const int64_t first = task % tiles * tile_queries;
    const int64_t offset = (first * heads + head) * dim;
    const PageList& list = kv.heads[static_cast<size_t>(head)];
    AttendTile tile;
    tile.dtype = q.dtype();
    tile.q = q.raw() + offset * static_cast<int64_t>(size_of(q.dtype()));
    tile.num_queries = std::min(tile_queries, queries - first);
    tile.head_dim = dim;
    tile.row_stride = heads * dim;
    tile.pages = list.data();
    tile.num_pages = static_cast<int64_t>(list.size());
    if (selection != nullptr) {
      const int32_t* row = selection->offsets.data() + task;
      tile.selected = selection->pages.data() + row[0];
      tile.num_pages = row[1] - row[0];
    }
    tile.scale = scale;
    tile.out_dtype = out.dtype();
    tile.out = out.raw() + offset * static_cast<int64_t>(size_of(out.dtype()));
    return tile;
  };

  // Heads remember very different amounts, so threads share the work by pages, not by heads: the
  // tiles stand in one line and are cut, between queries where need be, into parts of equal cost.
  const auto cost_of = [](const AttendTile& tile) {
    return (tile.num_pages + 1) * tile.num_queries;  // 1: what a tile costs without any page
  };
  int64_t total = 0;
  for (int64_t task = 0; task < heads * tiles; ++task) total += cost_of(tile_of(task));
  parallel_for(ctx, ctx.threads(), 1, [&](int64_t first_part, int64_t last_part) {
    float* own = scratch.data<float>() + omp_get_thread_num() * scratch_floats;
    const int64_t begin = total * first_part / ctx.threads();
    const int64_t end = total * last_part / ctx.threads();
    int64_t before = 0;
    for (int64_t task = 0; task < heads * tiles && before < end; ++task) {
      AttendTile tile = tile_of(task);
      const int64_t cost = cost_of(tile);
      const auto cut = [&](int64_t work) {
        const int64_t at = (work - before) * tile.num_queries / cost / kCutQueries * kCutQueries;
        return work >= before + cost ? tile.num_queries : std::max<int64_t>(0, at);
      };
      const int64_t from = cut(begin);
      const int64_t to = cut(end);
      before += cost;
      if (from >= to) continue;
      tile.q += from * tile.row_stride * static_cast<int64_t>(size_of(tile.dtype));
      tile.out += from * tile.row_stride * static_cast<int64_t>(size_of(tile.out_dtype));
      tile.num_queries = to - from;
      tile.scratch = own;
      attend_tile(tile);
    }
  });
}

}  // namespace longtake::cpu
#endif  // HWY_ONCE
