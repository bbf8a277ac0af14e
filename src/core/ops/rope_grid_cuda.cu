#include "device/cuda_runtime.h"
#include "ops/rope_grid.h"

namespace longtake::cuda {

namespace {

// A thread a pair of a token.
__global__ void __launch_bounds__(256)
    rope_grid_kernel(const int64_t* clock, RopeGrid grid, int64_t count, float* cos, float* sin) {
  const int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (at >= count) return;
  const int64_t pairs = grid.time_pairs + 2 * grid.space_pairs;
  const int64_t token = at / pairs;
  int64_t pair = at % pairs;
  const int64_t x = token % grid.columns, line = token / grid.columns;
  int64_t position = *clock + line / grid.rows, axis_pairs = grid.time_pairs;
  if (pair >= grid.time_pairs) {
    pair -= grid.time_pairs;
    axis_pairs = grid.space_pairs;
    position = pair < grid.space_pairs ? line % grid.rows : x;
    pair %= grid.space_pairs;
  }
  const double angle =
      static_cast<double>(position) *
      ::pow(grid.theta, -static_cast<double>(pair) / static_cast<double>(axis_pairs));
  double s, c;
  ::sincos(angle, &s, &c);
  cos[at] = static_cast<float>(c);
  sin[at] = static_cast<float>(s);
}

}  // namespace

void rope_grid(Context& ctx, View clock, const RopeGrid& grid, View cos, View sin) {
  constexpr unsigned kThreads = 256;
  const int64_t count = cos.numel();
  rope_grid_kernel<<<static_cast<unsigned>((count + kThreads - 1) / kThreads), kThreads, 0,
                     stream_of(ctx)>>>(clock.data<int64_t>(), grid, count, cos.data<float>(),
                                       sin.data<float>());
  check(cudaGetLastError(), "rope_grid");
}

}  // namespace longtake::cuda
