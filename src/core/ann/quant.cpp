#include "ann/quant.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "ann/short_list.h"
#include "base/error.h"

namespace longtake {
namespace {

constexpr int64_t kBlock = 16;  // slots whose coarse channels lie side by side
constexpr int64_t kQuad = 4;    // channels side by side
constexpr int64_t kCoarse = 8;
constexpr int64_t kFirstChoice = 64;  // slots that coarse channels are first chosen by
constexpr int kOffset = 128;  // makes a query's numbers unsigned, as the widest product wants them

// A query's integers, in the three forms that products want: as they are, without their signs, and
// raised by kOffset.
struct QueryCode {
  const int8_t* code;
  const uint8_t* size;
  const uint8_t* raised;
};

// Vectors of `dim` integers each, and what a raised query adds to their products.
struct CodeRows {
  const int8_t* codes;
  const int32_t* offsets;
  int64_t dim;
};

// The coarse channels of some blocks of slots, and a query of which nothing beyond `within` is
// wanted.
struct CoarseScan {
  const int8_t* codes;
  const float* scales;
  const float* squares;
  const int32_t* offsets;
  int64_t blocks, quads;
  QueryCode query;
  float scale, square, within;
};

// Integers all: every instruction set gives the same.
//
// dots: out[i] = row slots[i] . query. |.| <= 127 * 127 * dim fits easily.
// near: near[...] = slots, counted from the first of the scan, that are within the distance;
// returns how many.

void dots_plain(const CodeRows& rows, const QueryCode& query, const int32_t* slots, int64_t count,
                int32_t* out) {
  for (int64_t i = 0; i < count; ++i) {
    const int8_t* code = rows.codes + slots[i] * rows.dim;
    out[i] = 0;
    for (int64_t d = 0; d < rows.dim; ++d) out[i] += int32_t{code[d]} * int32_t{query.code[d]};
  }
}

int64_t near_plain(const CoarseScan& scan, int32_t* near) {
  int64_t count = 0;
  const int8_t* codes = scan.codes;
  for (int64_t begin = 0; begin < scan.blocks * kBlock; begin += kBlock) {
    std::array<int32_t, kBlock> dots{};
    for (int64_t quad = 0; quad < scan.quads; ++quad) {
      for (int32_t& dot : dots) {
        for (int64_t c = 0; c < kQuad; ++c)
          dot += int32_t{*codes++} * int32_t{scan.query.code[quad * kQuad + c]};
      }
    }
    for (int64_t i = 0; i < kBlock; ++i) {
      const float distance = scan.square + scan.squares[begin + i] -
                             2 * scan.scale * scan.scales[begin + i] *
                                 static_cast<float>(dots[static_cast<size_t>(i)]);
      if (distance < scan.within) near[count++] = static_cast<int32_t>(begin + i);
    }
  }
  return count;
}

// The products of one instruction set.
struct Products {
  decltype(&dots_plain) dots;
  decltype(&near_plain) near;
};

#if defined(__x86_64__)
#define LONGTAKE_AVX2 [[gnu::target("avx2,fma")]]
#define LONGTAKE_VNNI [[gnu::target("avx2,fma,avx512f,avx512bw,avx512vl,avx512vnni")]]

// sums + a . b in quads. Sizes times signed: no pair of products leaves 16 bits, since neither side
// exceeds 127.
LONGTAKE_AVX2 inline __m256i add_quads(__m256i sums, __m256i code, __m256i sizes, __m256i query) {
  const __m256i pairs = _mm256_maddubs_epi16(sizes, _mm256_sign_epi8(code, query));
  return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

LONGTAKE_AVX2 inline __m256i load_bytes(const void* bytes) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(bytes));
}

// The sum of each of four.
LONGTAKE_AVX2 inline __m128i add_up(__m256i a, __m256i b, __m256i c, __m256i d) {
  const __m256i halves = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
  return _mm_add_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
}

// The codes of four slots from slots[at] on; what is missing of the last four is the last row
// again.
inline std::array<const int8_t*, 4> four_rows(const CodeRows& rows, const int32_t* slots,
                                              int64_t at, int64_t count) {
  std::array<const int8_t*, 4> four;
  for (int64_t row = 0; row < 4; ++row)
    four[static_cast<size_t>(row)] = rows.codes + slots[std::min(at + row, count - 1)] * rows.dim;
  return four;
}

LONGTAKE_AVX2 void dots_avx2(const CodeRows& rows, const QueryCode& query, const int32_t* slots,
                             int64_t count, int32_t* out) {
  constexpr int64_t kLanes = 32;
  for (int64_t i = 0; i < count; i += 4) {
    const std::array<const int8_t*, 4> four = four_rows(rows, slots, i, count);
    __m256i sums[4] = {};
    int64_t d = 0;
    for (; d + kLanes <= rows.dim; d += kLanes) {
      const __m256i code = load_bytes(query.code + d), sizes = load_bytes(query.size + d);
      for (size_t row = 0; row < 4; ++row)
        sums[row] = add_quads(sums[row], load_bytes(four[row] + d), sizes, code);
    }
    std::array<int32_t, 4> dots;
    _mm_storeu_si128(reinterpret_cast<__m128i*>(dots.data()),
                     add_up(sums[0], sums[1], sums[2], sums[3]));
    for (; d < rows.dim; ++d) {
      for (size_t row = 0; row < 4; ++row)
        dots[row] += int32_t{four[row][d]} * int32_t{query.code[d]};
    }
    std::copy_n(dots.begin(), std::min<int64_t>(4, count - i), out + i);
  }
}

// Which of slots [at, at + 8) are within the distance, a bit each.
LONGTAKE_AVX2 inline uint32_t half_near(const CoarseScan& scan, int64_t at, __m256i dots) {
  const __m256 scale =
      _mm256_mul_ps(_mm256_set1_ps(2 * scan.scale), _mm256_loadu_ps(scan.scales + at));
  const __m256 squares =
      _mm256_add_ps(_mm256_set1_ps(scan.square), _mm256_loadu_ps(scan.squares + at));
  const __m256 distances = _mm256_fnmadd_ps(scale, _mm256_cvtepi32_ps(dots), squares);
  return static_cast<uint32_t>(
      _mm256_movemask_ps(_mm256_cmp_ps(distances, _mm256_set1_ps(scan.within), _CMP_LT_OQ)));
}

LONGTAKE_AVX2 int64_t near_avx2(const CoarseScan& scan, int32_t* near) {
  int64_t count = 0;
  const int8_t* codes = scan.codes;
  for (int64_t begin = 0; begin < scan.blocks * kBlock; begin += kBlock) {
    __m256i low = _mm256_setzero_si256(), high = low;
    for (int64_t quad = 0; quad < scan.quads; ++quad, codes += kBlock * kQuad) {
      int32_t code, size;
      std::memcpy(&code, scan.query.code + quad * kQuad, sizeof code);
      std::memcpy(&size, scan.query.size + quad * kQuad, sizeof size);
      const __m256i query = _mm256_set1_epi32(code), sizes = _mm256_set1_epi32(size);
      low = add_quads(low, load_bytes(codes), sizes, query);
      high = add_quads(high, load_bytes(codes + kBlock * kQuad / 2), sizes, query);
    }
    uint32_t found = half_near(scan, begin, low) | half_near(scan, begin + kBlock / 2, high)
                                                       << (kBlock / 2);
    for (; found != 0; found &= found - 1)
      near[count++] = static_cast<int32_t>(begin) + std::countr_zero(found);
  }
  return count;
}

LONGTAKE_VNNI void dots_vnni(const CodeRows& rows, const QueryCode& query, const int32_t* slots,
                             int64_t count, int32_t* out) {
  constexpr int64_t kLanes = 32;
  for (int64_t i = 0; i < count; i += 4) {
    const std::array<const int8_t*, 4> four = four_rows(rows, slots, i, count);
    __m256i sums[4] = {};
    int64_t d = 0;
    for (; d + kLanes <= rows.dim; d += kLanes) {
      const __m256i raised = load_bytes(query.raised + d);
      for (size_t row = 0; row < 4; ++row)
        sums[row] = _mm256_dpbusd_epi32(sums[row], raised, load_bytes(four[row] + d));
    }
    std::array<int32_t, 4> dots;
    _mm_storeu_si128(reinterpret_cast<__m128i*>(dots.data()),
                     add_up(sums[0], sums[1], sums[2], sums[3]));
    for (; d < rows.dim; ++d) {
      for (size_t row = 0; row < 4; ++row)
        dots[row] += int32_t{four[row][d]} * int32_t{query.raised[d]};
    }
    for (int64_t row = 0; row < 4 && i + row < count; ++row)
      out[i + row] = dots[static_cast<size_t>(row)] - rows.offsets[slots[i + row]];
  }
}

LONGTAKE_VNNI int64_t near_vnni(const CoarseScan& scan, int32_t* near) {
  int64_t count = 0;
  const int8_t* codes = scan.codes;
  const __m512 square = _mm512_set1_ps(scan.square), within = _mm512_set1_ps(scan.within);
  const __m512 twice = _mm512_set1_ps(2 * scan.scale);
  constexpr __mmask16 kAll = 0xffff;  // the plain conversion warns of its own unused argument
  for (int64_t begin = 0; begin < scan.blocks * kBlock; begin += kBlock) {
    __m512i dots = _mm512_setzero_si512();
    for (int64_t quad = 0; quad < scan.quads; ++quad, codes += kBlock * kQuad) {
      int32_t channels;
      std::memcpy(&channels, scan.query.raised + quad * kQuad, sizeof channels);
      dots = _mm512_dpbusd_epi32(dots, _mm512_set1_epi32(channels), _mm512_loadu_si512(codes));
    }
    dots = _mm512_sub_epi32(dots, _mm512_loadu_si512(scan.offsets + begin));
    const __m512 scale = _mm512_mul_ps(twice, _mm512_loadu_ps(scan.scales + begin));
    const __m512 squares = _mm512_add_ps(square, _mm512_loadu_ps(scan.squares + begin));
    const __m512 distances = _mm512_fnmadd_ps(scale, _mm512_maskz_cvtepi32_ps(kAll, dots), squares);
    uint32_t found = _mm512_cmp_ps_mask(distances, within, _CMP_LT_OQ);
    for (; found != 0; found &= found - 1)
      near[count++] = static_cast<int32_t>(begin) + std::countr_zero(found);
  }
  return count;
}

#undef LONGTAKE_AVX2
#undef LONGTAKE_VNNI
#endif

// Sum of the squares, and sum, of a code.
std::pair<int32_t, int32_t> sums_of(const int8_t* code, int64_t dim) {
  int32_t square = 0, sum = 0;
  for (int64_t d = 0; d < dim; ++d) {
    square += int32_t{code[d]} * int32_t{code[d]};
    sum += int32_t{code[d]};
  }
  return {square, sum};
}

Products choose_products() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vl"))
    return {dots_vnni, near_vnni};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return {dots_avx2, near_avx2};
#endif
  return {dots_plain, near_plain};
}

