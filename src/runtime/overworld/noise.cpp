#include "overworld/noise.h"

#include <algorithm>

#include "overworld/rng.h"

namespace longtake::overworld {

namespace {

// Weights of the three nearest control points at one sub-position of a lattice cell; they sum to
// 2^kWeightShift.
struct SplineWeights {
  int previous, centre, next;
};

constexpr int kWeightShift = 12;

std::vector<SplineWeights> spline_weights(int scale) {
  std::vector<SplineWeights> weights;
  for (int j = 0; j < scale; ++j) {
    const auto weight = [&](int odd) { return (odd * odd << kWeightShift) / (8 * scale * scale); };
    const int next = weight(2 * j + 1), previous = weight(2 * (scale - j) - 1);
    weights.push_back({previous, (1 << kWeightShift) - previous - next, next});
  }
  return weights;
}

void add_octave(std::vector<int>& sum, int size, Octave octave, uint64_t seed) {
  const int n = octave.lattice;
  const int scale = size / n;
  const std::vector<SplineWeights> weights = spline_weights(scale);
  std::vector<int> lattice(static_cast<size_t>(n) * n);
  for (int y = 0; y < n; ++y) {
    for (int x = 0; x < n; ++x) {
      lattice[y * n + x] = static_cast<int>(hash_bits(seed, n, x, y) & 2047) - 1024;
    }
  }
  // Rows of the lattice become `size` wide, then columns become `size` high.
  std::vector<int> wide(static_cast<size_t>(n) * size);
  for (int y = 0; y < n; ++y) {
    const int* from = &lattice[y * n];
    int* to = &wide[y * size];
    for (int k = 0; k < n; ++k) {
      const int west = from[(k + n - 1) % n], centre = from[k], east = from[(k + 1) % n];
      for (const SplineWeights& w : weights) {
        *to++ = (w.previous * west + w.centre * centre + w.next * east) >> kWeightShift;
      }
    }
  }
  for (int y = 0; y < size; ++y) {
    const int k = y / scale;
    const SplineWeights w = weights[y % scale];
    const int* above = &wide[(k + n - 1) % n * size];
    const int* here = &wide[k * size];
    const int* below = &wide[(k + 1) % n * size];
    int* to = &sum[y * size];
    for (int x = 0; x < size; ++x) {
      const int v =
          (w.previous * above[x] + w.centre * here[x] + w.next * below[x]) >> kWeightShift;
      to[x] += v * octave.weight;
    }
  }
}

}  // namespace

std::vector<int16_t> periodic_noise(int size, std::span<const Octave> octaves, uint64_t seed) {
  std::vector<int> sum(static_cast<size_t>(size) * size, 0);
  for (const Octave& octave : octaves) add_octave(sum, size, octave, seed);
  std::vector<int16_t> noise(sum.size());
  std::transform(sum.begin(), sum.end(), noise.begin(),
                 [](int v) { return static_cast<int16_t>(std::clamp(v >> 8, -4096, 4095)); });
  return noise;
}

int16_t quantile(std::span<int16_t> values, int percent) {
  const size_t rank =
      std::min(values.size() - 1, values.size() * static_cast<size_t>(percent) / 100);
  std::nth_element(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(rank),
                   values.end());
  return values[rank];
}

}  // namespace longtake::overworld
