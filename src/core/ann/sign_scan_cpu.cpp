#include "ann/sign_scan.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstring>

#include "base/error.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ann/sign_scan_cpu.cpp"
#include "hwy/foreach_target.h"  // stands first: it parses this file once per target

#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();

namespace longtake::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

constexpr size_t kBlock = SignScan::kBlock;
constexpr uint8_t kUnused = SignScan::kMostSigns + 1;  // signs that an unused slot differs in

// Signs in which four differ from four.
constexpr auto kDiffering = [] {
  std::array<std::array<uint8_t, 16>, 16> out{};
  for (unsigned a = 0; a < 16; ++a) {
    for (unsigned b = 0; b < 16; ++b) out[a][b] = static_cast<uint8_t>(std::popcount(a ^ b));
  }
  return out;
}();

using Bytes = hn::CappedTag<uint8_t, kBlock / 2>;

// differing [blocks * kBlock] = signs in which the slots differ from `code`; least [kBlock]: the
// fewest of any block, place by place.
#if HWY_TARGET == HWY_SCALAR
void count_signs(const uint8_t* blocks, size_t num_blocks, size_t planes, uint64_t code,
                 uint8_t* differing, uint8_t* least) {
  std::memset(least, kUnused, kBlock);
  for (size_t block = 0; block < num_blocks; ++block) {
    for (size_t i = 0; i < kBlock; ++i) {
      const uint8_t* at = blocks + i;
      uint8_t sum = *at;
      for (size_t plane = 0; plane < planes; ++plane)
        sum = static_cast<uint8_t>(sum + kDiffering[code >> (4 * plane) & 15][*(at += kBlock)]);
      differing[i] = sum;
      least[i] = std::min(least[i], sum);
    }
    blocks += (1 + planes) * kBlock;
    differing += kBlock;
  }
}
#else
void count_signs(const uint8_t* blocks, size_t num_blocks, size_t planes, uint64_t code,
                 uint8_t* differing, uint8_t* least) {
  const Bytes d;
  const size_t lanes = hn::Lanes(d);
  std::memset(least, kUnused, kBlock);
  for (size_t block = 0; block < num_blocks; ++block) {
    for (size_t i = 0; i < kBlock; i += 2 * lanes) {
      const uint8_t* at = blocks + i;  // two vectors share what is looked up in
      auto sum0 = hn::LoadU(d, at), sum1 = hn::LoadU(d, at + lanes);
      for (size_t plane = 0; plane < planes; ++plane) {
        at += kBlock;
        const auto table = hn::LoadDup128(d, kDiffering[code >> (4 * plane) & 15].data());
        sum0 = hn::Add(sum0, hn::TableLookupBytes(table, hn::LoadU(d, at)));
        sum1 = hn::Add(sum1, hn::TableLookupBytes(table, hn::LoadU(d, at + lanes)));
      }
      hn::StoreU(sum0, d, differing + i);
      hn::StoreU(sum1, d, differing + i + lanes);
      hn::StoreU(hn::Min(sum0, hn::LoadU(d, least + i)), d, least + i);
      hn::StoreU(hn::Min(sum1, hn::LoadU(d, least + i + lanes)), d, least + i + lanes);
    }
    blocks += (1 + planes) * kBlock;
    differing += kBlock;
  }
}
#endif

// The least number that at least `most` of x [kBlock] do not exceed, or kUnused - 1.
uint8_t reach_of(const uint8_t* x, size_t most) {
  const Bytes d;
  uint8_t low = 0, high = kUnused - 1;
  while (low < high) {
    const auto middle = static_cast<uint8_t>((low + high) / 2);
    const auto limit = hn::Set(d, middle);
    size_t count = 0;
    for (size_t i = 0; i < kBlock; i += hn::Lanes(d)) {
      const auto v = hn::LoadU(d, x + i);
      count += hn::CountTrue(d, hn::Eq(hn::Min(v, limit), v));
    }
    if (count >= most)
      high = middle;
    else
      low = static_cast<uint8_t>(middle + 1);
  }
  return low;
}

