// The residual stream of a transformer: what is added to it, and the norms that read it. Its tokens
// stand frame after frame, and every frame may have vectors of its own.
#pragma once

#include <cstdint>
#include <span>

#include "device/context.h"
#include "tensor/tensor.h"

namespace longtake {

inline constexpr size_t kMaxFrames = 32;  // of one call

// A vector for every frame: row `row` of the frame's matrix [k, dim] f32. One matrix serves all
// frames. The rows of the stream are shared evenly among the frames.
struct FrameVectors {
  std::span<const View> frames;  // empty: there is no vector
  int64_t row = 0;
};

// Of frame `index`, as [dim].
View vector_of(const FrameVectors& vectors, int64_t index, int64_t dim);

// Throws Error unless the vectors, if there are any, are of x's width [L, dim] and its rows are
// those of so many frames.
void expect_vectors(const char* name, View x, const FrameVectors& vectors);

// layer_norm (ops/norm.h) with each frame's own scale and shift. x [L, dim] f32, out [L, dim]
// f32 | bf16.
void frame_layer_norm(Context& ctx, View x, const FrameVectors& scale, const FrameVectors& shift,
                      float eps, bool scale_plus_one, View out);

// x += y * gate, or x += y without a gate; then x is rounded to `residual`, f32 | bf16. x [L, dim]
// f32, y [L, dim] f32 | bf16.
void add_frames(Context& ctx, View x, View y, const FrameVectors& gate, DType residual);

// add_frames, and of what it leaves in x frame_layer_norm, in one pass. scale and shift may be of
// other frames than the gate.
void add_layer_norm(Context& ctx, View x, View y, const FrameVectors& gate, DType residual,
                    const FrameVectors& scale, const FrameVectors& shift, float eps,
                    bool scale_plus_one, View out);

namespace cpu {
extern decltype(longtake::frame_layer_norm) frame_layer_norm;
extern decltype(longtake::add_frames) add_frames;
extern decltype(longtake::add_layer_norm) add_layer_norm;
}  // namespace cpu

namespace cuda {
extern decltype(longtake::frame_layer_norm) frame_layer_norm;
extern decltype(longtake::add_frames) add_frames;
extern decltype(longtake::add_layer_norm) add_layer_norm;
}  // namespace cuda

}  // namespace longtake
