#include "models/wan/schedule.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "ops/elementwise.h"

namespace longtake::wan {

Schedule::Schedule(float shift) {
  constexpr float kStep = -1.0F / static_cast<float>(kTrainSteps);
  for (int64_t i = 0; i < kTrainSteps; ++i) {
    // Counted from the nearer end, as torch.linspace does.
    const float u = i < (kTrainSteps + 1) / 2 ? 1.0F + kStep * static_cast<float>(i)
                                              : -kStep * static_cast<float>(kTrainSteps - i);
    const auto at = static_cast<size_t>(i);
    sigmas_[at] = shift * u / (1.0F + (shift - 1.0F) * u);
    timesteps_[at] = sigmas_[at] * static_cast<float>(kTrainSteps);
  }
}

std::vector<float> Schedule::warp(std::span<const int64_t> nominal) const {
  std::vector<float> out;
  for (const int64_t step : nominal) {
    if (step < 0 || step > kTrainSteps)
      throw Error(ErrorKind::kInput,
                  str("denoising step: expected 0..", kTrainSteps, ", found ", step));
    out.push_back(step == 0 ? 0.0F : timesteps_[static_cast<size_t>(kTrainSteps - step)]);
  }
  return out;
}

float Schedule::sigma(float timestep) const {
  const auto distance = [&](float t) {
    return std::abs(static_cast<double>(t) - static_cast<double>(timestep));
  };
  const auto nearest =
      std::min_element(timesteps_.begin(), timesteps_.end(),
                       [&](float a, float b) { return distance(a) < distance(b); });
  return sigmas_[static_cast<size_t>(nearest - timesteps_.begin())];
}

void Schedule::to_clean(Context& ctx, float timestep, View x, View flow, View x0) const {
  // The op adds 1 x to the product without rounding it first: as good as double precision.
  axpby(ctx, -sigma(timestep), flow, 1, x, x0);
}

void Schedule::add_noise(Context& ctx, float timestep, View x0, View noise, View x) const {
  const float s = sigma(timestep);
  axpby(ctx, 1 - s, x0, s, noise, x);
}

}  // namespace longtake::wan
