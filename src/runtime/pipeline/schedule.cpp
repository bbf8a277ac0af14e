#include "pipeline/schedule.h"

#include "base/error.h"

namespace longtake {

std::vector<double> noise_levels(int64_t num_steps, double shift) {
  LONGTAKE_CHECK(num_steps > 0 && shift > 0, num_steps, " steps, shift ", shift);
  std::vector<double> levels;
  for (int64_t k = 0; k <= num_steps; ++k) {
    const double u = 1.0 - static_cast<double>(k) / static_cast<double>(num_steps);
    levels.push_back(shift * u / (1.0 + (shift - 1.0) * u));
  }
  return levels;
}

}  // namespace longtake
