// The part of RoPE that depends on time: what a key loses and gains when it moves between frames.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace longtake {

// Turns pairs i < pairs of a key [D] by frame * theta^(-i / pairs), in place.
class TimeRotation {
 public:
  static constexpr int64_t kMaxPairs = 128;  // of a head of 256 channels

  TimeRotation(int64_t pairs, double theta, int64_t frame);

  void apply(float* key) const { turn(key, 1); }

  void undo(float* key) const { turn(key, -1); }

 private:
  void turn(float* key, float sign) const;

  size_t pairs_;
  std::array<float, kMaxPairs> cos_, sin_;
};

}  // namespace longtake
