#pragma once

#include <cstdint>
#include <cstring>

// Sixteen 16-bit numbers side by side: one row of a terrain cell. The compiler's vector extension
// turns each operation into one instruction with AVX2 and two with SSE2; the arithmetic is the same
// everywhere.

// Nothing here crosses a library's border, so it does not matter how vectors are passed without
// AVX.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace longtake::overworld {

using Lanes = int16_t __attribute__((vector_size(32)));
using ByteLanes = int8_t __attribute__((vector_size(16)));
using ColorByteLanes = uint8_t __attribute__((vector_size(16)));

inline Lanes broadcast(int value) {
  return Lanes{} + static_cast<int16_t>(value);
}

// Comparisons of lanes give masks of all ones or all zeros.
inline Lanes select(Lanes mask, Lanes yes, Lanes no) {
  return (mask & yes) | (~mask & no);
}

inline Lanes min(Lanes a, Lanes b) {
  return select(a < b, a, b);
}

inline Lanes max(Lanes a, Lanes b) {
  return select(a > b, a, b);
}

inline Lanes clamp(Lanes v, int low, int high) {
  return min(max(v, broadcast(low)), broadcast(high));
}

inline Lanes abs(Lanes v) {
  return max(v, -v);
}

inline Lanes load_lanes(const int16_t* from) {
  Lanes v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

inline Lanes load_lanes(const int8_t* from) {
  ByteLanes v;
  std::memcpy(&v, from, sizeof v);
  return __builtin_convertvector(v, Lanes);
}

inline Lanes load_lanes(const uint8_t* from) {
  ColorByteLanes v;
  std::memcpy(&v, from, sizeof v);
  return __builtin_convertvector(v, Lanes);
}

// Values must lie in [0, 255].
inline void store_bytes(Lanes v, uint8_t* to) {
  const ColorByteLanes bytes = __builtin_convertvector(v, ColorByteLanes);
  std::memcpy(to, &bytes, sizeof bytes);
}

}  // namespace longtake::overworld