const Products& products() {
  static const Products instance = choose_products();
  return instance;
}

}  // namespace

QuantIndex::QuantIndex(int64_t dim, const QuantOptions& options)
    : dim_(dim),
      coarse_(std::min(kCoarse, dim / kQuad * kQuad)),
      options_(options),
      query_(static_cast<size_t>(dim)),
      sizes_(query_.size()),
      raised_(query_.size()) {
  if (options.bits < 2 || options.bits > 8)
    throw Error(ErrorKind::kUsage, str("quant bits: expected 2..8, found ", options.bits));
  if (!(options.radius >= 0))
    throw Error(ErrorKind::kUsage, str("quant radius: expected 0 or more, found ", options.radius));
  clear();
}

float QuantIndex::quantise(const float* vector, int8_t* code) const {
  constexpr int64_t kLanes = 16;
  std::array<float, kLanes> peaks{};  // side by side, so that compilers see a vector
  for (int64_t begin = 0; begin + kLanes <= dim_; begin += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) {
      const float size = std::abs(vector[begin + i]);
      peaks[static_cast<size_t>(i)] = std::max(peaks[static_cast<size_t>(i)], size);
    }
  }
  float peak = *std::max_element(peaks.begin(), peaks.end());
  for (int64_t d = dim_ / kLanes * kLanes; d < dim_; ++d)
    peak = std::max(peak, std::abs(vector[d]));
  const auto levels = static_cast<float>((1 << (options_.bits - 1)) - 1);
  const float inverse = peak > 0 ? levels / peak : 0.0F;
  // Small numbers beside a large one round to integers, which then stand in the low bits.
  constexpr float kLarge = 0x1.8p23F;
  for (int64_t d = 0; d < dim_; ++d)
    code[d] = static_cast<int8_t>(std::bit_cast<int32_t>(vector[d] * inverse + kLarge) -
                                  std::bit_cast<int32_t>(kLarge));
  return peak / levels;
}

