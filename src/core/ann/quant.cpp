#include "ann/quant.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "ann/short_list.h"
#include "base/error.h"

namespace longtake {
namespace {

constexpr int64_t kBlock = 16;  // slots that are refused by one comparison
constexpr int64_t kQuad = 4;    // channels side by side
constexpr int64_t kCoarse = 16;
constexpr int kOffset = 128;  // makes a query's numbers unsigned, as the widest product wants them

// out[i] = codes[i] . (query + kOffset). |.| <= 255 * 127 * dim fits easily. Compiled once for
// every instruction set that has a wider product; integers, so that all give the same.
[[gnu::always_inline]] inline int32_t dot(const int8_t* code, const uint8_t* query, int64_t dim) {
  int32_t sum = 0;
  for (int64_t d = 0; d < dim; ++d) sum += int32_t{code[d]} * int32_t{query[d]};
  return sum;
}

[[gnu::always_inline]] inline void scan(const int8_t* codes, const uint8_t* query, int64_t count,
                                        int64_t dim, int32_t* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = dot(codes + i * dim, query, dim);
}

// The same of rows slots[i].
[[gnu::always_inline]] inline void scan_some(const int8_t* codes, const uint8_t* query,
                                             const int32_t* slots, int64_t count, int64_t dim,
                                             int32_t* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = dot(codes + slots[i] * dim, query, dim);
}

// The coarse channels of all slots, in blocks, and a query of which nothing beyond `within` is
// wanted.
struct CoarseScan {
  const int8_t* codes;
  const float* scales;
  const float* squares;
  const int32_t* offsets;
  int64_t blocks, quads;
  const uint8_t* query;
  float scale, square, within;
};

// near[...] = slots that are within the distance; returns how many.
[[gnu::always_inline]] inline int64_t find_in_blocks(const CoarseScan& scan, int32_t* near) {
  int64_t count = 0;
  const int8_t* codes = scan.codes;
  for (int64_t begin = 0; begin < scan.blocks * kBlock; begin += kBlock) {
    int32_t dots[kBlock] = {};
    for (int64_t quad = 0; quad < scan.quads; ++quad, codes += kBlock * kQuad) {
      for (int64_t i = 0; i < kBlock; ++i) {
        for (int64_t c = 0; c < kQuad; ++c)
          dots[i] += int32_t{codes[i * kQuad + c]} * int32_t{scan.query[quad * kQuad + c]};
      }
    }
    for (int64_t i = 0; i < kBlock; ++i) {
      const auto dot = static_cast<float>(dots[i] - scan.offsets[begin + i]);
      const float distance =
          scan.square + scan.squares[begin + i] - 2 * scan.scale * scan.scales[begin + i] * dot;
      if (distance < scan.within) near[count++] = static_cast<int32_t>(begin + i);
    }
  }
  return count;
}

// Calls compiled for one instruction set.
struct Scans {
  decltype(&scan) all;
  decltype(&scan_some) some;
  decltype(&find_in_blocks) near;
};

void all_plain(const int8_t* codes, const uint8_t* query, int64_t count, int64_t dim,
               int32_t* out) {
  scan(codes, query, count, dim, out);
}

void some_plain(const int8_t* codes, const uint8_t* query, const int32_t* slots, int64_t count,
                int64_t dim, int32_t* out) {
  scan_some(codes, query, slots, count, dim, out);
}

int64_t near_plain(const CoarseScan& scan, int32_t* near) {
  return find_in_blocks(scan, near);
}

#if defined(__x86_64__)
#define LONGTAKE_AVX2 [[gnu::target("avx2,fma")]]
#define LONGTAKE_VNNI [[gnu::target("avx512f,avx512bw,avx512vl,avx512vnni")]]

LONGTAKE_AVX2 void all_avx2(const int8_t* codes, const uint8_t* query, int64_t count, int64_t dim,
                            int32_t* out) {
  scan(codes, query, count, dim, out);
}

LONGTAKE_AVX2 void some_avx2(const int8_t* codes, const uint8_t* query, const int32_t* slots,
                             int64_t count, int64_t dim, int32_t* out) {
  scan_some(codes, query, slots, count, dim, out);
}

LONGTAKE_AVX2 int64_t near_avx2(const CoarseScan& scan, int32_t* near) {
  return find_in_blocks(scan, near);
}

LONGTAKE_VNNI void all_vnni(const int8_t* codes, const uint8_t* query, int64_t count, int64_t dim,
                            int32_t* out) {
  scan(codes, query, count, dim, out);
}

LONGTAKE_VNNI void some_vnni(const int8_t* codes, const uint8_t* query, const int32_t* slots,
                             int64_t count, int64_t dim, int32_t* out) {
  scan_some(codes, query, slots, count, dim, out);
}

// find_in_blocks by hand: compilers do not see that a block's quads are this product's.
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
      std::memcpy(&channels, scan.query + quad * kQuad, sizeof channels);
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

Scans choose_scans() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vl"))
    return {all_vnni, some_vnni, near_vnni};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return {all_avx2, some_avx2, near_avx2};
#endif
  return {all_plain, some_plain, near_plain};
}

const Scans& scans() {
  static const Scans instance = choose_scans();
  return instance;
}

}  // namespace

