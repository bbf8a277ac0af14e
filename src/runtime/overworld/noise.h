#pragma once

#include <cstdint>
#include <span>
#include <vector>

// Periodic smooth noise in integers.
namespace longtake::overworld {

// Random values on a periodic `lattice` x `lattice` grid, smoothed by a quadratic B-spline.
// `weight` in 1/256.
struct Octave {
  int lattice;
  int weight;
};

// Returns `size` x `size` values, row-major, periodic, mean near 0. One octave of weight 256 has a
// standard deviation of about 325 and stays within +-1024. Every lattice must divide `size`.
std::vector<int16_t> periodic_noise(int size, std::span<const Octave> octaves, uint64_t seed);

// The value below which `percent` of `values` lie; reorders them. `values` must not be empty.
int16_t quantile(std::span<int16_t> values, int percent);

}  // namespace longtake::overworld
