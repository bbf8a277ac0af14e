#include "ops/conv.h"

#include "device/dispatch.h"
#include "ops/expect.h"

namespace longtake {

void conv2d(Context& ctx, View x, const ConvWeight& weight, View out) {
  expect_rank("conv2d x", x, 3);
  expect_dtype("conv2d x", x, weight.compute_dtype());
  expect_shape("conv2d x", x, {x.dim(0), x.dim(1), weight.in_channels()});
  expect_shape("conv2d out", out,
               {weight.out_height(x.dim(0)), weight.out_width(x.dim(1)), weight.out_channels()});
  expect_float("conv2d out", out);
  LONGTAKE_DISPATCH(ctx, conv2d, x, weight, out);
}

}  // namespace longtake
