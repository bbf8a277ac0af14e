// Norms by their definitions: plain loops in double.
#pragma once

#include <cmath>
#include <cstddef>
#include <vector>

namespace reference {

inline std::vector<double> layer_norm(const std::vector<double>& x,
                                      const std::vector<double>& scale,
                                      const std::vector<double>& shift, double eps,
                                      bool scale_plus_one) {
  const size_t dim = scale.size();
  std::vector<double> y(x.size());
  for (size_t row = 0; row < x.size(); row += dim) {
    double mean = 0;
    for (size_t i = 0; i < dim; ++i) mean += x[row + i] / static_cast<double>(dim);
    double variance = 0;
    for (size_t i = 0; i < dim; ++i)
      variance += (x[row + i] - mean) * (x[row + i] - mean) / static_cast<double>(dim);
    for (size_t i = 0; i < dim; ++i)
      y[row + i] = (x[row + i] - mean) / std::sqrt(variance + eps) *
                       (scale[i] + (scale_plus_one ? 1.0 : 0.0)) +
                   shift[i];
  }
  return y;
}

inline std::vector<double> rms_norm(const std::vector<double>& x, const std::vector<double>& weight,
                                    double eps) {
  const size_t dim = weight.size();
  std::vector<double> y(x.size());
  for (size_t row = 0; row < x.size(); row += dim) {
    double square = 0;
    for (size_t i = 0; i < dim; ++i) square += x[row + i] * x[row + i] / static_cast<double>(dim);
    for (size_t i = 0; i < dim; ++i) y[row + i] = x[row + i] / std::sqrt(square + eps) * weight[i];
  }
  return y;
}

}  // namespace reference
