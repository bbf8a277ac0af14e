#include "ann/lsh.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>

#include "ann/project.h"
#include "ann/short_list.h"
#include "base/error.h"
#include "base/philox.h"

namespace longtake {
namespace {

constexpr int64_t kBlock = 32;  // slots that are refused by one comparison

// out[i] = signs in which codes[i] and code differ. Compiled once for every instruction set that
// counts bits in a wider way; integers, so that all give the same.
[[gnu::always_inline]] inline void count_differing(const uint64_t* codes, int64_t count,
                                                   uint64_t code, uint8_t* out) {
  for (int64_t i = 0; i < count; ++i)
    out[i] = static_cast<uint8_t>(__builtin_popcountll(codes[i] ^ code));
}

void count_plain(const uint64_t* codes, int64_t count, uint64_t code, uint8_t* out) {
  count_differing(codes, count, code, out);
}

#if defined(__x86_64__)
[[gnu::target("popcnt")]] void count_popcnt(const uint64_t* codes, int64_t count, uint64_t code,
                                            uint8_t* out) {
  count_differing(codes, count, code, out);
}

[[gnu::target("avx512f,avx512bw,avx512vl,avx512vpopcntdq")]] void count_avx512(
    const uint64_t* codes, int64_t count, uint64_t code, uint8_t* out) {
  count_differing(codes, count, code, out);
}
#endif

decltype(&count_plain) choose_count() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512vpopcntdq") && __builtin_cpu_supports("avx512vl"))
    return count_avx512;
  if (__builtin_cpu_supports("popcnt")) return count_popcnt;
#endif
  return count_plain;
}

uint8_t least(const uint8_t* block) {
  uint8_t out = block[0];
  for (int64_t i = 1; i < kBlock; ++i) out = std::min(out, block[i]);
  return out;
}

// Calls found(i) for every x[i] below `limit`, in order; x [kBlock] and limit are below 128.
template <typename Found>
void for_below(const uint8_t* x, uint64_t limit, const Found& found) {
  constexpr uint64_t kOnes = 0x0101010101010101U, kHigh = 0x8080808080808080U;
  for (int64_t begin = 0; begin < kBlock; begin += 8) {
    uint64_t bytes;
    std::memcpy(&bytes, x + begin, sizeof bytes);
    // The high bit of a byte appears where it reaches the limit.
    uint64_t below = ~(bytes + kOnes * (128 - limit)) & kHigh;
    for (; below != 0; below &= below - 1) found(begin + std::countr_zero(below) / 8);
  }
}

}  // namespace

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
  constexpr int64_t kRows = 16;
  const int signs = options_.bits * options_.tables;
  std::array<float, kRows * 64> dots;
  for (int64_t begin = 0; begin < count; begin += kRows) {
    const int64_t rows = std::min(kRows, count - begin);
    project(vectors + begin * dim_, rows, dim_, directions_.data(), signs, dots.data());
    for (int64_t row = 0; row < rows; ++row) {
      uint64_t code = 0;
      for (int i = 0; i < signs; ++i)
        code |= uint64_t{dots[static_cast<size_t>(row * signs + i)] > 0} << i;
      out[begin + row] = code;
    }
  }
}

uint32_t LshCoder::bucket_of(uint64_t code, int table) const {
  return static_cast<uint32_t>(code >> (table * options_.bits)) & ((1U << options_.bits) - 1U);
}

void LshIndex::set(int64_t slot, const float* vector) {
  LONGTAKE_CHECK(slot >= 0 && slot <= size(), slot);
  if (slot == size()) codes_.push_back(0);
  codes_[static_cast<size_t>(slot)] = coder_.code(vector);
}

void LshIndex::set_all(const int32_t* slots, const float* vectors, int64_t count) {
  constexpr int64_t kRows = 64;
  std::array<uint64_t, kRows> codes;
  for (int64_t begin = 0; begin < count; begin += kRows) {
    const int64_t rows = std::min(kRows, count - begin);
    coder_.codes(vectors + begin * dim_, rows, codes.data());
    for (int64_t i = 0; i < rows; ++i) {
      const auto slot = static_cast<size_t>(slots[begin + i]);
      LONGTAKE_CHECK(slot <= codes_.size(), slot);
      if (slot == codes_.size()) codes_.push_back(0);
      codes_[slot] = codes[static_cast<size_t>(i)];
    }
  }
}

void LshIndex::remove(int64_t slot) {
  LONGTAKE_CHECK(slot >= 0 && slot < size(), slot);
  codes_[static_cast<size_t>(slot)] = codes_.back();
  codes_.pop_back();
}

void LshIndex::nearest(const float* query, int64_t most, std::vector<int32_t>& out) {
  out.resize(static_cast<size_t>(most));
  nearest_all(query, 1, most, kAnyDistance, out.data());
  out.erase(std::find(out.begin(), out.end(), -1), out.end());
}

void LshIndex::nearest_all(const float* queries, int64_t count, int64_t most, float /*within*/,
                           int32_t* out) {
  std::fill_n(out, count * most, -1);
  if (most == 0) return;
  std::vector<uint64_t> codes(static_cast<size_t>(count));
  coder_.codes(queries, count, codes.data());
  static const auto count_signs = choose_count();
  constexpr uint8_t kFar = 127;  // more than there are signs
  ShortList list(most);
  const int64_t blocks = (size() + kBlock - 1) / kBlock;
  differing_.assign(static_cast<size_t>(blocks * kBlock), kFar);
  least_.resize(static_cast<size_t>(blocks));
  for (const uint64_t code : codes) {
    count_signs(codes_.data(), size(), code, differing_.data());
    // So many slots are no farther than the best of so many blocks: few others need a look.
    std::array<int32_t, kFar + 1> blocks_at{};
    for (int64_t block = 0; block < blocks; ++block) {
      const uint8_t own = least(differing_.data() + block * kBlock);
      least_[static_cast<size_t>(block)] = own;
      ++blocks_at[own];
    }
    uint64_t limit = 0;
    for (int64_t known = 0; known < most && limit < kFar; ++limit) known += blocks_at[limit];
    list.clear();
    for (int64_t block = 0; block < blocks; ++block) {
      if (least_[static_cast<size_t>(block)] >= limit) continue;
      const uint8_t* own = differing_.data() + block * kBlock;
      for_below(own, limit,
                [&](int64_t i) { list.offer(ShortList::word(own[i], block * kBlock + i)); });
      if (list.is_full()) limit = std::min<uint64_t>(limit, list.worst_rank());
    }
    list.write(out);
    out += most;
  }
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
