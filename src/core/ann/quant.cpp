#include "ann/quant.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"

// The compiler makes one copy of the scan per instruction set and picks at load time; integers, so
// every copy gives the same bits.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define LONGTAKE_SCAN_CLONES __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#else
#define LONGTAKE_SCAN_CLONES
#endif

namespace longtake {
namespace {

// out[i] = codes[i] . query. |.| <= 127 * 127 * dim fits easily.
LONGTAKE_SCAN_CLONES void scan(const int8_t* codes, const int8_t* query, int64_t count, int64_t dim,
                               int32_t* out) {
  for (int64_t i = 0; i < count; ++i, codes += dim) {
    int32_t sum = 0;
    for (int64_t d = 0; d < dim; ++d) sum += int32_t{codes[d]} * int32_t{query[d]};
    out[i] = sum;
  }
}

}  // namespace

QuantIndex::QuantIndex(int64_t dim, const QuantOptions& options)
    : dim_(dim), options_(options), query_(static_cast<size_t>(dim)) {
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
  }
  int8_t* code = codes_.data() + slot * dim_;
  const float scale = quantise(vector, code);
  int32_t square = 0;
  scan(code, code, 1, dim_, &square);
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
  squares_[at] = squares_.back();
  codes_.resize(codes_.size() - static_cast<size_t>(dim_));
  scales_.pop_back();
  squares_.pop_back();
}

void QuantIndex::clear() {
  codes_.clear();
  scales_.clear();
  squares_.clear();
}

void QuantIndex::measure(const float* query) {
  const float scale = quantise(query, query_.data());
  int32_t square = 0;
  scan(query_.data(), query_.data(), 1, dim_, &square);
  const float own = scale * scale * static_cast<float>(square);
  const size_t count = scales_.size();
  dots_.resize(count);
  distances_.resize(count);
  scan(codes_.data(), query_.data(), size(), dim_, dots_.data());
  for (size_t i = 0; i < count; ++i)
    distances_[i] = own + squares_[i] - 2 * scale * scales_[i] * static_cast<float>(dots_[i]);
}

void QuantIndex::nearest(const float* query, int64_t most, std::vector<int32_t>& out) {
  measure(query);
  const auto nearer = [this](int32_t a, int32_t b) {
    const float of_a = distances_[static_cast<size_t>(a)];
    const float of_b = distances_[static_cast<size_t>(b)];
    return of_a < of_b || (of_a == of_b && a < b);
  };
  // One pass with a short sorted list: nearly every slot is refused by one comparison.
  out.clear();
  for (int32_t slot = 0; slot < static_cast<int32_t>(size()); ++slot) {
    const bool full = static_cast<int64_t>(out.size()) == most;
    if (full && (most == 0 || !nearer(slot, out.back()))) continue;
    if (full) out.pop_back();
    out.insert(std::upper_bound(out.begin(), out.end(), slot, nearer), slot);
  }
}

void QuantIndex::nearest_all(const float* queries, int64_t count, int64_t most, int32_t* out) {
  std::vector<int32_t> found;
  std::fill_n(out, count * most, -1);
  for (int64_t i = 0; i < count; ++i) {
    nearest(queries + i * dim_, most, found);
    std::copy(found.begin(), found.end(), out + i * most);
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
