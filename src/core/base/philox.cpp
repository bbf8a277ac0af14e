#include "base/philox.h"

#include <algorithm>
#include <cmath>

namespace longtake {
namespace {

constexpr uint32_t kMultiplier0 = 0xD2511F53U;
constexpr uint32_t kMultiplier1 = 0xCD9E8D57U;
constexpr uint32_t kWeyl0 = 0x9E3779B9U;
constexpr uint32_t kWeyl1 = 0xBB67AE85U;
constexpr double kTwoPi = 6.283185307179586476925286766559;

// Uniform in (0, 1): never 0, so that the logarithm below is finite.
double open_unit(uint32_t word) {
  return (static_cast<double>(word) + 0.5) * 0x1p-32;
}

}  // namespace

PhiloxBlock philox4x32_10(const PhiloxBlock& counter, uint64_t key) {
  PhiloxBlock c = counter;
  auto k0 = static_cast<uint32_t>(key);
  auto k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{kMultiplier0} * c[0];
    const uint64_t p1 = uint64_t{kMultiplier1} * c[2];
    c = {static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k0, static_cast<uint32_t>(p1),
         static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k1, static_cast<uint32_t>(p0)};
    k0 += kWeyl0;
    k1 += kWeyl1;
  }
  return c;
}

std::array<float, 4> normal_from(const PhiloxBlock& words) {
  std::array<float, 4> out{};
  for (size_t pair = 0; pair < 2; ++pair) {
    const double radius = std::sqrt(-2.0 * std::log(open_unit(words[2 * pair])));
    const double angle = kTwoPi * open_unit(words[2 * pair + 1]);
    out[2 * pair] = static_cast<float>(radius * std::cos(angle));
    out[2 * pair + 1] = static_cast<float>(radius * std::sin(angle));
  }
  return out;
}

void fill_normal(uint64_t seed, uint32_t frame, uint32_t step, float* out, int64_t count) {
  for (int64_t i = 0; i < count; i += 4) {
    const auto values =
        normal_from(philox4x32_10({static_cast<uint32_t>(i / 4), step, frame, 0}, seed));
    std::copy_n(values.begin(), std::min<int64_t>(4, count - i), out + i);
  }
}

}  // namespace longtake
