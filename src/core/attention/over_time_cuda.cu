// attend_over_time on the GPU: a warp a query and head, its channels spread over the lanes.
#include "attention/over_time.h"
#include "device/cuda_runtime.h"
#include "device/dispatch.h"
#include "device/vector.cuh"

namespace longtake::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kMostParts = 256 / kWarp;  // channels of a lane

struct Sizes {
  int64_t items;  // frames of queries x places x heads
  int places, heads, head_dim;
  int frames, history;  // of keys
  bool is_shared;
};

template <typename T>
__global__ void __launch_bounds__(kThreads)
    attend(const T* q, const T* k, const T* v, const int64_t* clock, float scale, Sizes sizes,
           T* out) {
  const int64_t item = int64_t{blockIdx.x} * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (item >= sizes.items) return;
  const int lane = threadIdx.x % kWarp;
  const int64_t row = int64_t{sizes.heads} * sizes.head_dim;
  const int64_t key_frame = sizes.is_shared ? row : sizes.places * row;
  const int64_t place = item / sizes.heads % sizes.places;
  const int64_t at = (sizes.is_shared ? 0 : place * row) + item % sizes.heads * sizes.head_dim;
  float query[kMostParts], mixed[kMostParts];
#pragma unroll
  for (int i = 0; i < kMostParts; ++i) {
    const int d = lane + i * kWarp;
    query[i] = d < sizes.head_dim ? load(q + item * sizes.head_dim + d) : 0;
    mixed[i] = 0;
  }
  const int64_t known = *clock;
  float top = -INFINITY, sum = 0;
  for (int t = known < sizes.history ? sizes.history - static_cast<int>(known) : 0;
       t < sizes.frames; ++t) {
    const int64_t from = t * key_frame + at;
    float logit = 0;
#pragma unroll
    for (int i = 0; i < kMostParts; ++i) {
      const int d = lane + i * kWarp;
      if (d < sizes.head_dim) logit = fmaf(query[i], load(k + from + d), logit);
    }
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2)
      logit += __shfl_xor_sync(0xffffffffU, logit, step);
    logit *= scale;
    const float next = fmaxf(top, logit);
    const float keep = expf(top - next), weight = expf(logit - next);
    top = next;
    sum = sum * keep + weight;
#pragma unroll
    for (int i = 0; i < kMostParts; ++i) {
      const int d = lane + i * kWarp;
      if (d < sizes.head_dim) mixed[i] = fmaf(weight, load(v + from + d), mixed[i] * keep);
    }
  }
#pragma unroll
  for (int i = 0; i < kMostParts; ++i) {
    const int d = lane + i * kWarp;
    if (d < sizes.head_dim) store(out + item * sizes.head_dim + d, mixed[i] / sum);
  }
}

}  // namespace

void attend_over_time(Context& ctx, View q, View k, View v, View clock, float scale, View out) {
  const Sizes sizes{.items = q.dim(0) * q.dim(1) * q.dim(2),
                    .places = static_cast<int>(q.dim(1)),
                    .heads = static_cast<int>(q.dim(2)),
                    .head_dim = static_cast<int>(q.dim(3)),
                    .frames = static_cast<int>(k.dim(0)),
                    .history = static_cast<int>(k.dim(0) - q.dim(0)),
                    .is_shared = k.dim(1) == 1};
  for_float_type(q.dtype(), [&]<typename T>() {
    attend<<<blocks_of(sizes.items, kThreads / kWarp), kThreads, 0, stream_of(ctx)>>>(
        q.data<T>(), k.data<T>(), v.data<T>(), clock.data<int64_t>(), scale, sizes, out.data<T>());
  });
  check_launch("attend_over_time");
}

}  // namespace longtake::cuda
