// Cross attention to a prompt, from the residual stream to what the values come to: on the GPU one
// launch where rows are few and the prompt is short.
#pragma once

#include "attention/attend.h"
#include "device/context.h"
#include "kv/page.h"
#include "ops/linear.h"
#include "ops/stream_linear.h"
#include "tensor/tensor.h"

namespace longtake {

// out = attend(q, kv, scale), q = the heads of norm(x) W^T + b (norm_linear_heads), normed by
// head_norm [N D] f32 and not rotated. x [L, in] f32, out [L, N, D] in kv's dtype, which is the
// weight's compute dtype. On CUDA kv is a prompt's, written before the pass that reads it began:
// launches that are on their way do not write it.
void norm_linear_attend(Context& ctx, View x, const StreamNorm& norm, const LinearWeight& weight,
                        View head_norm, float eps, const KvView& kv, float scale, View out);

namespace cpu {
extern decltype(longtake::norm_linear_attend) norm_linear_attend;
}

namespace cuda {
extern decltype(longtake::norm_linear_attend) norm_linear_attend;
}

}  // namespace longtake
