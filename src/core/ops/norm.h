// Norms over the last axis. Sums in f32; out may alias x when the dtypes agree.
#pragma once

#include "device/context.h"
#include "tensor/tensor.h"

namespace longtake {

// out = (x - mean) * rsqrt(var + eps) * (scale + (scale_plus_one ? 1 : 0)) + shift.
// scale_plus_one = true is adaptive layer norm (modulation), false an affine norm.
// x [..., dim] f32; scale, shift [dim] f32; out [..., dim] f32 | bf16.
void layer_norm(Context& ctx, View x, View scale, View shift, float eps, bool scale_plus_one,
                View out);

// out = x * rsqrt(mean(x^2) + eps) * weight. x, out [..., dim] f32 | bf16; weight [dim] f32.
// Zhang & Sennrich 2019.
void rms_norm(Context& ctx, View x, View weight, float eps, View out);

// out = silu(rms_norm(x)) in one pass: the autoencoder's ChannelNorm + silu.
void rms_norm_silu(Context& ctx, View x, View weight, float eps, View out);

namespace cpu {
extern decltype(longtake::layer_norm) layer_norm;
extern decltype(longtake::rms_norm) rms_norm;
extern decltype(longtake::rms_norm_silu) rms_norm_silu;
}  // namespace cpu

namespace cuda {
extern decltype(longtake::layer_norm) layer_norm;
extern decltype(longtake::rms_norm) rms_norm;
extern decltype(longtake::rms_norm_silu) rms_norm_silu;
}  // namespace cuda

}  // namespace longtake
