#include "attention/relative.h"

#include "device/dispatch.h"
#include "ops/expect.h"

namespace longtake {

void attend_relative(Context& ctx, View q, View k, View v, View bias, View out) {
  expect_rank("attend_relative q", q, 3);
  for (const View& x : {q, k, v}) expect_dtype("attend_relative input", x, DType::kF32);
  expect_shape("attend_relative k", k, q.shape());
  expect_shape("attend_relative v", v, q.shape());
  if (!bias.empty()) {
    expect_dtype("attend_relative bias", bias, DType::kF32);
    expect_shape("attend_relative bias", bias, {q.dim(1), 2 * q.dim(0) - 1});
  }
  expect_shape("attend_relative out", out, q.shape());
  expect_float("attend_relative out", out);
  if (q.empty()) return;
  LONGTAKE_DISPATCH(ctx, attend_relative, q, k, v, bias, out);
}

}  // namespace longtake
