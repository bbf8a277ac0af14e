// Softmax attention by its definition: plain loops in double.
#pragma once

#include <cmath>
#include <cstddef>
#include <limits>
#include <vector>

namespace reference {

// q [L, N, D], k, v [T, N, D], bias [N, T] (may be empty) -> [L, N, D]. Keys with a bias of -inf do
// not count; without any key the result is 0.
inline std::vector<double> attention(const std::vector<double>& q, const std::vector<double>& k,
                                     const std::vector<double>& v, const std::vector<double>& bias,
                                     size_t queries, size_t keys, size_t heads, size_t dim,
                                     double scale) {
  std::vector<double> out(queries * heads * dim, 0.0);
  for (size_t head = 0; head < heads; ++head) {
    for (size_t i = 0; i < queries; ++i) {
      std::vector<double> score(keys);
      double top = -std::numeric_limits<double>::infinity();
      for (size_t j = 0; j < keys; ++j) {
        double dot = 0;
        for (size_t d = 0; d < dim; ++d)
          dot += q[(i * heads + head) * dim + d] * k[(j * heads + head) * dim + d];
        score[j] = dot * scale + (bias.empty() ? 0.0 : bias[head * keys + j]);
        top = std::fmax(top, score[j]);
      }
      if (std::isinf(top)) continue;
      double sum = 0;
      for (double& s : score) sum += s = std::exp(s - top);
      for (size_t j = 0; j < keys; ++j) {
        for (size_t d = 0; d < dim; ++d)
          out[(i * heads + head) * dim + d] += score[j] / sum * v[(j * heads + head) * dim + d];
      }
    }
  }
  return out;
}

}  // namespace reference
