// linear on the GPU: cuBLASLt with bias and GELU fused where it has them, and a plain kernel for
// what it refuses.
#include "ops/linear.h"

#include "device/cuda_runtime.h"
#include "device/dispatch.h"
#include "device/vector.cuh"
#include "ops/activation.cuh"
#include "ops/copy.h"
#include "ops/elementwise.h"
#include "ops/linear_cuda.h"
#include "ops/widen.h"

namespace longtake::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 16;

// out may be x.
template <bool kFours, typename Out>
__global__ void activate(const float* x, Out* out, int64_t count, Activation activation) {
  constexpr int kEach = kFours ? 4 : 1;
  const int64_t i = kEach * (int64_t{blockIdx.x} * kThreads + threadIdx.x);
  if (kFours && i + kEach <= count) {
    const float4 v = load4(x + i);
    store4(out + i, {activated(v.x, activation), activated(v.y, activation),
                     activated(v.z, activation), activated(v.w, activation)});
    return;
  }
  for (int64_t j = i; j < min(i + kEach, count); ++j) store(out + j, activated(x[j], activation));
}

void run_activate(Context& ctx, View x, Activation activation, View out) {
  const bool fours = start_in_fours({x, out});
  for_float_type(out.dtype(), [&]<typename Out>() {
    const auto kernel = fours ? activate<true, Out> : activate<false, Out>;
    kernel<<<blocks_of(x.numel(), fours ? 4 * kThreads : kThreads), kThreads, 0, stream_of(ctx)>>>(
        x.data<float>(), out.data<Out>(), x.numel(), activation);
  });
  check_launch("activation");
}

// An output a thread; tiles of both operands pass through shared memory.
template <typename T, typename Out>
__global__ void plain_product(const T* x, const T* w, const float* bias, Out* out, int64_t rows,
                              int in, int out_features, Activation activation) {
  __shared__ float x_tile[kTile][kTile + 1];
  __shared__ float w_tile[kTile][kTile + 1];
  const int tx = threadIdx.x % kTile;
  const int ty = threadIdx.x / kTile;
  const int64_t row = int64_t{blockIdx.x} * kTile + ty;
  const int column = blockIdx.y * kTile + tx;
  const int w_row = blockIdx.y * kTile + ty;
  float sum = 0;
  for (int begin = 0; begin < in; begin += kTile) {
    const bool in_range = begin + tx < in;
    x_tile[ty][tx] = in_range && row < rows ? load(x + row * in + begin + tx) : 0;
    w_tile[ty][tx] =
        in_range && w_row < out_features ? load(w + int64_t{w_row} * in + begin + tx) : 0;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kTile; ++i) sum = fmaf(x_tile[ty][i], w_tile[tx][i], sum);
    __syncthreads();
  }
  if (row >= rows || column >= out_features) return;
  if (bias != nullptr) sum += bias[column];
  store(out + row * out_features + column, activated(sum, activation));
}

void run_plain_product(Context& ctx, View x, const PackedProduct& weight, Activation activation,
                       View out) {
  const float* bias = weight.bias.empty() ? nullptr : weight.bias.data<float>();
  const dim3 grid(blocks_of(x.dim(0), kTile), blocks_of(out.dim(1), kTile));
  for_float_type(x.dtype(), [&]<typename T>() {
    for_float_type(out.dtype(), [&]<typename Out>() {
      plain_product<T, Out><<<grid, kTile * kTile, 0, stream_of(ctx)>>>(
          x.data<T>(), weight.weight.data<T>(), bias, out.data<Out>(), x.dim(0),
          static_cast<int>(x.dim(1)), static_cast<int>(out.dim(1)), activation);
    });
  });
  check_launch("linear");
}

// By cuBLASLt, without an activation that it does not fuse; false: it has no kernel.
bool run_product(Context& ctx, View x, const PackedProduct& weight, bool gelu, View out) {
  const bool biased = !weight.bias.empty();
  MatrixProduct product{.rows = x.dim(0),
                        .in = x.dim(1),
                        .out = out.dim(1),
                        .x_stride = x.dim(1),
                        .w_stride = x.dim(1),
                        .out_stride = out.dim(1),
                        .operands = x.dtype(),
                        .result = out.dtype(),
                        .epilogue = biased ? (gelu ? Epilogue::kGeluBias : Epilogue::kBias)
                                           : (gelu ? Epilogue::kGelu : Epilogue::kNone)};
  CublasPlans& plans = ctx.cuda()->plans();
  const auto run = [&](const Tensor& bias) {
    product.bias = bias.dtype();
    return plans.multiply(*ctx.cuda(), product, x.raw(), weight.weight.view().raw(),
                          bias.view().raw(), out.raw());
  };
  if (run(weight.bias)) return true;
  return !weight.narrow_bias.empty() && out.dtype() == DType::kBF16 && run(weight.narrow_bias);
}

class Weight : public LinearWeight::Impl {
 public:
  Weight(Context& ctx, View plain, View plain_bias, DType dtype)
      : Impl(plain.dim(1), plain.dim(0), dtype), packed(ctx, plain, plain_bias, dtype) {}

  size_t bytes() const override { return packed.bytes(); }

  PackedProduct packed;
};

Tensor moved(Context& ctx, View from) {
  Tensor out(ctx.device(), from.dtype(), from.shape());
  longtake::copy(ctx, from, out);
  ctx.synchronize();  // `from` may be gone before the stream has read it
  return out;
}

Tensor moved_as(Context& ctx, View from, DType dtype) {
  if (from.dtype() == dtype) return moved(ctx, from);
  const Tensor other({}, dtype, from.shape());
  cpu::convert(ctx, from, other);
  return moved(ctx, other);
}

}  // namespace

PackedProduct::PackedProduct(Context& ctx, View plain, View plain_bias, DType compute)
    : weight(moved_as(ctx, plain, compute)) {
  if (plain_bias.empty()) return;
  bias = moved(ctx, plain_bias);
  if (compute == DType::kBF16) narrow_bias = moved_as(ctx, plain_bias, DType::kBF16);
}

const PackedProduct& packed_of(const LinearWeight& weight) {
  return static_cast<const Weight&>(weight.impl()).packed;
}

void multiply(Context& ctx, View x, const PackedProduct& weight, Activation activation, View out) {
  // cuBLASLt's GELU is an approximation that only results in bf16 do not show.
  const bool is_narrow = x.dtype() == DType::kBF16 && out.dtype() == DType::kBF16;
  const bool fuses = is_narrow && activation == Activation::kGeluTanh;
  const bool rests = activation != Activation::kNone && !fuses;
  const Workspace::Scope scope(ctx.workspace());
  const bool is_wide = !rests && (is_narrow || out.dtype() == DType::kF32);
  const View result =
      is_wide || out.dtype() == DType::kF32 ? out : ctx.workspace().take(DType::kF32, out.shape());
  if (!run_product(ctx, x, weight, fuses, result))
    return run_plain_product(ctx, x, weight, activation, out);
  if (!is_wide) run_activate(ctx, result, activation, out);
}

std::unique_ptr<LinearWeight::Impl> pack_linear(Context& ctx, View weight, View scale, View bias,
                                                DType compute) {
  if (weight.dtype() != DType::kI8) return std::make_unique<Weight>(ctx, weight, bias, compute);
  const Tensor wide({}, DType::kF32, weight.shape());
  widen(weight, scale, wide);
  return std::make_unique<Weight>(ctx, wide, bias, compute);
}

void linear(Context& ctx, View x, const LinearWeight& weight, Activation activation, View out) {
  multiply(ctx, x, packed_of(weight), activation, out);
}

}  // namespace longtake::cuda
