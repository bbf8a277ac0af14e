// The residual stream on the GPU: one launch for all frames.
#include "ops/residual.h"
#include "ops/rows.cuh"

namespace longtake::cuda {
namespace {

NormVectors norm_of(View x, const FrameVectors& scale, const FrameVectors& shift, float eps,
                    bool scale_plus_one) {
  return {framed(scale, x.dim(0), x.dim(1)), framed(shift, x.dim(0), x.dim(1)), eps,
          scale_plus_one ? 1.0F : 0.0F};
}

Gate gate_of(View x, const FrameVectors& gate, DType residual) {
  return {framed(gate, x.dim(0), x.dim(1)), !gate.frames.empty(), residual == DType::kBF16};
}

// A block a row.
template <bool kFours, typename Y>
__global__ void add_rows(float* x, const Y* y, int dim, Gate gate) {
  const uint32_t row = blockIdx.x;
  x += int64_t{row} * dim;
  y += int64_t{row} * dim;
  const float* factors = gate.vectors.of(row);
  constexpr int kEach = kFours ? 4 : 1;
  for (int i = kEach * threadIdx.x; i < dim; i += kEach * blockDim.x) {
    if constexpr (kFours) {
      float4 v = load4(x + i);
      v = gate.is_there ? fma4(load4(y + i), load4(factors + i), v) : add4(v, load4(y + i));
      store4(x + i, gate.rounds ? round4(v) : v);
    } else {
      const float v = gate.is_there ? fmaf(load(y + i), factors[i], x[i]) : x[i] + load(y + i);
      x[i] = gate.rounds ? round_to_bf16(v) : v;
    }
  }
}

}  // namespace

void frame_layer_norm(Context& ctx, View x, const FrameVectors& scale, const FrameVectors& shift,
                      float eps, bool scale_plus_one, View out) {
  for_float_type(out.dtype(), [&]<typename Out>() {
    const Rows<float, float, Out> rows{x.data<float>(), nullptr, out.data<Out>(),
                                       static_cast<uint32_t>(x.dim(0)), static_cast<int>(x.dim(1))};
    run_norm_rows<true, false, false>(ctx, "layer_norm", rows, start_in_fours({x, out}),
                                      gate_of(x, {}, DType::kF32),
                                      norm_of(x, scale, shift, eps, scale_plus_one));
  });
}

void add_frames(Context& ctx, View x, View y, const FrameVectors& gate, DType residual) {
  const int64_t dim = x.dim(1);
  const Gate gates = gate_of(x, gate, residual);
  const bool fours = dim % 4 == 0 && start_in_fours({x, y}) && start_in_fours(gates.vectors);
  constexpr int64_t kMostThreads = 256;
  const int64_t wanted = (fours ? dim / 4 : dim) + 31;
  const auto threads = static_cast<unsigned>(std::min(kMostThreads, wanted / 32 * 32));
  for_float_type(y.dtype(), [&]<typename Y>() {
    const auto kernel = fours ? add_rows<true, Y> : add_rows<false, Y>;
    kernel<<<static_cast<unsigned>(x.dim(0)), threads, 0, stream_of(ctx)>>>(
        x.data<float>(), y.data<Y>(), static_cast<int>(dim), gates);
  });
  check_launch("add_frames");
}

void add_layer_norm(Context& ctx, View x, View y, const FrameVectors& gate, DType residual,
                    const FrameVectors& scale, const FrameVectors& shift, float eps,
                    bool scale_plus_one, View out) {
  for_float_type(y.dtype(), [&]<typename Y>() {
    for_float_type(out.dtype(), [&]<typename Out>() {
      const Rows<float, Y, Out> rows{x.data<float>(), y.data<Y>(), out.data<Out>(),
                                     static_cast<uint32_t>(x.dim(0)), static_cast<int>(x.dim(1))};
      run_norm_rows<true, false, true>(ctx, "add_layer_norm", rows, start_in_fours({x, y, out}),
                                       gate_of(x, gate, residual),
                                       norm_of(x, scale, shift, eps, scale_plus_one));
    });
  });
}

}  // namespace longtake::cuda
