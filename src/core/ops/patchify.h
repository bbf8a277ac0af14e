// Latents to tokens and back. Tokens are row-major over patches (y, then x); the values of a patch
// are ordered (c, py, px).
#pragma once

#include <cstdint>

#include "device/context.h"
#include "tensor/tensor.h"

namespace longtake {

// z [C, H, W] f32 -> out [(H/P) (W/P), C P P] f32 | bf16.
void patchify(Context& ctx, View z, int64_t patch, View out);

// x [(H/P) (W/P), C P P] f32 -> z [C, H, W] f32.
void unpatchify(Context& ctx, View x, int64_t patch, View z);

namespace cpu {
extern decltype(longtake::patchify) patchify;
extern decltype(longtake::unpatchify) unpatchify;
}  // namespace cpu

namespace cuda {
extern decltype(longtake::patchify) patchify;
extern decltype(longtake::unpatchify) unpatchify;
}  // namespace cuda

}  // namespace longtake