void QuantIndex::set(int64_t slot, const float* vector) {
  LONGTAKE_CHECK(slot >= 0 && slot <= size(), slot);
  if (slot == size()) {
    codes_.resize(codes_.size() + static_cast<size_t>(dim_));
    scales_.push_back(0);
    squares_.push_back(0);
    offsets_.push_back(0);
  }
  int8_t* code = codes_.data() + slot * dim_;
  const float scale = quantise(vector, code);
  const auto [square, sum] = sums_of(code, dim_);
  offsets_[static_cast<size_t>(slot)] = kOffset * sum;
  scales_[static_cast<size_t>(slot)] = scale;
  squares_[static_cast<size_t>(slot)] = scale * scale * static_cast<float>(square);
  most_scale_ = std::max(most_scale_, scale);
  if (size() < next_choice_)
    write_coarse(slot);
  else
    choose_coarse();
}

// The channels in which the slots differ most, when there are twice as many as at the last choice.
void QuantIndex::choose_coarse() {
  next_choice_ = 2 * size();
  std::vector<double> sums(static_cast<size_t>(dim_), 0.0), squares = sums;
  for (int64_t slot = 0; slot < size(); ++slot) {
    for (int64_t d = 0; d < dim_; ++d) {
      const double x =
          double{scales_[static_cast<size_t>(slot)]} * codes_[static_cast<size_t>(slot * dim_ + d)];
      sums[static_cast<size_t>(d)] += x;
      squares[static_cast<size_t>(d)] += x * x;
    }
  }
  for (size_t d = 0; d < sums.size(); ++d)
    squares[d] -= sums[d] * sums[d] / static_cast<double>(size());
  std::vector<int32_t> order(sums.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    return squares[static_cast<size_t>(a)] > squares[static_cast<size_t>(b)];
  });
  channels_.assign(order.begin(), order.begin() + coarse_);
  for (int64_t slot = 0; slot < size(); ++slot) write_coarse(slot);
}

