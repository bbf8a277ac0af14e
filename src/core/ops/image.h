// Moves of channels-last images, and what they are at the ends of a model: planes, and colours.
#pragma once

#include <span>

#include "device/context.h"
#include "tensor/tensor.h"

namespace longtake {

// Every pixel four times: x [H, W, C] -> out [2 H, 2 W, C]; same dtype, f32 | bf16.
void upsample_nearest(Context& ctx, View x, View out);

inline constexpr size_t kMaxImageParts = 4;

// Channels of all parts behind each other: parts [H, W, C_i] -> out [H, W, sum of C_i]; one dtype,
// f32 | bf16; at most kMaxImageParts.
void concat_channels(Context& ctx, std::span<const View> parts, View out);

// The same in the caller's workspace; a single part is its own.
View side_by_side(Context& ctx, std::span<const View> parts);

// Channels [begin, begin + C) of x [H, W, more] -> out [H, W, C]; same dtype, f32 | bf16.
void slice_channels(Context& ctx, View x, int64_t begin, View out);

// Planes to channels-last and back, with a scale and a shift for every channel: out = z * scale +
// shift, z = (x - shift) / scale. z [C, H, W] f32, image [H, W, C] f32 (to_channels_last's out also
// bf16); scale, shift [C] f32, or both empty: 1 and 0.
void to_channels_last(Context& ctx, View z, View scale, View shift, View out);
void to_planes(Context& ctx, View x, View scale, View shift, View z);

// The part of planes x [C, H, W] that begins at (y, x) -> out [C, h, w]; f32.
void crop(Context& ctx, View x, int64_t row, int64_t column, View out);

// Where a tile lies in its picture. Of its pixels those from (fresh_rows, fresh_columns) on are the
// picture's first there; the others are added to what tiles before it left.
struct TilePlace {
  int64_t row = 0, column = 0;
  int64_t fresh_rows = 0, fresh_columns = 0;
};

// tile [h, w, C], weighted by rows [h] and columns [w], joins out [H, W, C]; all f32.
void blend(Context& ctx, View tile, View rows, View columns, const TilePlace& place, View out);

// [-1, 1] f32 <-> 0..255 u8 of the same shape; out of range is clamped, NaN becomes 0.
void to_rgb(Context& ctx, View pixels, View rgb);
void from_rgb(Context& ctx, View rgb, View pixels);

namespace cpu {
extern decltype(longtake::upsample_nearest) upsample_nearest;
extern decltype(longtake::concat_channels) concat_channels;
extern decltype(longtake::slice_channels) slice_channels;
extern decltype(longtake::to_channels_last) to_channels_last;
extern decltype(longtake::to_planes) to_planes;
extern decltype(longtake::crop) crop;
extern decltype(longtake::blend) blend;
extern decltype(longtake::to_rgb) to_rgb;
extern decltype(longtake::from_rgb) from_rgb;
}  // namespace cpu

namespace cuda {
extern decltype(longtake::upsample_nearest) upsample_nearest;
extern decltype(longtake::concat_channels) concat_channels;
extern decltype(longtake::slice_channels) slice_channels;
extern decltype(longtake::to_channels_last) to_channels_last;
extern decltype(longtake::to_planes) to_planes;
extern decltype(longtake::crop) crop;
extern decltype(longtake::blend) blend;
extern decltype(longtake::to_rgb) to_rgb;
extern decltype(longtake::from_rgb) from_rgb;
}  // namespace cuda

}  // namespace longtake
