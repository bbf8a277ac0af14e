// Products on the residual stream on the CPU: composed of the ops that they fuse on the GPU.
#include "ops/stream_linear.h"

#include "ops/copy.h"

namespace longtake::cpu {
namespace {

// In the workspace.
View normed(Context& ctx, View x, const StreamNorm& norm, DType compute) {
  const View h = ctx.workspace().take(compute, x.shape());
  cpu::frame_layer_norm(ctx, x, norm.scale, norm.shift, norm.eps, norm.scale_plus_one, h);
  return h;
}

}  // namespace

void norm_linear(Context& ctx, View x, const StreamNorm& norm, const LinearWeight& weight,
                 Activation activation, View out) {
  const Workspace::Scope scope(ctx.workspace());
  cpu::linear(ctx, normed(ctx, x, norm, weight.compute_dtype()), weight, activation, out);
}

void norm_linear_heads(Context& ctx, View x, const StreamNorm& norm, const LinearWeight& weight,
                       std::span<const HeadPart> parts, View cos, View sin, float eps) {
  const Workspace::Scope scope(ctx.workspace());
  const View wide = ctx.workspace().take(DType::kF32, {x.dim(0), weight.out_features()});
  cpu::norm_linear(ctx, x, norm, weight, Activation::kNone, wide);
  cpu::split_heads(ctx, wide, parts, cos, sin, eps);
}

void add_linear(Context& ctx, View y, const LinearWeight& weight, const FrameVectors& gate,
                DType residual, View base, View x) {
  const Workspace::Scope scope(ctx.workspace());
  const View wide = ctx.workspace().take(DType::kF32, x.shape());
  cpu::linear(ctx, y, weight, Activation::kNone, wide);
  if (base.raw() != x.raw()) longtake::copy(ctx, base, x);
  cpu::add_frames(ctx, x, wide, gate, residual);
}

}  // namespace longtake::cpu
