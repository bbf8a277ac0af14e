#include "ops/norm.h"

#include "device/dispatch.h"
#include "ops/expect.h"

namespace longtake {
namespace {

void expect_rows(const char* name, View x, View out) {
  if (x.shape().rank() == 0) throw Error(str(name, ": expected at least 1 axis, found 0"));
  expect_shape(name, out, x.shape());
  expect_float(name, x);
  expect_float(name, out);
}

void expect_vector(const char* name, View vector, int64_t size) {
  expect_shape(name, vector, {size});
  expect_dtype(name, vector, DType::kF32);
}

}  // namespace

void layer_norm(Context& ctx, View x, View scale, View shift, float eps, bool scale_plus_one,
                View out) {
  expect_rows("layer_norm", x, out);
  expect_dtype("layer_norm x", x, DType::kF32);
  expect_vector("layer_norm scale", scale, x.dim(-1));
  expect_vector("layer_norm shift", shift, x.dim(-1));
  if (x.empty()) return;
  LONGTAKE_DISPATCH(ctx, layer_norm, x, scale, shift, eps, scale_plus_one, out);
}

void rms_norm(Context& ctx, View x, View weight, float eps, View out) {
  expect_rows("rms_norm", x, out);
  expect_vector("rms_norm weight", weight, x.dim(-1));
  if (x.empty()) return;
  LONGTAKE_DISPATCH(ctx, rms_norm, x, weight, eps, out);
}

void rms_norm_silu(Context& ctx, View x, View weight, float eps, View out) {
  expect_rows("rms_norm_silu", x, out);
  expect_vector("rms_norm_silu weight", weight, x.dim(-1));
  if (x.empty()) return;
  LONGTAKE_DISPATCH(ctx, rms_norm_silu, x, weight, eps, out);
}

}  // namespace longtake
