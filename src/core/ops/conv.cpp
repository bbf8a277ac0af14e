#include "ops/conv.h"

#include "device/dispatch.h"
#include "ops/expect.h"
#include "ops/image.h"

namespace longtake {
namespace {

std::unique_ptr<ConvWeight::Impl> pack(Context& ctx, View weight, View scale, View bias,
                                       const ConvWeight::Form& form) {
  LONGTAKE_DISPATCH(ctx, pack_conv, weight, scale, bias, form);
}

}  // namespace

ConvWeight::ConvWeight(Context& ctx, View weight, View scale, View bias, int stride, int padding,
                       DType compute) {
  expect_rank("conv2d weight", weight, 4);
  LONGTAKE_CHECK(stride > 0 && padding >= 0, "stride ", stride, ", padding ", padding);
  if (weight.dtype() == DType::kI8) {
    expect_shape("conv2d scale", scale, {weight.dim(0)});
    expect_dtype("conv2d scale", scale, DType::kF32);
  } else {
    expect_float("conv2d weight", weight);
  }
  if (!bias.empty()) {
    expect_shape("conv2d bias", bias, {weight.dim(0)});
    expect_dtype("conv2d bias", bias, DType::kF32);
  }
  impl_ =
      pack(ctx, weight, scale, bias,
           {weight.dim(1), weight.dim(0), weight.dim(2), weight.dim(3), stride, padding, compute});
}

void conv2d(Context& ctx, View x, const ConvWeight& weight, View out) {
  conv2d(ctx, std::span(&x, 1), weight, out);
}

void conv2d(Context& ctx, std::span<const View> parts, const ConvWeight& weight, View out) {
  LONGTAKE_CHECK(!parts.empty() && parts.size() <= kMaxImageParts, parts.size(), " parts");
  int64_t channels = 0;
  for (const View& part : parts) {
    expect_rank("conv2d x", part, 3);
    expect_dtype("conv2d x", part, weight.compute_dtype());
    expect_shape("conv2d x", part, {parts[0].dim(0), parts[0].dim(1), part.dim(2)});
    channels += part.dim(2);
  }
  LONGTAKE_CHECK(channels == weight.in_channels(), "conv2d x: ", channels, " channels, not ",
                 weight.in_channels());
  expect_shape("conv2d out", out,
               {weight.out_height(parts[0].dim(0)), weight.out_width(parts[0].dim(1)),
                weight.out_channels()});
  expect_float("conv2d out", out);
  LONGTAKE_DISPATCH(ctx, conv2d, parts, weight, out);
}

}  // namespace longtake
