// Steps of a convolutional decoder, each into fresh workspace memory of the caller's scope.
#pragma once

#include <span>

#include "device/context.h"
#include "ops/conv.h"
#include "ops/elementwise.h"
#include "tensor/tensor.h"

namespace longtake {

// parts [H, W, C_i] in the weight's compute dtype, side by side; out [H', W', out] in `dtype`, f32
// | bf16.
inline View convolve(Context& ctx, std::span<const View> parts, const ConvWeight& weight,
                     DType dtype) {
  const View out =
      ctx.workspace().take(dtype, {weight.out_height(parts[0].dim(0)),
                                   weight.out_width(parts[0].dim(1)), weight.out_channels()});
  conv2d(ctx, parts, weight, out);
  return out;
}

inline View convolve(Context& ctx, View x, const ConvWeight& weight, DType dtype) {
  return convolve(ctx, std::span(&x, 1), weight, dtype);
}

// x in the dtype that the next convolution reads; x itself if it has it.
inline View converted(Context& ctx, View x, DType dtype) {
  if (x.dtype() == dtype) return x;
  const View out = ctx.workspace().take(dtype, x.shape());
  convert(ctx, x, out);
  return out;
}

}  // namespace longtake
