// How diffusion transformers are told their noise level.
#pragma once

#include <cmath>
#include <cstdint>

#include "tensor/tensor.h"

namespace longtake {

// out [1, 2 H] f32 on the CPU: cos(a_i), then sin(a_i), a_i = timestep * theta^(-i / H).
inline void time_sinusoid(double timestep, double theta, View out) {
  const int64_t half = out.dim(1) / 2;
  auto* values = out.data<float>();
  for (int64_t i = 0; i < half; ++i) {
    const double angle =
        timestep * std::pow(theta, -static_cast<double>(i) / static_cast<double>(half));
    values[i] = static_cast<float>(std::cos(angle));
    values[half + i] = static_cast<float>(std::sin(angle));
  }
}

}  // namespace longtake
