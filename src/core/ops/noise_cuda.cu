// fill_normal on the GPU: a thread a block of four numbers, base/philox.cpp's steps one by one.
#include "device/cuda_runtime.h"
#include "device/vector.cuh"
#include "ops/noise.h"

namespace longtake::cuda {
namespace {

constexpr int kThreads = 64;  // double is slow: few threads a block, to use all multiprocessors

__device__ uint4 philox(uint4 c, uint32_t key_low, uint32_t key_high) {
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    c = {__umulhi(0xCD9E8D57U, c.z) ^ c.y ^ key_low, 0xCD9E8D57U * c.z,
         __umulhi(0xD2511F53U, c.x) ^ c.w ^ key_high, 0xD2511F53U * c.x};
    key_low += 0x9E3779B9U;
    key_high += 0xBB67AE85U;
  }
  return c;
}

__device__ double open_unit(uint32_t word) {
  return (static_cast<double>(word) + 0.5) * 0x1p-32;
}

// Two standard normals by Box-Muller.
__device__ float2 normals(uint32_t first, uint32_t second) {
  constexpr double kTwoPi = 6.283185307179586476925286766559;
  const double radius = sqrt(-2.0 * log(open_unit(first)));
  double sine, cosine;
  sincos(kTwoPi * open_unit(second), &sine, &cosine);
  return {static_cast<float>(radius * cosine), static_cast<float>(radius * sine)};
}

// `count`: values of a frame; a frame a row of the grid.
__global__ void draw(const int64_t* clock, uint32_t key_low, uint32_t key_high, uint32_t step,
                     int64_t first_frame, int64_t count, float* out) {
  const int64_t block = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (4 * block >= count) return;
  const auto frame = static_cast<uint32_t>(*clock + first_frame + blockIdx.y);
  const uint4 words = philox({static_cast<uint32_t>(block), step, frame, 0}, key_low, key_high);
  const float2 low = normals(words.x, words.y);
  const float2 high = normals(words.z, words.w);
  const float values[4] = {low.x, low.y, high.x, high.y};
  out += count * blockIdx.y + 4 * block;
  for (int i = 0; i < min(int64_t{4}, count - 4 * block); ++i) out[i] = values[i];
}

}  // namespace

void fill_normal(Context& ctx, uint64_t seed, View clock, uint32_t step, View out,
                 int64_t first_frame, int64_t frames) {
  const int64_t count = out.numel() / frames;
  const dim3 grid(blocks_of(count, 4 * kThreads), static_cast<unsigned>(frames));
  draw<<<grid, kThreads, 0, stream_of(ctx)>>>(clock.data<int64_t>(), static_cast<uint32_t>(seed),
                                              static_cast<uint32_t>(seed >> 32), step, first_frame,
                                              count, out.data<float>());
  check_launch("fill_normal");
}

}  // namespace longtake::cuda
