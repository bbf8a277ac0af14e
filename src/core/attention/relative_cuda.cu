// attend_relative on the GPU: products in f32 by cuBLASLt, a part of the queries at a time, and a
// softmax between them. For the one attention of an image decoder and for prompts.
#include <algorithm>

#include "attention/relative.h"
#include "device/cuda_runtime.h"
#include "device/vector.cuh"
#include "ops/elementwise.h"

namespace longtake::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kLogitBytes = int64_t{64} << 20;

template <typename Combine>
__device__ float over_block(float value, const Combine& combine) {
  __shared__ float parts[kThreads / 32];
#pragma unroll
  for (int step = 16; step > 0; step /= 2)
    value = combine(value, __shfl_xor_sync(0xffffffffU, value, step));
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
  __syncthreads();
  value = parts[0];
#pragma unroll
  for (int i = 1; i < kThreads / 32; ++i) value = combine(value, parts[i]);
  __syncthreads();
  return value;
}

// A block a row of logits [rows, length]; `distances`: the head's biases [2 length - 1] or nullptr.
__global__ void softmax(float* logits, const float* distances, int64_t first, int64_t length) {
  float* row = logits + blockIdx.x * length;
  const float* bias =
      distances != nullptr ? distances + (length - 1 - first - blockIdx.x) : nullptr;
  const auto logit = [&](int64_t j) { return bias != nullptr ? row[j] + bias[j] : row[j]; };
  float top = -INFINITY;
  for (int64_t j = threadIdx.x; j < length; j += kThreads) top = fmaxf(top, logit(j));
  top = over_block(top, [](float a, float b) { return fmaxf(a, b); });
  float sum = 0;
  for (int64_t j = threadIdx.x; j < length; j += kThreads) {
    const float weight = expf(logit(j) - top);
    row[j] = weight;
    sum += weight;
  }
  sum = over_block(sum, [](float a, float b) { return a + b; });
  for (int64_t j = threadIdx.x; j < length; j += kThreads) row[j] /= sum;
}

void multiply(Context& ctx, const MatrixProduct& product, const float* x, const float* w,
              float* out) {
  const bool ran = ctx.cuda()->plans().multiply(*ctx.cuda(), product, x, w, nullptr, out);
  LONGTAKE_CHECK(ran, "cuBLASLt has no kernel for ", product.rows, " x ", product.in, " x ",
                 product.out);
}

}  // namespace

void attend_relative(Context& ctx, View q, View k, View v, View bias, View out) {
  const int64_t length = q.dim(0);
  const int64_t heads = q.dim(1);
  const int64_t head_dim = q.dim(2);
  const int64_t stride = heads * head_dim;
  const int64_t most =
      std::clamp<int64_t>(kLogitBytes / static_cast<int64_t>(sizeof(float)) / length, 1, length);
  const Workspace::Scope scope(ctx.workspace());
  const View mixed =
      out.dtype() == DType::kF32 ? out : ctx.workspace().take(DType::kF32, out.shape());
  const View logits = ctx.workspace().take(DType::kF32, {most, length});
  for (int64_t head = 0; head < heads; ++head) {
    const float* distances = bias.empty() ? nullptr : bias.data<float>() + head * (2 * length - 1);
    const int64_t column = head * head_dim;
    for (int64_t first = 0; first < length; first += most) {
      const int64_t rows = std::min(most, length - first);
      const MatrixProduct scores{.rows = rows,
                                 .in = head_dim,
                                 .out = length,
                                 .x_stride = stride,
                                 .w_stride = stride,
                                 .out_stride = length};
      multiply(ctx, scores, q.data<float>() + first * stride + column, k.data<float>() + column,
               logits.data<float>());
      softmax<<<static_cast<unsigned>(rows), kThreads, 0, stream_of(ctx)>>>(
          logits.data<float>(), distances, first, length);
      check_launch("attend_relative");
      const MatrixProduct means{.rows = rows,
                                .in = length,
                                .out = head_dim,
                                .x_stride = length,
                                .w_stride = stride,
                                .out_stride = stride,
                                .w_by_inputs = true};
      multiply(ctx, means, logits.data<float>(), v.data<float>() + column,
               mixed.data<float>() + first * stride + column);
    }
  }
  if (out.dtype() != DType::kF32) cuda::convert(ctx, mixed, out);
}

}  // namespace longtake::cuda
