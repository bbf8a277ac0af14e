// rope on the GPU: one pair a thread, or two where heads are that even.
#include "device/cuda_runtime.h"
#include "device/dispatch.h"
#include "device/vector.cuh"
#include "ops/rope.h"

namespace longtake::cuda {
namespace {

constexpr int kThreads = 256;

// out may be x. `row`: values of one token.
template <bool kFours, typename In, typename Out>
__global__ void rotate(const In* x, const float* cos, const float* sin, Out* out, int64_t count,
                       int row, int head_dim) {
  constexpr int kEach = kFours ? 4 : 2;
  const int64_t i = kEach * (int64_t{blockIdx.x} * kThreads + threadIdx.x);
  if (i >= count) return;
  const int64_t token = i / row;
  const int column = static_cast<int>(i - token * row);
  const int64_t pair = token * (head_dim / 2) + column % head_dim / 2;
  if constexpr (kFours) {
    const float4 v = load4(x + i);
    const float2 c = *reinterpret_cast<const float2*>(cos + pair);
    const float2 s = *reinterpret_cast<const float2*>(sin + pair);
    store4(out + i, {v.x * c.x - v.y * s.x, v.x * s.x + v.y * c.x, v.z * c.y - v.w * s.y,
                     v.z * s.y + v.w * c.y});
  } else {
    const float a = load(x + i);
    const float b = load(x + i + 1);
    store(out + i, a * cos[pair] - b * sin[pair]);
    store(out + i + 1, a * sin[pair] + b * cos[pair]);
  }
}

}  // namespace

void rope(Context& ctx, View x, View cos, View sin, View out) {
  const int64_t head_dim = x.dim(2);
  const bool fours = head_dim % 4 == 0 && start_in_fours({x, cos, sin, out});
  const unsigned blocks = blocks_of(x.numel(), (fours ? 4 : 2) * kThreads);
  for_float_type(x.dtype(), [&]<typename In>() {
    for_float_type(out.dtype(), [&]<typename Out>() {
      const auto kernel = fours ? rotate<true, In, Out> : rotate<false, In, Out>;
      kernel<<<blocks, kThreads, 0, stream_of(ctx)>>>(
          x.data<In>(), cos.data<float>(), sin.data<float>(), out.data<Out>(), x.numel(),
          static_cast<int>(x.dim(1) * head_dim), static_cast<int>(head_dim));
    });
  });
  check_launch("rope");
}

}  // namespace longtake::cuda
