#include "ann/quant.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "ann/short_list.h"
#include "base/error.h"

namespace longtake {
namespace {

constexpr int64_t kBlock = 16;  // slots that are refused by one comparison
constexpr int kOffset = 128;  // makes a query's numbers unsigned, as the widest product wants them

// out[i] = codes[i] . (query + kOffset). |.| <= 255 * 127 * dim fits easily. Compiled once for
// every instruction set that has a wider product; integers, so that all give the same.
[[gnu::always_inline]] inline void scan(const int8_t* codes, const uint8_t* query, int64_t count,
                                        int64_t dim, int32_t* out) {
  for (int64_t i = 0; i < count; ++i, codes += dim) {
    int32_t sum = 0;
    for (int64_t d = 0; d < dim; ++d) sum += int32_t{codes[d]} * int32_t{query[d]};
    out[i] = sum;
  }
}

void scan_plain(const int8_t* codes, const uint8_t* query, int64_t count, int64_t dim,
                int32_t* out) {
  scan(codes, query, count, dim, out);
}

#if defined(__x86_64__)
[[gnu::target("avx2")]] void scan_avx2(const int8_t* codes, const uint8_t* query, int64_t count,
                                       int64_t dim, int32_t* out) {
  scan(codes, query, count, dim, out);
}

[[gnu::target("avx512f,avx512bw,avx512vl,avx512vnni")]] void scan_vnni(const int8_t* codes,
                                                                       const uint8_t* query,
                                                                       int64_t count, int64_t dim,
                                                                       int32_t* out) {
  scan(codes, query, count, dim, out);
}
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

decltype(&scan_plain) choose_scan() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vl")) return scan_vnni;
  if (__builtin_cpu_supports("avx2")) return scan_avx2;
#endif
  return scan_plain;
}

}  // namespace

QuantIndex::QuantIndex(int64_t dim, const QuantOptions& options)
    : dim_(dim), options_(options), query_(static_cast<size_t>(dim)), shifted_(query_.size()) {
  if (options.bits < 2 || options.bits > 8)
    throw Error(ErrorKind::kUsage, str("quant bits: expected 2..8, found ", options.bits));
  if (!(options.radius >= 0))
    throw Error(ErrorKind::kUsage, str("quant radius: expected 0 or more, found ", options.radius));
}

float QuantIndex::quantise(const float* vector, int8_t* code) const {
  float peak = 0;
  for (int64_t d = 0; d < dim_; ++d) peak = std::max(peak, std::abs(vector[d]));
  const auto levels = static_cast<float>((1 << (options_.bits - 1)) - 1);
  const float inverse = peak > 0 ? levels / peak : 0.0F;
  for (int64_t d = 0; d < dim_; ++d)
    code[d] = static_cast<int8_t>(std::lrintf(vector[d] * inverse));
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
  codes_.resize(codes_.size() - static_cast<size_t>(dim_));
  scales_.pop_back();
  offsets_.pop_back();
  squares_.pop_back();
}

void QuantIndex::clear() {
  codes_.clear();
  scales_.clear();
  offsets_.clear();
  squares_.clear();
}

void QuantIndex::measure(const float* query) {
  static const auto scan_all = choose_scan();
  const float scale = quantise(query, query_.data());
  const int32_t square = sums_of(query_.data(), dim_).first;
  std::transform(query_.begin(), query_.end(), shifted_.begin(),
                 [](int8_t x) { return static_cast<uint8_t>(x + kOffset); });
  const float own = scale * scale * static_cast<float>(square);
  const size_t count = scales_.size();
  dots_.resize(count);
  distances_.resize(count);
  scan_all(codes_.data(), shifted_.data(), size(), dim_, dots_.data());
  for (size_t i = 0; i < count; ++i)
    distances_[i] =
        own + squares_[i] - 2 * scale * scales_[i] * static_cast<float>(dots_[i] - offsets_[i]);
}

void QuantIndex::nearest(const float* query, int64_t most, std::vector<int32_t>& out) {
  out.resize(static_cast<size_t>(most));
  nearest_all(query, 1, most, out.data());
  out.erase(std::find(out.begin(), out.end(), -1), out.end());
}

void QuantIndex::nearest_all(const float* queries, int64_t count, int64_t most, int32_t* out) {
  if (most == 0) return;
  ShortList list(most);
  for (int64_t i = 0; i < count; ++i, out += most) {
    measure(queries + i * dim_);
    list.clear();
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
    list.write(out);
  }
}

void QuantIndex::bucket(const float* query, std::vector<int32_t>& out) {
  measure(query);
  out.clear();
  for (int32_t slot = 0; slot < static_cast<int32_t>(size()); ++slot) {
    if (distances_[static_cast<size_t>(slot)] <= options_.radius * options_.radius)
      out.push_back(slot);
  }
}

}  // namespace longtake
