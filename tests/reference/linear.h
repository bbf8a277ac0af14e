// Linear layer and convolution by their definitions: plain loops in double.
#pragma once

#include <cmath>
#include <cstddef>
#include <vector>

namespace reference {

// y [L, out] = x [L, in] w^T [out, in] + b [out].
inline std::vector<double> linear(const std::vector<double>& x, const std::vector<double>& w,
                                  const std::vector<double>& b, size_t rows, size_t in,
                                  size_t out) {
  std::vector<double> y(rows * out);
  for (size_t r = 0; r < rows; ++r) {
    for (size_t o = 0; o < out; ++o) {
      double sum = b.empty() ? 0.0 : b[o];
      for (size_t i = 0; i < in; ++i) sum += x[r * in + i] * w[o * in + i];
      y[r * out + o] = sum;
    }
  }
  return y;
}

inline double silu(double x) {
  return x / (1.0 + std::exp(-x));
}

inline double gelu(double x) {
  return 0.5 * x * std::erfc(-x / std::sqrt(2.0));
}

inline double gelu_tanh(double x) {
  return 0.5 * x * (1.0 + std::tanh(std::sqrt(2.0 / M_PI) * (x + 0.044715 * x * x * x)));
}

// x [H, W, in], w [out, in, k, k], b [out] -> [H', W', out], zero padding.
inline std::vector<double> conv2d(const std::vector<double>& x, const std::vector<double>& w,
                                  const std::vector<double>& b, long height, long width, long in,
                                  long out, long kernel, long stride, long padding) {
  const long out_height = (height + 2 * padding - kernel) / stride + 1;
  const long out_width = (width + 2 * padding - kernel) / stride + 1;
  std::vector<double> y;
  for (long oy = 0; oy < out_height; ++oy) {
    for (long ox = 0; ox < out_width; ++ox) {
      for (long o = 0; o < out; ++o) {
        double sum = b.empty() ? 0.0 : b[static_cast<size_t>(o)];
        for (long ky = 0; ky < kernel; ++ky) {
          for (long kx = 0; kx < kernel; ++kx) {
            const long iy = oy * stride + ky - padding;
            const long ix = ox * stride + kx - padding;
            if (iy < 0 || ix < 0 || iy >= height || ix >= width) continue;
            for (long i = 0; i < in; ++i)
              sum += x[static_cast<size_t>((iy * width + ix) * in + i)] *
                     w[static_cast<size_t>(((o * in + i) * kernel + ky) * kernel + kx)];
          }
        }
        y.push_back(sum);
      }
    }
  }
  return y;
}

}  // namespace reference
