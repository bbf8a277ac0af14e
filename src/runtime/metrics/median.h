// The middle of measurements.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

namespace longtake {

// The upper of two middles; NaN of nothing.
inline double median(std::vector<double> values) {
  if (values.empty()) return std::numeric_limits<double>::quiet_NaN();
  const auto middle = values.begin() + static_cast<int64_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

}  // namespace longtake
