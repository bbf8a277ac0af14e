// patchify on the GPU: a thread an element of the tokens; a latent frame is small.
#include "device/cuda_runtime.h"
#include "device/dispatch.h"
#include "device/vector.cuh"
#include "ops/patchify.h"

namespace longtake::cuda {
namespace {

constexpr int kThreads = 256;

struct Sizes {
  int width, height, columns, patch, values;  // of z, of patches in a row, of a patch
};

// Where value `i` of the tokens stands in z [C, H, W].
__device__ int64_t in_latent(int64_t i, const Sizes& s) {
  const int token = static_cast<int>(i / s.values);
  const int value = static_cast<int>(i - int64_t{token} * s.values);
  const int area = s.patch * s.patch;
  const int channel = value / area;
  const int y = token / s.columns * s.patch + value % area / s.patch;
  const int x = token % s.columns * s.patch + value % s.patch;
  return (int64_t{channel} * s.height + y) * s.width + x;
}

template <typename Out>
__global__ void to_tokens(const float* z, Out* tokens, int64_t count, Sizes sizes) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < count) store(tokens + i, z[in_latent(i, sizes)]);
}

__global__ void to_latent(const float* tokens, float* z, int64_t count, Sizes sizes) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < count) z[in_latent(i, sizes)] = tokens[i];
}

Sizes sizes_of(View z, int64_t patch) {
  return {static_cast<int>(z.dim(2)), static_cast<int>(z.dim(1)),
          static_cast<int>(z.dim(2) / patch), static_cast<int>(patch),
          static_cast<int>(z.dim(0) * patch * patch)};
}

}  // namespace

void patchify(Context& ctx, View z, int64_t patch, View out) {
  for_float_type(out.dtype(), [&]<typename Out>() {
    to_tokens<Out><<<blocks_of(z.numel(), kThreads), kThreads, 0, stream_of(ctx)>>>(
        z.data<float>(), out.data<Out>(), z.numel(), sizes_of(z, patch));
  });
  check_launch("patchify");
}

void unpatchify(Context& ctx, View x, int64_t patch, View z) {
  to_latent<<<blocks_of(z.numel(), kThreads), kThreads, 0, stream_of(ctx)>>>(
      x.data<float>(), z.data<float>(), z.numel(), sizes_of(z, patch));
  check_launch("unpatchify");
}

}  // namespace longtake::cuda
