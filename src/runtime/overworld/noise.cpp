#include "overworld/noise.h"

#include <algorithm>

#include "overworld/rng.h"

namespace longtake::overworld {

namespace {

// Weights of the three nearest control points at sub-position j of `scale`: they sum to 8 *
// scale^2.
struct SplineWeights {
  int previous, centre, next;
};

SplineWeights spline_weights(int j, int scale) {
  const int next = (2 * j + 1) * (2 * j + 1);
  const int previous = (2 * scale - 2 * j - 1) * (2 * scale - 2 * j - 1);
  return {previous, 8 * scale * scale - previous - next, next};
}

int floor_divide(int a, int b) {
  return a >= 0 ? a / b : -((b - 1 - a) / b);
}

void add_octave(std::vector<int>& sum, int size, Octave octave, uint64_t seed) {
  const int n = octave.lattice;
  const int scale = size / n;
  const int unit = 8 * scale * scale;
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
    for (int x = 0; x < size; ++x) {
      const int k = x / scale;
      const SplineWeights w = spline_weights(x % scale, scale);
      const int v =
          w.previous * from[(k + n - 1) % n] + w.centre * from[k] + w.next * from[(k + 1) % n];
      wide[y * size + x] = floor_divide(v, unit);
    }
  }
  for (int y = 0; y < size; ++y) {
    const int k = y / scale;
    const SplineWeights w = spline_weights(y % scale, scale);
    const int* above = &wide[(k + n - 1) % n * size];
    const int* here = &wide[k * size];
    const int* below = &wide[(k + 1) % n * size];
    for (int x = 0; x < size; ++x) {
      const int v = w.previous * above[x] + w.centre * here[x] + w.next * below[x];
      sum[y * size + x] += v / unit * octave.weight;
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
