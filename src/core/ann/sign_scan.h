// Signatures of signs, laid out for a scan: which slots differ from a query in the fewest signs.
//
// Four signs are one number of 0 .. 15, and a byte each: one instruction then looks up, for a whole
// vector of slots, in how many of the four they differ from the query's.
#pragma once

#include <cstdint>
#include <vector>

namespace longtake {

class SignScan {
 public:
  static constexpr int kMostSigns = 64;
  static constexpr int64_t kBlock = 128;  // slots

  // Signatures are the low `signs` bits of a word, 1 .. kMostSigns.
  explicit SignScan(int signs) : planes_((signs + 3) / 4) {}

  int64_t size() const { return size_; }

  // Writes a slot; slot == size() appends.
  void set(int64_t slot, uint64_t code);

  // Forgets the last slot.
  void pop();

  void clear();

  // The `most` slots, 1 .. kBlock, that differ in the fewest signs, fewest first, ties by slot; -1
  // behind them if there are fewer. out [most].
  void nearest(uint64_t code, int64_t most, int32_t* out);

 private:
  int64_t planes_;  // of four signs
  int64_t size_ = 0;
  // [blocks, 1 + planes, kBlock]: what keeps an unused slot far, then the signs.
  std::vector<uint8_t> blocks_;
  // Scratch of a query, [slots in blocks].
  std::vector<uint8_t> differing_;
  std::vector<int32_t> near_;
};

}  // namespace longtake
