#include "ops/stream_linear.h"

#include "device/dispatch.h"
#include "ops/expect.h"

namespace longtake {
void expect_normed(const char* op, View x, const StreamNorm& norm, const LinearWeight& weight) {
  expect_rank(op, x, 2);
  expect_dtype(op, x, DType::kF32);
  expect_shape(op, x, {x.dim(0), weight.in_features()});
  expect_vectors(op, x, norm.scale);
  expect_vectors(op, x, norm.shift);
  LONGTAKE_CHECK(!norm.scale.frames.empty() &&
                 norm.scale.frames.size() == norm.shift.frames.size());
}

void norm_linear(Context& ctx, View x, const StreamNorm& norm, const LinearWeight& weight,
                 Activation activation, View out) {
  expect_normed("norm_linear", x, norm, weight);
  expect_shape("norm_linear out", out, {x.dim(0), weight.out_features()});
  expect_float("norm_linear out", out);
  if (x.dim(0) == 0) return;
  LONGTAKE_DISPATCH(ctx, norm_linear, x, norm, weight, activation, out);
}

void norm_linear_heads(Context& ctx, View x, const StreamNorm& norm, const LinearWeight& weight,
                       std::span<const HeadPart> parts, View cos, View sin, float eps) {
  expect_normed("norm_linear_heads", x, norm, weight);
  if (!expect_heads(x.dim(0), weight.out_features(), parts, cos, sin)) return;
  LONGTAKE_DISPATCH(ctx, norm_linear_heads, x, norm, weight, parts, cos, sin, eps);
}

void add_linear(Context& ctx, View y, const LinearWeight& weight, const FrameVectors& gate,
                DType residual, View base, View x) {
  expect_rank("add_linear y", y, 2);
  expect_dtype("add_linear y", y, weight.compute_dtype());
  expect_shape("add_linear y", y, {y.dim(0), weight.in_features()});
  expect_shape("add_linear x", x, {y.dim(0), weight.out_features()});
  expect_dtype("add_linear x", x, DType::kF32);
  expect_shape("add_linear base", base, x.shape());
  expect_dtype("add_linear base", base, DType::kF32);
  expect_vectors("add_linear gate", x, gate);
  if (y.dim(0) == 0) return;
  LONGTAKE_DISPATCH(ctx, add_linear, y, weight, gate, residual, base, x);
}

}  // namespace longtake
