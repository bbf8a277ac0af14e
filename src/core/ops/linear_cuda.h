// The product behind linear and conv2d on the GPU. CUDA builds only.
#pragma once

#include "device/context.h"
#include "ops/linear.h"
#include "tensor/tensor.h"

namespace longtake::cuda {

// Weights of a product, prepared on the CPU, then moved.
struct PackedProduct {
  Tensor weight;       // [out, in] in the compute dtype
  Tensor bias;         // [out] f32, or empty
  Tensor narrow_bias;  // [out] bf16 for bf16 results, or empty
  // The weight once more, as layer_tail's blocks want it (attention/layer_tail_cuda.cu), once one
  // has asked; or empty.
  mutable Tensor sliced;

  // weight [out, in] f32 | bf16, bias [out] f32 or empty; on the CPU.
  PackedProduct(Context& ctx, View weight, View bias, DType compute);

  size_t bytes() const {
    return weight.bytes() + bias.bytes() + narrow_bias.bytes() + sliced.bytes();
  }
};

const PackedProduct& packed_of(const LinearWeight& weight);

// out = act(x W^T + b). x [L, in] in the weight's dtype, out [L, out] f32 | bf16.
void multiply(Context& ctx, View x, const PackedProduct& weight, Activation activation, View out);

}  // namespace longtake::cuda