void QuantIndex::write_coarse(int64_t slot) {
  const int64_t room = (size() + kBlock - 1) / kBlock * kBlock;
  if (static_cast<int64_t>(coarse_scales_.size()) != room) {
    const auto slots = static_cast<size_t>(room);
    coarse_codes_.resize(slots * static_cast<size_t>(coarse_));
    coarse_scales_.resize(slots);
    coarse_offsets_.resize(slots);
    coarse_squares_.resize(slots, std::numeric_limits<float>::infinity());
  }
  const auto at = static_cast<size_t>(slot);
  std::array<int8_t, kCoarse> code;
  take_coarse(codes_.data() + slot * dim_, code.data());
  int8_t* block = coarse_codes_.data() + slot / kBlock * kBlock * coarse_;
  for (int64_t d = 0; d < coarse_; d += kQuad)
    std::copy_n(code.data() + d, kQuad, block + d * kBlock + slot % kBlock * kQuad);
  const auto [square, sum] = sums_of(code.data(), coarse_);
  coarse_scales_[at] = scales_[at];
  coarse_offsets_[at] = kOffset * sum;
  coarse_squares_[at] = scales_[at] * scales_[at] * static_cast<float>(square);
}

void QuantIndex::take_coarse(const int8_t* code, int8_t* out) const {
  for (size_t d = 0; d < channels_.size(); ++d) out[d] = code[channels_[d]];
}

void QuantIndex::set_all(const int32_t* slots, const float* vectors, int64_t count) {
  for (int64_t i = 0; i < count; ++i) set(slots[i], vectors + i * dim_);
}

void QuantIndex::remove(int64_t slot) {
  LONGTAKE_CHECK(slot >= 0 && slot < size(), slot);
  const auto at = static_cast<size_t>(slot);
  std::copy_n(codes_.end() - dim_, dim_, codes_.begin() + slot * dim_);
  scales_[at] = scales_.back();
  offsets_[at] = offsets_.back();
  squares_[at] = squares_.back();
  write_coarse(slot);
  codes_.resize(codes_.size() - static_cast<size_t>(dim_));
  scales_.pop_back();
  offsets_.pop_back();
  squares_.pop_back();
  coarse_squares_[scales_.size()] = std::numeric_limits<float>::infinity();
}

void QuantIndex::clear() {
  codes_.clear();
  scales_.clear();
  offsets_.clear();
  squares_.clear();
  coarse_codes_.clear();
  coarse_scales_.clear();
  coarse_offsets_.clear();
  coarse_squares_.clear();
  most_scale_ = 0;
  channels_.resize(static_cast<size_t>(coarse_));
  std::iota(channels_.begin(), channels_.end(), 0);
  next_choice_ = kFirstChoice;
}

