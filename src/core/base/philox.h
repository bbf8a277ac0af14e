// Counter-based random numbers: Philox4x32-10 (Salmon et al. 2011). The same bits on every device,
// in any order.
#pragma once

#include <array>
#include <cstdint>

namespace longtake {

using PhiloxBlock = std::array<uint32_t, 4>;

// Four random words for one 128-bit counter under one 64-bit key.
PhiloxBlock philox4x32_10(const PhiloxBlock& counter, uint64_t key);

// Four standard normals from one block by Box-Muller (computed in double, rounded once): words (0,
// 1) give values 0 and 1, words (2, 3) give 2 and 3.
std::array<float, 4> normal_from(const PhiloxBlock& words);

// out[i] ~ N(0, 1), counter = (i / 4, step, frame, 0), key = seed. `step` tells noises of one frame
// apart.
void fill_normal(uint64_t seed, uint32_t frame, uint32_t step, float* out, int64_t count);

}  // namespace longtake
