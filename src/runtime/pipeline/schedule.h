// Noise levels of the sampling steps.
#pragma once

#include <cstdint>
#include <vector>

namespace longtake {

// t_k = s u / (1 + (s - 1) u), u = 1 - k / num_steps, for k = 0..num_steps: t_0 = 1 (noise) falls
// to t_num_steps = 0 (clean). A shift s > 1 spends more of the steps on high noise.
std::vector<double> noise_levels(int64_t num_steps, double shift);

}  // namespace longtake