// query_ and its forms; those of the coarse channels lie behind the others.
QuantIndex::Query QuantIndex::quantise_query(const float* query) {
  query_.resize(static_cast<size_t>(dim_ + coarse_));
  Query out;
  out.scale = quantise(query, query_.data());
  take_coarse(query_.data(), query_.data() + dim_);
  const float square = out.scale * out.scale;
  out.square = square * static_cast<float>(sums_of(query_.data(), dim_).first);
  out.coarse_square = square * static_cast<float>(sums_of(query_.data() + dim_, coarse_).first);
  sizes_.resize(query_.size());
  raised_.resize(query_.size());
  for (size_t i = 0; i < query_.size(); ++i) {
    sizes_[i] = static_cast<uint8_t>(std::abs(query_[i]));
    raised_[i] = static_cast<uint8_t>(query_[i] + kOffset);
  }
  return out;
}

// Calls found(slot, distance) for slots within the squared distance `within`, ascending, and may
// call it for others; it returns what is within from then on.
template <typename Found>
void QuantIndex::scan(const Query& query, float within, const Found& found) {
  // Coarse channels alone are no farther than all; rounding of the squares may say otherwise.
  constexpr float kRounding = 1e-6F;
  constexpr int64_t kFirst = 4;  // blocks
  const auto all = static_cast<int64_t>(coarse_scales_.size()) / kBlock;
  near_.resize(coarse_scales_.size());
  dots_.resize(coarse_scales_.size());
  const QueryCode coarse{query_.data() + dim_, sizes_.data() + dim_, raised_.data() + dim_};
  // Each time as many blocks as before: what is found first tells what is within for the rest.
  for (int64_t begin = 0, blocks = std::min(all, kFirst); begin < all;
       begin += blocks, blocks = std::min(all - begin, begin)) {
    const int64_t first = begin * kBlock;
    const CoarseScan scan{coarse_codes_.data() + first * coarse_,
                          coarse_scales_.data() + first,
                          coarse_squares_.data() + first,
                          coarse_offsets_.data() + first,
                          blocks,
                          coarse_ / kQuad,
                          coarse,
                          query.scale,
                          query.coarse_square,
                          within + kRounding * (4 * query.square + within)};
    const int64_t count = products().near(scan, near_.data());
    for (int64_t i = 0; i < count; ++i)
      near_[static_cast<size_t>(i)] += static_cast<int32_t>(first);
    products().dots({codes_.data(), offsets_.data(), dim_},
                    {query_.data(), sizes_.data(), raised_.data()}, near_.data(), count,
                    dots_.data());
    for (int64_t i = 0; i < count; ++i) {
      const auto slot = static_cast<size_t>(near_[static_cast<size_t>(i)]);
      const auto dot = static_cast<float>(dots_[static_cast<size_t>(i)]);
      within = found(near_[static_cast<size_t>(i)],
                     query.square + squares_[slot] - 2 * query.scale * scales_[slot] * dot);
    }
  }
}

void QuantIndex::nearest(const float* query, int64_t most, std::vector<int32_t>& out) {
  out.resize(static_cast<size_t>(most));
  nearest_all(query, 1, most, kAnyDistance, out.data());
  out.erase(std::find(out.begin(), out.end(), -1), out.end());
}

void QuantIndex::nearest_all(const float* queries, int64_t count, int64_t most, float within,
                             int32_t* out) {
  if (most == 0) return;
  ShortList list(most);
  for (int64_t i = 0; i < count; ++i, out += most) {
    const Query query = quantise_query(queries + i * dim_);
    list.clear();
    // Rounding in all channels at once, and all one way, would move two vectors by `worst`; it
    // never comes to a third of that.
    const float worst = (query.scale + most_scale_) / 2 * std::sqrt(static_cast<float>(dim_));
    const float reach = std::sqrt(within) + worst / 3;
    float limit = reach * reach;
    scan(query, limit, [&](int32_t slot, float distance) {
      if (distance < limit) list.offer(ShortList::word(ShortList::rank_of(distance), slot));
      if (list.is_full()) limit = std::min(limit, ShortList::value_of(list.worst_rank()));
      return limit;
    });
    list.write(out);
  }
}

void QuantIndex::bucket(const float* query, std::vector<int32_t>& out) {
  out.clear();
  const float within = options_.radius * options_.radius;
  scan(quantise_query(query), within, [&](int32_t slot, float distance) {
    if (distance <= within) out.push_back(slot);
    return within;
  });
}

}  // namespace longtake