QuantIndex::QuantIndex(int64_t dim, const QuantOptions& options)
    : dim_(dim),
      coarse_(std::min(kCoarse, dim / kQuad * kQuad)),
      options_(options),
      query_(static_cast<size_t>(dim)),
      shifted_(query_.size()) {
  if (options.bits < 2 || options.bits > 8)
    throw Error(ErrorKind::kUsage, str("quant bits: expected 2..8, found ", options.bits));
  if (!(options.radius >= 0))
    throw Error(ErrorKind::kUsage, str("quant radius: expected 0 or more, found ", options.radius));
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
  write_coarse(slot);
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
  const int8_t* code = codes_.data() + slot * dim_;
  int8_t* block = coarse_codes_.data() + slot / kBlock * kBlock * coarse_;
  for (int64_t d = 0; d < coarse_; d += kQuad)
    std::copy_n(code + d, kQuad, block + d * kBlock + slot % kBlock * kQuad);
  const auto [square, sum] = sums_of(code, coarse_);
  coarse_scales_[at] = scales_[at];
  coarse_offsets_[at] = kOffset * sum;
  coarse_squares_[at] = scales_[at] * scales_[at] * static_cast<float>(square);
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
}

QuantIndex::Query QuantIndex::quantise_query(const float* query) {
  Query out;
  out.scale = quantise(query, query_.data());
  const float square = out.scale * out.scale;
  out.square = square * static_cast<float>(sums_of(query_.data(), dim_).first);
  out.coarse_square = square * static_cast<float>(sums_of(query_.data(), coarse_).first);
  std::transform(query_.begin(), query_.end(), shifted_.begin(),
                 [](int8_t x) { return static_cast<uint8_t>(x + kOffset); });
  return out;
}

void QuantIndex::measure(const Query& query) {
  const size_t count = scales_.size();
  dots_.resize(count);
  distances_.resize(count);
  scans().all(codes_.data(), shifted_.data(), size(), dim_, dots_.data());
  for (size_t i = 0; i < count; ++i)
    distances_[i] = query.square + squares_[i] -
                    2 * query.scale * scales_[i] * static_cast<float>(dots_[i] - offsets_[i]);
}

void QuantIndex::find_near(const Query& query, float within) {
  near_.resize(coarse_scales_.size());
  const CoarseScan scan{coarse_codes_.data(),
                        coarse_scales_.data(),
                        coarse_squares_.data(),
                        coarse_offsets_.data(),
                        static_cast<int64_t>(coarse_scales_.size()) / kBlock,
                        coarse_ / kQuad,
                        shifted_.data(),
                        query.scale,
                        query.coarse_square,
                        within};
  near_.resize(static_cast<size_t>(scans().near(scan, near_.data())));
}

void QuantIndex::measure_near(const Query& query) {
  dots_.resize(near_.size());
  distances_.resize(near_.size());
  scans().some(codes_.data(), shifted_.data(), near_.data(), static_cast<int64_t>(near_.size()),
               dim_, dots_.data());
  for (size_t i = 0; i < near_.size(); ++i) {
    const auto slot = static_cast<size_t>(near_[i]);
    distances_[i] = query.square + squares_[slot] -
                    2 * query.scale * scales_[slot] * static_cast<float>(dots_[i] - offsets_[slot]);
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
    if (within < kAnyDistance) {
      // Rounding in all channels at once, and all one way, would move two vectors by `worst`; it
      // never comes to a third of that.
      const float worst = (query.scale + most_scale_) / 2 * std::sqrt(static_cast<float>(dim_));
      const float reach = std::sqrt(within) + worst / 3;
      find_near(query, reach * reach);
      measure_near(query);
      float limit = reach * reach;
      for (size_t k = 0; k < near_.size(); ++k) {
        if (distances_[k] >= limit) continue;
        list.offer(ShortList::word(ShortList::rank_of(distances_[k]), near_[k]));
        if (list.is_full()) limit = ShortList::value_of(list.worst_rank());
      }
    } else {
      measure(query);
      offer_all(list);
    }
    list.write(out);
  }
}

void QuantIndex::offer_all(ShortList& list) const {
  float limit = std::numeric_limits<float>::infinity();
  for (int64_t begin = 0; begin < size(); begin += kBlock) {
    const int64_t end = std::min(size(), begin + kBlock);
    int below = 0;  // nearly every block is refused at once
    for (int64_t slot = begin; slot < end; ++slot)
      below |= static_cast<int>(distances_[static_cast<size_t>(slot)] < limit);
    if (below == 0) continue;
    for (int64_t slot = begin; slot < end; ++slot) {
      const float distance = distances_[static_cast<size_t>(slot)];
      if (distance < limit) list.offer(ShortList::word(ShortList::rank_of(distance), slot));
    }
    if (list.is_full()) limit = distances_[static_cast<size_t>(list.worst_slot())];
  }
}

void QuantIndex::bucket(const float* query, std::vector<int32_t>& out) {
  measure(quantise_query(query));
  out.clear();
  for (int32_t slot = 0; slot < static_cast<int32_t>(size()); ++slot) {
    if (distances_[static_cast<size_t>(slot)] <= options_.radius * options_.radius)
      out.push_back(slot);
  }
}

}  // namespace longtake
