#include "nn/stream.h"

namespace longtake {

void project(Context& ctx, const LayerInput& input, const LinearWeight& weight,
             Activation activation, View out) {
  if (input.rows.empty())
    norm_linear(ctx, input.stream, input.norm, weight, activation, out);
  else
    linear(ctx, input.rows, weight, activation, out);
}

// One product, then norms and rotations: summed, normalised and rotated in f32, rounded to the
// compute dtype once.
void project_to_heads(Context& ctx, const LayerInput& input, const LinearWeight& weight,
                      std::span<const HeadPart> parts, View cos, View sin, float eps) {
  if (input.rows.empty())
    return norm_linear_heads(ctx, input.stream, input.norm, weight, parts, cos, sin, eps);
  const Workspace::Scope scope(ctx.workspace());
  const View wide = ctx.workspace().take(DType::kF32, {input.length(), weight.out_features()});
  linear(ctx, input.rows, weight, Activation::kNone, wide);
  split_heads(ctx, wide, parts, cos, sin, eps);
}

Stream::Stream(Context& ctx, View x, DType compute, DType residual)
    : ctx_(ctx),
      x_(x),
      residual_(residual),
      is_short_(x.dim(0) <= kFewRows && compute == DType::kBF16) {
  if (is_short_) return;
  normed_ = ctx.workspace().take(compute, x.shape());
  added_ = ctx.workspace().take(DType::kF32, x.shape());
}

LayerInput Stream::normed(const StreamNorm& norm) {
  if (is_short_) return {View(), x_, norm};
  if (is_added_)
    frame_layer_norm(ctx_, x_, norm.scale, norm.shift, norm.eps, norm.scale_plus_one, normed_);
  else
    add_layer_norm(ctx_, x_, added_, gate_, residual_, norm.scale, norm.shift, norm.eps,
                   norm.scale_plus_one, normed_);
  is_added_ = true;
  return {normed_, x_, norm};
}

void Stream::add(View rows, const LinearWeight& weight, const FrameVectors& gate) {
  if (is_short_) return add_linear(ctx_, rows, weight, gate, residual_, x_, x_);
  complete();
  linear(ctx_, rows, weight, Activation::kNone, added_);
  gate_ = gate;
  is_added_ = false;
}

void Stream::complete() {
  if (!is_added_) add_frames(ctx_, x_, added_, gate_, residual_);
  is_added_ = true;
}

}  // namespace longtake
