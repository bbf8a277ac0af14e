#include "ann/lsh.h"

#include <algorithm>
#include <array>
#include <bit>

#include "ann/project.h"
#include "base/error.h"
#include "base/philox.h"

namespace longtake {

LshCoder::LshCoder(int64_t dim, const LshOptions& options) : dim_(dim), options_(options) {
  const auto expect = [](const char* what, int value, int least, int most) {
    if (value < least || value > most)
      throw Error(ErrorKind::kUsage,
                  str("lsh ", what, ": expected ", least, "..", most, ", found ", value));
  };
  expect("bits", options.bits, 1, 20);
  expect("tables", options.tables, 1, 64 / options.bits);
  expect("radius", options.radius, 0, options.bits);
  directions_.resize(static_cast<size_t>(dim * options.bits * options.tables));
  fill_normal(options.seed, 0, 0, directions_.data(), static_cast<int64_t>(directions_.size()));
}

uint64_t LshCoder::code(const float* vector) const {
  uint64_t out;
  codes(vector, 1, &out);
  return out;
}

void LshCoder::codes(const float* vectors, int64_t count, uint64_t* out) const {
  project_signs(vectors, count, dim_, directions_.data(), options_.bits * options_.tables, out);
}

uint32_t LshCoder::bucket_of(uint64_t code, int table) const {
  return static_cast<uint32_t>(code >> (table * options_.bits)) & ((1U << options_.bits) - 1U);
}

void LshIndex::set(int64_t slot, const float* vector) {
  LONGTAKE_CHECK(slot >= 0 && slot <= size(), slot);
  set_code(slot, coder_.code(vector));
}

void LshIndex::set_code(int64_t slot, uint64_t code) {
  if (slot == size()) codes_.push_back(0);
  codes_[static_cast<size_t>(slot)] = code;
  scan_.set(slot, code);
}

void LshIndex::set_all(const int32_t* slots, const float* vectors, int64_t count) {
  constexpr int64_t kRows = 64;
  std::array<uint64_t, kRows> codes;
  for (int64_t begin = 0; begin < count; begin += kRows) {
    const int64_t rows = std::min(kRows, count - begin);
    coder_.codes(vectors + begin * dim_, rows, codes.data());
    for (int64_t i = 0; i < rows; ++i) {
      LONGTAKE_CHECK(slots[begin + i] <= size(), slots[begin + i]);
      set_code(slots[begin + i], codes[static_cast<size_t>(i)]);
    }
  }
}

void LshIndex::remove(int64_t slot) {
  LONGTAKE_CHECK(slot >= 0 && slot < size(), slot);
  set_code(slot, codes_.back());
  codes_.pop_back();
  scan_.pop();
}

void LshIndex::clear() {
  codes_.clear();
  scan_.clear();
}

void LshIndex::nearest(const float* query, int64_t most, std::vector<int32_t>& out) {
  out.resize(static_cast<size_t>(most));
  nearest_all(query, 1, most, kAnyDistance, out.data());
  out.erase(std::find(out.begin(), out.end(), -1), out.end());
}

void LshIndex::nearest_all(const float* queries, int64_t count, int64_t most, float /*within*/,
                           int32_t* out) {
  if (most == 0) return;
  asked_.resize(static_cast<size_t>(count));
  coder_.codes(queries, count, asked_.data());
  for (int64_t i = 0; i < count; ++i)
    scan_.nearest(asked_[static_cast<size_t>(i)], most, out + i * most);
}

void LshIndex::bucket(const float* query, std::vector<int32_t>& out) {
  const uint64_t code = coder_.code(query);
  out.clear();
  for (int64_t slot = 0; slot < size(); ++slot) {
    const uint64_t differing = code ^ codes_[static_cast<size_t>(slot)];
    bool near = false;
    for (int table = 0; table < coder_.options().tables; ++table)
      near |= std::popcount(coder_.bucket_of(differing, table)) <= coder_.options().radius;
    if (near) out.push_back(static_cast<int32_t>(slot));
  }
}

}  // namespace longtake
