// pixel_shuffle on the GPU: a thread moves one channel of a 2 x 2 block, four neighbours of the
// small image.
#include "device/cuda_runtime.h"
#include "device/dispatch.h"
#include "device/vector.cuh"
#include "ops/pixel_shuffle.h"

namespace longtake::cuda {
namespace {

constexpr int kThreads = 256;

// small [H, W, 4 C], large [2 H, 2 W, C]. kFours: small starts where four elements may be read at
// once.
template <bool kToLarge, bool kFours, typename T>
__global__ void shuffle(T* small, T* large, int64_t count, int width, int channels) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= count) return;
  const int64_t pixel = i / channels;
  const int channel = static_cast<int>(i - pixel * channels);
  const int64_t y = pixel / width;
  const int64_t x = pixel - y * width;
  T* near = small + 4 * i;
  T* far = large + (2 * y * 2 * width + 2 * x) * channels + channel;
  const int64_t below = int64_t{2} * width * channels;

  // Elements only move: the bits of T, four at once where that is possible.
  struct alignas(kFours ? 4 * sizeof(T) : sizeof(T)) Four {
    T parts[4];
  };

  if constexpr (kToLarge) {
    const Four four = *reinterpret_cast<const Four*>(near);
    far[0] = four.parts[0];
    far[channels] = four.parts[1];
    far[below] = four.parts[2];
    far[below + channels] = four.parts[3];
  } else {
    Four four;
    four.parts[0] = far[0];
    four.parts[1] = far[channels];
    four.parts[2] = far[below];
    four.parts[3] = far[below + channels];
    *reinterpret_cast<Four*>(near) = four;
  }
}

template <bool kToLarge>
void run(Context& ctx, const char* op, View small, View large) {
  const int64_t count = small.numel() / 4;
  const bool fours = start_in_fours({small});
  for_float_type(small.dtype(), [&]<typename T>() {
    const auto kernel = fours ? shuffle<kToLarge, true, T> : shuffle<kToLarge, false, T>;
    kernel<<<blocks_of(count, kThreads), kThreads, 0, stream_of(ctx)>>>(
        small.data<T>(), large.data<T>(), count, static_cast<int>(small.dim(1)),
        static_cast<int>(large.dim(2)));
  });
  check_launch(op);
}

}  // namespace

void pixel_shuffle(Context& ctx, View x, View out) {
  run<true>(ctx, "pixel_shuffle", x, out);
}

void pixel_unshuffle(Context& ctx, View x, View out) {
  run<false>(ctx, "pixel_unshuffle", out, x);
}

}  // namespace longtake::cuda
