// Activations of a product's results. For .cu files.
#pragma once

#include "ops/linear.h"

namespace longtake::cuda {

__device__ inline float activated(float x, Activation activation) {
  if (activation == Activation::kSilu) return x / (1.0F + expf(-x));
  if (activation == Activation::kGeluTanh) {
    constexpr float kFactor = 0.7978845608028654F;  // sqrt(2 / pi)
    return 0.5F * x * (1.0F + tanhf(kFactor * (x + 0.044715F * x * x * x)));
  }
  if (activation == Activation::kGelu) return x * normcdff(x);
  return x;
}

}  // namespace longtake::cuda
