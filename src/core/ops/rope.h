// Rotary position embedding of adjacent pairs (2i, 2i+1), as Wan does it; not the half-split kind.
#pragma once

#include "device/context.h"
#include "tensor/tensor.h"

namespace longtake {

// (a, b) -> (a cos - b sin, a sin + b cos). x, out [L, N, D] f32 | bf16; cos, sin [L, D/2] f32,
// shared by the heads. out may alias x when the dtypes agree.
void rope(Context& ctx, View x, View cos, View sin, View out);

namespace cpu {
extern decltype(longtake::rope) rope;
}

namespace cuda {
extern decltype(longtake::rope) rope;
}

}  // namespace longtake
