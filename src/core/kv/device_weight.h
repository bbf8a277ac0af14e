// How a group's bias and its weight, e^bias, become each other: the same bits on either side, so
// that a saved state, which knows biases, comes back as the very weights that attention read. CUDA
// builds only.
#pragma once

#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace longtake::cuda {

// e^bias by multiply-adds alone, to about a unit in the last place; 0 below -87. bias <= 88.
__host__ __device__ inline float weight_of(float bias) {
  constexpr float kLog2E = 1.44269504F, kHighLn2 = 0.693145752F, kLowLn2 = 1.42860677e-6F;
  constexpr float kRounder = 0x1.8p23F;
  if (!(bias > -87.0F)) return 0;
  const float rounded = fmaf(bias, kLog2E, kRounder);
  const float n = rounded - kRounder;
  const float x = fmaf(n, -kLowLn2, fmaf(n, -kHighLn2, bias));  // |x| <= ln 2 / 2
  float p = 1.0F / 5040;
  p = fmaf(p, x, 1.0F / 720);
  p = fmaf(p, x, 1.0F / 120);
  p = fmaf(p, x, 1.0F / 24);
  p = fmaf(p, x, 1.0F / 6);
  p = fmaf(p, x, 0.5F);
  p = fmaf(p, x, 1.0F);
  p = fmaf(p, x, 1.0F);
  // Times 2^n in two steps, neither of which is beyond what f32 holds.
  const auto power = [](int exponent) {
    const uint32_t bits = static_cast<uint32_t>(exponent + 127) << 23;
    float out;
    memcpy(&out, &bits, sizeof out);
    return out;
  };
  const auto exponent = static_cast<int>(n);
  const int half = exponent / 2;
  return p * power(half) * power(exponent - half);
}

// A bias whose weight this is, if it is the weight of one.
inline float bias_of(float weight) {
  const float near = std::log(weight);
  if (!std::isfinite(near)) return near;
  // Biases that differ by less than this have the same weight, or nearly.
  constexpr float kApart = 0x1p-25F;
  constexpr int kMost = 16;
  float low = near, high = near;
  for (int i = 0; i < kMost; ++i) {
    if (weight_of(low) == weight) return low;
    if (weight_of(high) == weight) return high;
    low = std::fmin(low - kApart, std::nextafter(low, -INFINITY));
    high = std::fmax(high + kApart, std::nextafter(high, INFINITY));
  }
  return near;
}

}  // namespace longtake::cuda