// slots [...] = places of x [count, whole blocks] that do not exceed `reach`, ascending; returns
// how many.
size_t list_within(const uint8_t* x, size_t count, uint8_t reach, int32_t* slots) {
  const Bytes d;
  const auto limit = hn::Set(d, reach);
  size_t found = 0;
  for (size_t i = 0; i < count; i += hn::Lanes(d)) {
    const auto v = hn::LoadU(d, x + i);
    uint64_t bits = 0;
    hn::StoreMaskBits(d, hn::Eq(hn::Min(v, limit), v), reinterpret_cast<uint8_t*>(&bits));
    for (; bits != 0; bits &= bits - 1)
      slots[found++] = static_cast<int32_t>(i) + std::countr_zero(bits);
  }
  return found;
}

// SignScan::nearest. near [blocks * kBlock]: scratch.
void find_nearest(const uint8_t* blocks, size_t num_blocks, size_t planes, uint64_t code,
                  size_t most, uint8_t* differing, int32_t* near, int32_t* out) {
  std::array<uint8_t, kBlock> least;
  count_signs(blocks, num_blocks, planes, code, differing, least.data());
  // So many slots are no farther than the best of so many places: few others need a look.
  const uint8_t reach = reach_of(least.data(), most);
  const size_t found = list_within(differing, num_blocks * kBlock, reach, near);
  // They are sorted by counting.
  std::array<int32_t, kUnused> ends{};
  for (size_t i = 0; i < found; ++i) ++ends[differing[near[i]]];
  for (size_t i = 1; i <= reach; ++i) ends[i] += ends[i - 1];
  for (size_t i = found; i > 0; --i) {
    const auto place = static_cast<size_t>(--ends[differing[near[i - 1]]]);
    if (place < most) out[place] = near[i - 1];
  }
  for (size_t i = found; i < most; ++i) out[i] = -1;
}

}  // namespace longtake::HWY_NAMESPACE

HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace longtake {
namespace {

constexpr uint8_t kUnused = SignScan::kMostSigns + 1;

}  // namespace

HWY_EXPORT(find_nearest);

void SignScan::set(int64_t slot, uint64_t code) {
  LONGTAKE_CHECK(slot >= 0 && slot <= size_, slot);
  const int64_t block_bytes = (1 + planes_) * kBlock;
  if (slot == size_) {
    ++size_;
    if (slot % kBlock == 0) {
      blocks_.resize(blocks_.size() + static_cast<size_t>(block_bytes));
      std::fill_n(blocks_.end() - block_bytes, kBlock, kUnused);
    }
  }
  uint8_t* at = blocks_.data() + slot / kBlock * block_bytes + slot % kBlock;
  *at = 0;
  for (int64_t plane = 0; plane < planes_; ++plane)
    at[(1 + plane) * kBlock] = static_cast<uint8_t>(code >> (4 * plane) & 15);
}

void SignScan::pop() {
  LONGTAKE_CHECK(size_ > 0);
  const int64_t block_bytes = (1 + planes_) * kBlock;
  --size_;
  blocks_[static_cast<size_t>(size_ / kBlock * block_bytes + size_ % kBlock)] = kUnused;
  if (size_ % kBlock == 0) blocks_.resize(blocks_.size() - static_cast<size_t>(block_bytes));
}

void SignScan::clear() {
  blocks_.clear();
  size_ = 0;
}

void SignScan::nearest(uint64_t code, int64_t most, int32_t* out) {
  LONGTAKE_CHECK(most > 0 && most <= kBlock, most);
  const int64_t blocks = (size_ + kBlock - 1) / kBlock;
  differing_.resize(static_cast<size_t>(blocks * kBlock));
  near_.resize(differing_.size());
  HWY_DYNAMIC_DISPATCH(find_nearest)
  (blocks_.data(), static_cast<size_t>(blocks), static_cast<size_t>(planes_), code,
   static_cast<size_t>(most), differing_.data(), near_.data(), out);
}

}  // namespace longtake
#endif  // HWY_ONCE
