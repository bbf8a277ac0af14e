#include "device/cuda_runtime.h"
#include "ops/clock.h"

namespace longtake::cuda {

namespace {

__global__ void set_clock_kernel(int64_t* clock, int64_t frame) {
  *clock = frame;
}

}  // namespace

void set_clock(Context& ctx, View clock, int64_t frame) {
  set_clock_kernel<<<1, 1, 0, stream_of(ctx)>>>(clock.data<int64_t>(), frame);
  check(cudaGetLastError(), "set_clock");
}

}  // namespace longtake::cuda
