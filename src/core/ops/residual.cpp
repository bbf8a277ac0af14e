#include "ops/residual.h"

#include "device/dispatch.h"
#include "ops/expect.h"

namespace longtake {
namespace {

void expect_stream(const char* name, View x, View other) {
  expect_rank(name, x, 2);
  expect_dtype(name, x, DType::kF32);
  expect_shape(name, other, x.shape());
  expect_float(name, other);
}

void expect_norm(View x, const FrameVectors& scale, const FrameVectors& shift, View out) {
  expect_stream("layer_norm", x, out);
  expect_vectors("layer_norm scale", x, scale);
  expect_vectors("layer_norm shift", x, shift);
  LONGTAKE_CHECK(!scale.frames.empty() && scale.frames.size() == shift.frames.size());
}

}  // namespace

void expect_vectors(const char* name, View x, const FrameVectors& vectors) {
  const auto count = static_cast<int64_t>(vectors.frames.size());
  if (count == 0) return;
  LONGTAKE_CHECK(vectors.frames.size() <= kMaxFrames, count, " frames");
  if (x.dim(0) % count != 0)
    throw Error(str(name, ": expected rows for ", count, " frames, found ", x.dim(0)));
  for (const View& matrix : vectors.frames) {
    expect_dtype(name, matrix, DType::kF32);
    if (matrix.shape().rank() == 0 || matrix.dim(-1) != x.dim(1) ||
        matrix.numel() < (vectors.row + 1) * x.dim(1))
      throw Error(str(name, ": expected row ", vectors.row, " of [k, ", x.dim(1), "], found ",
                      matrix.shape().to_string()));
  }
}

View vector_of(const FrameVectors& vectors, int64_t index, int64_t dim) {
  const View& matrix = vectors.frames[static_cast<size_t>(index)];
  return matrix.reshape({matrix.numel() / dim, dim})
      .rows(vectors.row, vectors.row + 1)
      .reshape({dim});
}

void frame_layer_norm(Context& ctx, View x, const FrameVectors& scale, const FrameVectors& shift,
                      float eps, bool scale_plus_one, View out) {
  expect_norm(x, scale, shift, out);
  if (x.empty()) return;
  LONGTAKE_DISPATCH(ctx, frame_layer_norm, x, scale, shift, eps, scale_plus_one, out);
}

void add_frames(Context& ctx, View x, View y, const FrameVectors& gate, DType residual) {
  expect_stream("add_frames", x, y);
  expect_vectors("add_frames gate", x, gate);
  if (x.empty()) return;
  LONGTAKE_DISPATCH(ctx, add_frames, x, y, gate, residual);
}

void add_layer_norm(Context& ctx, View x, View y, const FrameVectors& gate, DType residual,
                    const FrameVectors& scale, const FrameVectors& shift, float eps,
                    bool scale_plus_one, View out) {
  expect_stream("add_layer_norm", x, y);
  expect_vectors("add_layer_norm gate", x, gate);
  expect_norm(x, scale, shift, out);
  if (x.empty()) return;
  LONGTAKE_DISPATCH(ctx, add_layer_norm, x, y, gate, residual, scale, shift, eps, scale_plus_one,
                    out);
}

}  // namespace longtake
