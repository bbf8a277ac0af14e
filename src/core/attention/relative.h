// Softmax attention of every token to every token with a bias for each head and distance, and
// without a scale, as T5's encoders have it (Raffel et al. 2020). For prompts, and for the
// pixels of the smallest image of a decoder.
#pragma once

#include "device/context.h"
#include "tensor/tensor.h"

namespace longtake {

// out_i = sum_j softmax_j(q_i k_j + bias[n, j - i + L - 1]) v_j per head n. q, k, v [L, N, D] f32;
// bias [N, 2 L - 1] f32, or empty: none; out [L, N, D] f32 | bf16.
void attend_relative(Context& ctx, View q, View k, View v, View bias, View out);

namespace cpu {
extern decltype(longtake::attend_relative) attend_relative;
}

namespace cuda {
extern decltype(longtake::attend_relative) attend_relative;
}

}  // namespace longtake
