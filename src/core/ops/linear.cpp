#include "ops/linear.h"

#include "device/dispatch.h"
#include "ops/expect.h"

namespace longtake {

void linear(Context& ctx, View x, const LinearWeight& weight, Activation activation, View out) {
  expect_rank("linear x", x, 2);
  expect_dtype("linear x", x, weight.compute_dtype());
  expect_shape("linear x", x, {x.dim(0), weight.in_features()});
  expect_shape("linear out", out, {x.dim(0), weight.out_features()});
  expect_float("linear out", out);
  if (x.dim(0) == 0) return;
  LONGTAKE_DISPATCH(ctx, linear, x, weight, activation, out);
}

}  // namespace longtake
