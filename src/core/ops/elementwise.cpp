#include "ops/elementwise.h"

#include "device/dispatch.h"
#include "ops/expect.h"

namespace longtake {

void add(Context& ctx, View x, View y) {
  expect_dtype("add x", x, DType::kF32);
  expect_float("add y", y);
  expect_shape("add y", y, x.shape());
  if (x.empty()) return;
  LONGTAKE_DISPATCH(ctx, add, x, y);
}

void add_gated(Context& ctx, View x, View y, View gate) {
  expect_dtype("add_gated x", x, DType::kF32);
  expect_float("add_gated y", y);
  expect_dtype("add_gated gate", gate, DType::kF32);
  expect_rank("add_gated x", x, 2);
  expect_shape("add_gated y", y, x.shape());
  expect_shape("add_gated gate", gate, {x.dim(1)});
  if (x.empty()) return;
  LONGTAKE_DISPATCH(ctx, add_gated, x, y, gate);
}

void silu(Context& ctx, View x, View out) {
  expect_float("silu x", x);
  expect_float("silu out", out);
  expect_shape("silu out", out, x.shape());
  if (x.empty()) return;
  LONGTAKE_DISPATCH(ctx, silu, x, out);
}

void relu(Context& ctx, View x, View out) {
  expect_float("relu x", x);
  expect_float("relu out", out);
  expect_shape("relu out", out, x.shape());
  if (x.empty()) return;
  LONGTAKE_DISPATCH(ctx, relu, x, out);
}

void convert(Context& ctx, View x, View out) {
  expect_float("convert x", x);
  expect_float("convert out", out);
  expect_shape("convert out", out, x.shape());
  if (x.empty()) return;
  LONGTAKE_DISPATCH(ctx, convert, x, out);
}

void axpby(Context& ctx, float a, View x, float b, View y, View out) {
  expect_dtype("axpby x", x, DType::kF32);
  expect_dtype("axpby y", y, DType::kF32);
  expect_dtype("axpby out", out, DType::kF32);
  expect_shape("axpby y", y, x.shape());
  expect_shape("axpby out", out, x.shape());
  if (x.empty()) return;
  LONGTAKE_DISPATCH(ctx, axpby, a, x, b, y, out);
}

void multiply(Context& ctx, View x, View y, View out) {
  expect_dtype("multiply x", x, DType::kF32);
  expect_dtype("multiply y", y, DType::kF32);
  expect_float("multiply out", out);
  expect_shape("multiply y", y, x.shape());
  expect_shape("multiply out", out, x.shape());
  if (x.empty()) return;
  LONGTAKE_DISPATCH(ctx, multiply, x, y, out);
}

void soft_limit(Context& ctx, View x, float limit, View out) {
  expect_dtype("soft_limit x", x, DType::kF32);
  expect_float("soft_limit out", out);
  expect_shape("soft_limit out", out, x.shape());
  if (x.empty()) return;
  LONGTAKE_DISPATCH(ctx, soft_limit, x, limit, out);
}

}  // namespace longtake
