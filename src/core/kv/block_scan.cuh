// Sums over a block of 1024 threads. Private to kernels.
#pragma once

namespace longtake::cuda {

inline constexpr int kScanned = 1024;  // threads of a block that calls block_scan

// Exclusive sums over the block's threads, and the total.
struct Scan {
  int before, total;
};

__device__ inline Scan block_scan(int value) {
  constexpr int kWarps = kScanned / 32;
  __shared__ int sums[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int sum = value;
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(~0U, sum, step);
    if (lane >= step) sum += other;
  }
  __syncthreads();
  if (lane == 31) sums[warp] = sum;
  __syncthreads();
  if (warp == 0) {
    int all = sums[lane];
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(~0U, all, step);
      if (lane >= step) all += other;
    }
    sums[lane] = all;
  }
  __syncthreads();
  return {sum - value + (warp > 0 ? sums[warp - 1] : 0), sums[kWarps - 1]};
}

}  // namespace longtake::cuda
