#include "ops/image.h"

#include "device/dispatch.h"
#include "ops/expect.h"

namespace longtake {

void upsample_nearest(Context& ctx, View x, View out) {
  expect_rank("upsample_nearest x", x, 3);
  expect_float("upsample_nearest x", x);
  expect_dtype("upsample_nearest out", out, x.dtype());
  expect_shape("upsample_nearest out", out, {2 * x.dim(0), 2 * x.dim(1), x.dim(2)});
  if (x.empty()) return;
  LONGTAKE_DISPATCH(ctx, upsample_nearest, x, out);
}

void concat_channels(Context& ctx, std::span<const View> parts, View out) {
  expect_rank("concat_channels out", out, 3);
  expect_float("concat_channels out", out);
  LONGTAKE_CHECK(parts.size() <= kMaxImageParts, parts.size(), " parts");
  int64_t channels = 0;
  for (const View& part : parts) {
    expect_rank("concat_channels part", part, 3);
    expect_shape("concat_channels part", part, {out.dim(0), out.dim(1), part.dim(2)});
    expect_dtype("concat_channels part", part, out.dtype());
    channels += part.dim(2);
  }
  expect_shape("concat_channels out", out, {out.dim(0), out.dim(1), channels});
  if (out.empty()) return;
  LONGTAKE_DISPATCH(ctx, concat_channels, parts, out);
}

void slice_channels(Context& ctx, View x, int64_t begin, View out) {
  expect_rank("slice_channels x", x, 3);
  expect_float("slice_channels x", x);
  expect_rank("slice_channels out", out, 3);
  expect_dtype("slice_channels out", out, x.dtype());
  expect_shape("slice_channels out", out, {x.dim(0), x.dim(1), out.dim(2)});
  LONGTAKE_CHECK(begin >= 0 && begin + out.dim(2) <= x.dim(2), "channels from ", begin, " of ",
                 x.shape().to_string(), " into ", out.shape().to_string());
  if (out.empty()) return;
  LONGTAKE_DISPATCH(ctx, slice_channels, x, begin, out);
}

}  // namespace longtake
