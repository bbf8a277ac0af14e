#include "ops/pixel_shuffle.h"

#include "device/dispatch.h"
#include "ops/expect.h"

namespace longtake {
namespace {

void expect_pair(const char* small_name, View small, const char* large_name, View large) {
  expect_rank(small_name, small, 3);
  expect_rank(large_name, large, 3);
  expect_float(small_name, small);
  expect_dtype(large_name, large, small.dtype());
  expect_shape(small_name, small, {large.dim(0) / 2, large.dim(1) / 2, large.dim(2) * 4});
  expect_shape(large_name, large, {small.dim(0) * 2, small.dim(1) * 2, small.dim(2) / 4});
}

}  // namespace

void pixel_shuffle(Context& ctx, View x, View out) {
  expect_pair("pixel_shuffle x", x, "pixel_shuffle out", out);
  if (x.empty()) return;
  LONGTAKE_DISPATCH(ctx, pixel_shuffle, x, out);
}

void pixel_unshuffle(Context& ctx, View x, View out) {
  expect_pair("pixel_unshuffle out", out, "pixel_unshuffle x", x);
  if (x.empty()) return;
  LONGTAKE_DISPATCH(ctx, pixel_unshuffle, x, out);
}

}  // namespace longtake
