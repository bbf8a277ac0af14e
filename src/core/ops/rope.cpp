#include "ops/rope.h"

#include "device/dispatch.h"
#include "ops/expect.h"

namespace longtake {

void rope(Context& ctx, View x, View cos, View sin, View out) {
  expect_rank("rope x", x, 3);
  expect_float("rope x", x);
  expect_float("rope out", out);
  expect_shape("rope out", out, x.shape());
  if (x.dim(2) % 2 != 0) throw Error(str("rope x: expected an even head_dim, found ", x.dim(2)));
  expect_shape("rope cos", cos, {x.dim(0), x.dim(2) / 2});
  expect_shape("rope sin", sin, {x.dim(0), x.dim(2) / 2});
  expect_dtype("rope cos", cos, DType::kF32);
  expect_dtype("rope sin", sin, DType::kF32);
  if (x.empty()) return;
  LONGTAKE_DISPATCH(ctx, rope, x, cos, sin, out);
}

}  // namespace longtake
