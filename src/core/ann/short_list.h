// The few smallest of many, without a branch: what nearest-neighbour scans end in.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <limits>

#include "base/error.h"

namespace longtake {

// The `most` smallest words offered, sorted. A word is a rank in its high half and a slot in its
// low one: ties go to the lower slot.
class ShortList {
 public:
  static constexpr int64_t kRoom = 64;

  explicit ShortList(int64_t most) : most_(most) {
    LONGTAKE_CHECK(most > 0 && most <= kRoom, most);
    clear();
  }

  static uint64_t word(uint32_t rank, int64_t slot) {
    return uint64_t{rank} << 32 | static_cast<uint32_t>(slot);
  }

  // Floats (not NaN) in their order.
  static uint32_t rank_of(float value) {
    const auto bits = std::bit_cast<uint32_t>(value);
    return bits >> 31 != 0 ? ~bits : bits | 0x80000000U;
  }

  // The float of a rank.
  static float value_of(uint32_t rank) {
    return std::bit_cast<float>(rank >> 31 != 0 ? rank & 0x7fffffffU : ~rank);
  }

  void clear() { std::fill_n(words_.begin(), most_, kNone); }

  void offer(uint64_t word) {
    for (int64_t i = 0; i < most_; ++i) {  // it ripples down: the greater goes on
      uint64_t& held = words_[static_cast<size_t>(i)];
      const uint64_t less = std::min(held, word);
      word = std::max(held, word);
      held = less;
    }
  }

  bool is_full() const { return last() != kNone; }

  uint32_t worst_rank() const { return static_cast<uint32_t>(last() >> 32); }

  int32_t worst_slot() const { return static_cast<int32_t>(last() & 0xffffffffU); }

  // The slots, best first; -1 behind the last one. out [most].
  void write(int32_t* out) const {
    for (int64_t i = 0; i < most_; ++i) {
      const uint64_t word = words_[static_cast<size_t>(i)];
      out[i] = word == kNone ? -1 : static_cast<int32_t>(word & 0xffffffffU);
    }
  }

 private:
  static constexpr uint64_t kNone = std::numeric_limits<uint64_t>::max();

  uint64_t last() const { return words_[static_cast<size_t>(most_ - 1)]; }

  int64_t most_;
  std::array<uint64_t, kRoom> words_;
};

}  // namespace longtake
