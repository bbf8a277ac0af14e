// The flow-matching schedule of the Wan family: noise levels, the few timesteps that distilled
// models run, and the steps between noisy and clean latents. Arithmetic in the precisions of the
// official code, since a timestep that is a rounding error off meets another noise level.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "device/context.h"
#include "models/wan/config.h"
#include "tensor/tensor.h"

namespace longtake::wan {

inline constexpr float kShift = 5;  // of the released generators

class Schedule {
 public:
  // shift > 1 spends more of the steps on high noise.
  explicit Schedule(float shift = kShift);

  // sigma_i = s u / (1 + (s - 1) u), u falling from 1 in kTrainSteps steps; timestep = 1000 sigma.
  std::span<const float> sigmas() const { return sigmas_; }

  std::span<const float> timesteps() const { return timesteps_; }

  // The timesteps that nominal ones, 1000..0, stand for under the shift: 500 -> 833.33 at shift 5.
  // Throws Error (kInput) for one out of range.
  std::vector<float> warp(std::span<const int64_t> nominal) const;

  // sigma of the timestep nearest to t. 0 has the smallest sigma of the table, which is not 0.
  float sigma(float timestep) const;

  // x0 = x - sigma flow, rounded once. All f32 and of one shape; may alias.
  void to_clean(Context& ctx, float timestep, View x, View flow, View x0) const;

  // x = (1 - sigma) x0 + sigma noise. All f32 and of one shape; may alias.
  void add_noise(Context& ctx, float timestep, View x0, View noise, View x) const;

 private:
  std::array<float, kTrainSteps> sigmas_, timesteps_;
};

}  // namespace longtake::wan
