// Elementwise ops on the GPU: bound by memory, four elements a thread.
#include "device/cuda_runtime.h"
#include "device/dispatch.h"
#include "device/vector.cuh"
#include "ops/elementwise.h"
#include "ops/residual.h"

namespace longtake::cuda {
namespace {

constexpr int kThreads = 256;

// out[i] = f(a[i], b[i]); out may be a or b. kFours: all start at addresses that four elements
// divide.
template <bool kFours, typename B, typename Out, typename F>
__global__ void map(const float* a, const B* b, Out* out, int64_t count, F f) {
  constexpr int kEach = kFours ? 4 : 1;
  const int64_t i = kEach * (int64_t{blockIdx.x} * kThreads + threadIdx.x);
  if (kFours && i + kEach <= count) {
    const float4 u = load4(a + i);
    const float4 v = load4(b + i);
    store4(out + i, {f(u.x, v.x), f(u.y, v.y), f(u.z, v.z), f(u.w, v.w)});
    return;
  }
  for (int64_t j = i; j < min(i + kEach, count); ++j) store(out + j, f(a[j], load(b + j)));
}

template <typename F>
void run_map(Context& ctx, const char* op, View a, View b, View out, const F& f) {
  const int64_t count = a.numel();
  const bool fours = start_in_fours({a, b, out});
  const unsigned blocks = blocks_of(count, fours ? 4 * kThreads : kThreads);
  for_float_type(b.dtype(), [&]<typename B>() {
    for_float_type(out.dtype(), [&]<typename Out>() {
      const auto kernel = fours ? map<true, B, Out, F> : map<false, B, Out, F>;
      kernel<<<blocks, kThreads, 0, stream_of(ctx)>>>(a.data<float>(), b.data<B>(), out.data<Out>(),
                                                      count, f);
    });
  });
  check_launch(op);
}

// out[i] = f(x[i]); out may be x.
template <bool kFours, typename In, typename Out, typename F>
__global__ void map_one(const In* x, Out* out, int64_t count, F f) {
  constexpr int kEach = kFours ? 4 : 1;
  const int64_t i = kEach * (int64_t{blockIdx.x} * kThreads + threadIdx.x);
  if (kFours && i + kEach <= count) {
    const float4 v = load4(x + i);
    store4(out + i, {f(v.x), f(v.y), f(v.z), f(v.w)});
    return;
  }
  for (int64_t j = i; j < min(i + kEach, count); ++j) store(out + j, f(load(x + j)));
}

template <typename F>
void run_map_one(Context& ctx, const char* op, View x, View out, const F& f) {
  const int64_t count = x.numel();
  const bool fours = start_in_fours({x, out});
  const unsigned blocks = blocks_of(count, fours ? 4 * kThreads : kThreads);
  for_float_type(x.dtype(), [&]<typename In>() {
    for_float_type(out.dtype(), [&]<typename Out>() {
      const auto kernel = fours ? map_one<true, In, Out, F> : map_one<false, In, Out, F>;
      kernel<<<blocks, kThreads, 0, stream_of(ctx)>>>(x.data<In>(), out.data<Out>(), count, f);
    });
  });
  check_launch(op);
}

struct Sum {
  __device__ float operator()(float x, float y) const { return x + y; }
};

struct Product {
  __device__ float operator()(float x, float y) const { return x * y; }
};

struct WeightedSum {
  float a, b;

  __device__ float operator()(float x, float y) const { return fmaf(a, x, b * y); }
};

struct Silu {
  __device__ float operator()(float x) const { return x / (1.0F + expf(-x)); }
};

struct Relu {
  __device__ float operator()(float x) const { return fmaxf(x, 0.0F); }
};

struct SoftLimit {
  float limit;

  __device__ float operator()(float x) const { return limit * tanhf(x / limit); }
};

struct Identity {
  __device__ float operator()(float x) const { return x; }
};

}  // namespace

void add(Context& ctx, View x, View y) {
  run_map(ctx, "add", x, y, x, Sum());
}

void add_gated(Context& ctx, View x, View y, View gate) {
  cuda::add_frames(ctx, x, y, {{&gate, 1}, 0}, DType::kF32);
}

void silu(Context& ctx, View x, View out) {
  run_map_one(ctx, "silu", x, out, Silu());
}

void relu(Context& ctx, View x, View out) {
  run_map_one(ctx, "relu", x, out, Relu());
}

void convert(Context& ctx, View x, View out) {
  run_map_one(ctx, "convert", x, out, Identity());
}

void axpby(Context& ctx, float a, View x, float b, View y, View out) {
  run_map(ctx, "axpby", x, y, out, WeightedSum{a, b});
}

void multiply(Context& ctx, View x, View y, View out) {
  run_map(ctx, "multiply", x, y, out, Product());
}

void soft_limit(Context& ctx, View x, float limit, View out) {
  run_map_one(ctx, "soft_limit", x, out, SoftLimit{limit});
}

}  // namespace longtake::cuda
