// The 3 x 3 convolution of larger images on the GPU, without a matrix of what lies under the
// kernel. CUDA builds only.
#pragma once

#include <span>

#include "device/context.h"
#include "ops/conv.h"
#include "ops/linear_cuda.h"

namespace longtake::cuda {

// Whether direct_conv can do it: bf16, 3 x 3, stride and padding 1, parts of whole groups of 32
// channels, and an image that keeps a GPU busy.
bool is_direct_conv(std::span<const View> parts, const ConvWeight::Form& form);

// As conv2d; weight [out, (ky, kx, channel)].
void direct_conv(Context& ctx, std::span<const View> parts, const PackedProduct& weight, View out);

}  // namespace longtake::cuda
