// Products of a transformer layer together with what stands before and behind them: a norm of the
// residual stream, heads for attention, an addition to the stream. On the GPU each is one launch
// where rows are few (launches are what a layer then waits for); elsewhere the ops that it is
// composed of.
#pragma once

#include <cstdint>
#include <span>

#include "device/context.h"
#include "ops/heads.h"
#include "ops/linear.h"
#include "ops/residual.h"
#include "tensor/tensor.h"

namespace longtake {

// Up to so many rows one launch is faster than the best of several.
inline constexpr int64_t kFewRows = 256;

// frame_layer_norm (ops/residual.h) of the stream.
struct StreamNorm {
  FrameVectors scale, shift;
  float eps = 0;
  bool scale_plus_one = false;
};

// Throws Error, naming `op`, unless x [L, in] f32 and the norm go into a product with the weight.
void expect_normed(const char* op, View x, const StreamNorm& norm, const LinearWeight& weight);

// out = act(norm(x) W^T + b). x [L, in] f32, rounded to the weight's compute dtype behind the norm;
// out [L, out] f32 | bf16.
void norm_linear(Context& ctx, View x, const StreamNorm& norm, const LinearWeight& weight,
                 Activation activation, View out);

// split_heads (ops/heads.h) of norm(x) W^T + b; eps: of the heads' norms. Parts without an output
// are not computed.
void norm_linear_heads(Context& ctx, View x, const StreamNorm& norm, const LinearWeight& weight,
                       std::span<const HeadPart> parts, View cos, View sin, float eps);

// add_frames (ops/residual.h) of y W^T + b: x = base + (y W^T + b) * gate, or without a gate; then
// x is rounded to `residual`. y [L, in] in the weight's compute dtype, base, x [L, out] f32; base
// may be x.
void add_linear(Context& ctx, View y, const LinearWeight& weight, const FrameVectors& gate,
                DType residual, View base, View x);

namespace cpu {
extern decltype(longtake::norm_linear) norm_linear;
extern decltype(longtake::norm_linear_heads) norm_linear_heads;
extern decltype(longtake::add_linear) add_linear;
}  // namespace cpu

namespace cuda {
extern decltype(longtake::norm_linear) norm_linear;
extern decltype(longtake::norm_linear_heads) norm_linear_heads;
extern decltype(longtake::add_linear) add_linear;
}  // namespace cuda

}  // namespace longtake
