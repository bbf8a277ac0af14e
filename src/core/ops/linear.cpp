#include "ops/linear.h"

#include "device/dispatch.h"
#include "ops/expect.h"

namespace longtake {
namespace {

std::unique_ptr<LinearWeight::Impl> pack(Context& ctx, View weight, View scale, View bias,
                                         DType compute) {
  LONGTAKE_DISPATCH(ctx, pack_linear, weight, scale, bias, compute);
}

}  // namespace

LinearWeight::LinearWeight(Context& ctx, View weight, View scale, View bias, DType compute) {
  expect_rank("linear weight", weight, 2);
  if (weight.dtype() == DType::kI8) {
    expect_shape("linear scale", scale, {weight.dim(0)});
    expect_dtype("linear scale", scale, DType::kF32);
  } else {
    expect_float("linear weight", weight);
  }
  if (!bias.empty()) {
    expect_shape("linear bias", bias, {weight.dim(0)});
    expect_dtype("linear bias", bias, DType::kF32);
  }
  impl_ = pack(ctx, weight, scale, bias, compute);
}

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
