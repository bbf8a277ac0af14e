#pragma once

#include <cstdint>

// Counter-based random numbers: every value is a hash of what it is for, so that nothing depends on
// the order in which the world is built, and every machine draws the same bits.
namespace longtake::overworld {

// The finaliser of splitmix64: a bijection of 64 bits whose output passes for random.
constexpr uint64_t mix_bits(uint64_t z) {
  z += 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

// `what` names the purpose (a constant of the caller), (x, y) the place.
constexpr uint64_t hash_bits(uint64_t seed, uint64_t what, int64_t x = 0, int64_t y = 0) {
  return mix_bits(mix_bits(mix_bits(mix_bits(seed) ^ what) ^ static_cast<uint64_t>(x)) ^
                  static_cast<uint64_t>(y));
}

// A stream of numbers that starts from a hash; cheap enough to make one per object.
class Rng {
 public:
  explicit constexpr Rng(uint64_t seed) : state_(seed) {}

  constexpr uint64_t next() { return mix_bits(state_++); }

  // Uniform in [0, n), n >= 1. The bias of the multiply-shift is below 2^-32 * n.
  constexpr int below(int n) {
    return static_cast<int>(((next() >> 32) * static_cast<uint64_t>(n)) >> 32);
  }

  // Uniform in [low, high], both included.
  constexpr int between(int low, int high) { return low + below(high - low + 1); }

  constexpr bool chance(int percent) { return below(100) < percent; }

 private:
  uint64_t state_;
};

}  // namespace longtake::overworld
