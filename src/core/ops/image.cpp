#include "ops/image.h"

#include "device/dispatch.h"
#include "ops/expect.h"

namespace longtake {
namespace {

void expect_planes(View z, View scale, View shift, View image) {
  expect_rank("planes", z, 3);
  expect_dtype("planes", z, DType::kF32);
  expect_shape("image of planes", image, {z.dim(1), z.dim(2), z.dim(0)});
  LONGTAKE_CHECK(scale.empty() == shift.empty());
  if (scale.empty()) return;
  for (const View& vector : {scale, shift}) {
    expect_shape("scale or shift of planes", vector, {z.dim(0)});
    expect_dtype("scale or shift of planes", vector, DType::kF32);
  }
}

void expect_colours(View pixels, View rgb) {
  expect_dtype("pixels", pixels, DType::kF32);
  expect_dtype("rgb", rgb, DType::kU8);
  expect_shape("rgb", rgb, pixels.shape());
}

}  // namespace

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

View side_by_side(Context& ctx, std::span<const View> parts) {
  LONGTAKE_CHECK(!parts.empty(), "no parts");
  if (parts.size() == 1) return parts[0];
  int64_t channels = 0;
  for (const View& part : parts) channels += part.dim(2);
  const View out =
      ctx.workspace().take(parts[0].dtype(), {parts[0].dim(0), parts[0].dim(1), channels});
  concat_channels(ctx, parts, out);
  return out;
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

void to_channels_last(Context& ctx, View z, View scale, View shift, View out) {
  expect_planes(z, scale, shift, out);
  expect_float("image of planes", out);
  if (z.empty()) return;
  LONGTAKE_DISPATCH(ctx, to_channels_last, z, scale, shift, out);
}

void to_planes(Context& ctx, View x, View scale, View shift, View z) {
  expect_planes(z, scale, shift, x);
  expect_dtype("image of planes", x, DType::kF32);
  if (z.empty()) return;
  LONGTAKE_DISPATCH(ctx, to_planes, x, scale, shift, z);
}

void crop(Context& ctx, View x, int64_t row, int64_t column, View out) {
  expect_rank("crop x", x, 3);
  expect_dtype("crop x", x, DType::kF32);
  expect_rank("crop out", out, 3);
  expect_dtype("crop out", out, DType::kF32);
  expect_shape("crop out", out, {x.dim(0), out.dim(1), out.dim(2)});
  LONGTAKE_CHECK(
      row >= 0 && row + out.dim(1) <= x.dim(1) && column >= 0 && column + out.dim(2) <= x.dim(2),
      "from ", row, ", ", column, " of ", x.shape().to_string());
  if (out.empty()) return;
  LONGTAKE_DISPATCH(ctx, crop, x, row, column, out);
}

void blend(Context& ctx, View tile, View rows, View columns, const TilePlace& place, View out) {
  expect_rank("blend tile", tile, 3);
  expect_shape("blend rows", rows, {tile.dim(0)});
  expect_shape("blend columns", columns, {tile.dim(1)});
  expect_rank("blend out", out, 3);
  for (const View& x : {tile, rows, columns, out}) expect_dtype("blend", x, DType::kF32);
  LONGTAKE_CHECK(place.row >= 0 && place.row + tile.dim(0) <= out.dim(0) && place.column >= 0 &&
                     place.column + tile.dim(1) <= out.dim(1) && tile.dim(2) == out.dim(2),
                 tile.shape().to_string(), " at ", place.row, ", ", place.column, " of ",
                 out.shape().to_string());
  if (tile.empty()) return;
  LONGTAKE_DISPATCH(ctx, blend, tile, rows, columns, place, out);
}

void to_rgb(Context& ctx, View pixels, View rgb) {
  expect_colours(pixels, rgb);
  if (rgb.empty()) return;
  LONGTAKE_DISPATCH(ctx, to_rgb, pixels, rgb);
}

void from_rgb(Context& ctx, View rgb, View pixels) {
  expect_colours(pixels, rgb);
  if (rgb.empty()) return;
  LONGTAKE_DISPATCH(ctx, from_rgb, rgb, pixels);
}

}  // namespace longtake
