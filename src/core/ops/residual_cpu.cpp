// The residual stream on the CPU: composed of the ops that it fuses on the GPU.
#include "ops/elementwise.h"
#include "ops/norm.h"
#include "ops/residual.h"

namespace longtake::cpu {
namespace {

View rows_of_frame(View x, int64_t index, int64_t num_frames) {
  const int64_t rows = x.dim(0) / num_frames;
  return x.rows(index * rows, (index + 1) * rows);
}

}  // namespace

void frame_layer_norm(Context& ctx, View x, const FrameVectors& scale, const FrameVectors& shift,
                      float eps, bool scale_plus_one, View out) {
  const auto count = static_cast<int64_t>(scale.frames.size());
  for (int64_t f = 0; f < count; ++f)
    cpu::layer_norm(ctx, rows_of_frame(x, f, count), vector_of(scale, f, x.dim(1)),
                    vector_of(shift, f, x.dim(1)), eps, scale_plus_one,
                    rows_of_frame(out, f, count));
}

void add_frames(Context& ctx, View x, View y, const FrameVectors& gate, DType residual) {
  const auto count = static_cast<int64_t>(gate.frames.size());
  if (count == 0) cpu::add(ctx, x, y);
  for (int64_t f = 0; f < count; ++f)
    cpu::add_gated(ctx, rows_of_frame(x, f, count), rows_of_frame(y, f, count),
                   vector_of(gate, f, x.dim(1)));
  if (residual == DType::kF32) return;
  const Workspace::Scope scope(ctx.workspace());
  const View rounded = ctx.workspace().take(residual, x.shape());
  cpu::convert(ctx, x, rounded);
  cpu::convert(ctx, rounded, x);
}

void add_layer_norm(Context& ctx, View x, View y, const FrameVectors& gate, DType residual,
                    const FrameVectors& scale, const FrameVectors& shift, float eps,
                    bool scale_plus_one, View out) {
  cpu::add_frames(ctx, x, y, gate, residual);
  cpu::frame_layer_norm(ctx, x, scale, shift, eps, scale_plus_one, out);
}

}  // namespace longtake::cpu
