#include "kv/time_rotation.h"

#include <cmath>

#include "base/error.h"

namespace longtake {

TimeRotation::TimeRotation(int64_t pairs, double theta, int64_t frame)
    : pairs_(static_cast<size_t>(pairs)) {
  LONGTAKE_CHECK(pairs >= 0 && pairs <= kMaxPairs, pairs, " pairs");
  for (int64_t i = 0; i < pairs; ++i) {
    const double angle = static_cast<double>(frame) *
                         std::pow(theta, -static_cast<double>(i) / static_cast<double>(pairs));
    cos_[static_cast<size_t>(i)] = static_cast<float>(std::cos(angle));
    sin_[static_cast<size_t>(i)] = static_cast<float>(std::sin(angle));
  }
}

void TimeRotation::turn(float* key, float sign) const {
  for (size_t i = 0; i < pairs_; ++i) {
    const float a = key[2 * i];
    const float b = key[2 * i + 1];
    key[2 * i] = a * cos_[i] - sign * b * sin_[i];
    key[2 * i + 1] = b * cos_[i] + sign * a * sin_[i];
  }
}

}  // namespace longtake
