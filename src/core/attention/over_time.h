// Softmax attention along time: every place of a frame reads itself in other frames, or what the
// whole frame shares, as the action modules of world models do.
#pragma once

#include <cstdint>

#include "device/context.h"
#include "tensor/tensor.h"

namespace longtake {

// out[f, p, n] = softmax_t(scale q[f, p, n] . k[t, p, n]) v[t, p, n]. q, out [F, P, N, D],
// k, v [T, P, N, D], or [T, 1, N, D] when all places read the same; one dtype, f32 | bf16; D at
// most 256. The last F frames of k are those of q; before them stand T - F frames of history, of
// which only the newest `clock` count: clock [1] i64, the first frame of q in the video.
void attend_over_time(Context& ctx, View q, View k, View v, View clock, float scale, View out);

namespace cpu {
extern decltype(longtake::attend_over_time) attend_over_time;
}

namespace cuda {
extern decltype(longtake::attend_over_time) attend_over_time;
}

}  // namespace longtake
