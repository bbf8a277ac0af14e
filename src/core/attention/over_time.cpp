#include "attention/over_time.h"

#include "device/dispatch.h"
#include "ops/expect.h"

namespace longtake {

void attend_over_time(Context& ctx, View q, View k, View v, View clock, float scale, View out) {
  constexpr int64_t kMostChannels = 256;
  expect_rank("attend_over_time q", q, 4);
  expect_rank("attend_over_time k", k, 4);
  expect_float("attend_over_time q", q);
  const int64_t places = k.dim(1) == 1 ? 1 : q.dim(1);
  expect_shape("attend_over_time k", k, {k.dim(0), places, q.dim(2), q.dim(3)});
  expect_shape("attend_over_time v", v, k.shape());
  expect_shape("attend_over_time out", out, q.shape());
  for (const View& other : {k, v, out}) expect_dtype("attend_over_time", other, q.dtype());
  expect_shape("attend_over_time clock", clock, {1});
  expect_dtype("attend_over_time clock", clock, DType::kI64);
  if (k.dim(0) < q.dim(0) || q.dim(3) > kMostChannels)
    throw Error(str("attend_over_time: expected at least ", q.dim(0),
                    " frames of keys and at most ", kMostChannels, " channels, found ",
                    k.shape().to_string()));
  if (q.empty()) return;
  LONGTAKE_DISPATCH(ctx, attend_over_time, q, k, v, clock, scale, out);
}

}  // namespace longtake
