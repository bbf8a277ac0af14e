// Moves of channels-last images.
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

// Channels [begin, begin + C) of x [H, W, more] -> out [H, W, C]; same dtype, f32 | bf16.
void slice_channels(Context& ctx, View x, int64_t begin, View out);

namespace cpu {
extern decltype(longtake::upsample_nearest) upsample_nearest;
extern decltype(longtake::concat_channels) concat_channels;
extern decltype(longtake::slice_channels) slice_channels;
}  // namespace cpu

namespace cuda {
extern decltype(longtake::upsample_nearest) upsample_nearest;
extern decltype(longtake::concat_channels) concat_channels;
extern decltype(longtake::slice_channels) slice_channels;
}  // namespace cuda

}  // namespace longtake
