// Space to channels and back by a factor of 2, channels-last, in PyTorch's channel order: channel
// 4 c + 2 i + j of the small image is pixel (2 y + i, 2 x + j) of channel c of the large one.
#pragma once

#include "device/context.h"
#include "tensor/tensor.h"

namespace longtake {

// x [H, W, 4 C] -> out [2 H, 2 W, C]; same dtype, f32 | bf16.
void pixel_shuffle(Context& ctx, View x, View out);

// x [2 H, 2 W, C] -> out [H, W, 4 C]; same dtype, f32 | bf16.
void pixel_unshuffle(Context& ctx, View x, View out);

namespace cpu {
extern decltype(longtake::pixel_shuffle) pixel_shuffle;
extern decltype(longtake::pixel_unshuffle) pixel_unshuffle;
}  // namespace cpu

namespace cuda {
extern decltype(longtake::pixel_shuffle) pixel_shuffle;
extern decltype(longtake::pixel_unshuffle) pixel_unshuffle;
}  // namespace cuda

}  // namespace longtake
