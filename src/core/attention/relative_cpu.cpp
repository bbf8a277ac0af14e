// attend_relative on the CPU: plain loops over heads and queries. A prompt of 512 tokens takes
// seconds in the largest encoder, next to matrix products that take longer.
#include <algorithm>
#include <cmath>

#include "attention/relative.h"
#include "device/dispatch.h"
#include "device/parallel.h"

namespace longtake::cpu {
namespace {

float dot(const float* a, const float* b, int64_t count) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += a[i] * b[i];
  return sum;
}

}  // namespace

void attend_relative(Context& ctx, View q, View k, View v, View bias, View out) {
  const Workspace::Scope scope(ctx.workspace());
  const int64_t length = q.dim(0);
  const int64_t heads = q.dim(1);
  const int64_t head_dim = q.dim(2);
  const int64_t stride = heads * head_dim;
  const View scratch = ctx.workspace().take(DType::kF32, {ctx.threads(), length + head_dim});
  for_float_type(out.dtype(), [&]<typename Out>() {
    parallel_for(ctx, heads * length, 1, [&](int64_t begin, int64_t end) {
      float* weights = scratch.data<float>() + omp_get_thread_num() * (length + head_dim);
      float* mixed = weights + length;
      for (int64_t item = begin; item < end; ++item) {
        const int64_t head = item / length;
        const int64_t i = item % length;
        const float* query = q.data<float>() + i * stride + head * head_dim;
        const float* keys = k.data<float>() + head * head_dim;
        const float* values = v.data<float>() + head * head_dim;
        for (int64_t j = 0; j < length; ++j) weights[j] = dot(query, keys + j * stride, head_dim);
        if (!bias.empty()) {
          // Of distances -i .. length - 1 - i.
          const float* distances = bias.data<float>() + head * (2 * length - 1) + length - 1 - i;
          for (int64_t j = 0; j < length; ++j) weights[j] += distances[j];
        }
        const float top = *std::max_element(weights, weights + length);
        float sum = 0;
        std::fill_n(mixed, head_dim, 0.0F);
        for (int64_t j = 0; j < length; ++j) {
          const float weight = std::exp(weights[j] - top);
          sum += weight;
          for (int64_t d = 0; d < head_dim; ++d) mixed[d] += weight * values[j * stride + d];
        }
        Out* to = out.data<Out>() + i * stride + head * head_dim;
        for (int64_t d = 0; d < head_dim; ++d) to[d] = static_cast<Out>(mixed[d] / sum);
      }
    });
  });
}

}  // namespace longtake::cpu
