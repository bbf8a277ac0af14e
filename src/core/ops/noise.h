// Noise of latents on the device that reads it.
#pragma once

#include <cstdint>

#include "device/context.h"
#include "tensor/tensor.h"

namespace longtake {

// out [...] f32: `frames` equal parts, of which part f is what base/philox.h's fill_normal gives
// for `seed`, `step` and the latent frame clock + first_frame + f. clock [1] i64 (ops/clock.h). The
// GPU computes in double too; its logarithm and sines may move a result by one unit in the last
// place.
void fill_normal(Context& ctx, uint64_t seed, View clock, uint32_t step, View out,
                 int64_t first_frame = 0, int64_t frames = 1);

namespace cpu {
void fill_normal(Context& ctx, uint64_t seed, View clock, uint32_t step, View out,
                 int64_t first_frame, int64_t frames);
}

namespace cuda {
extern decltype(cpu::fill_normal) fill_normal;
}

}  // namespace longtake
