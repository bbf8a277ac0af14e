#include "pipeline/error_watch.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "attention/attend.h"
#include "device/dispatch.h"
#include "device/parallel.h"
#include "metrics/error_bound.h"

namespace longtake {
namespace {

constexpr int64_t kQueries = 4;  // of a chunk, spread over it; the bound takes one of them

// Rows begin, begin + stride, ... of x [L, N, D].
Tensor every(View x, int64_t begin, int64_t stride, int64_t count) {
  Tensor out(x.device(), x.dtype(), {count, x.dim(1), x.dim(2)});
  const size_t bytes = x.bytes() / static_cast<size_t>(x.dim(0));
  for (int64_t i = 0; i < count; ++i)
    std::memcpy(out.view().raw() + static_cast<size_t>(i) * bytes,
                x.raw() + static_cast<size_t>(begin + i * stride) * bytes, bytes);
  return out;
}

double relative_change(View before, View after) {
  double change = 0, norm = 0;
  for_float_type(before.dtype(), [&]<typename T>() {
    for (int64_t i = 0; i < before.numel(); ++i) {
      const double a = static_cast<float>(before.data<T>()[i]);
      const double b = static_cast<float>(after.data<T>()[i]);
      change += (a - b) * (a - b);
      norm += a * a;
    }
  });
  return norm > 0 ? std::sqrt(change / norm) : 0;
}

}  // namespace

void ErrorWatch::on_self_attention(int64_t layer, const AttentionRead& read) {
  const int64_t count = std::min(kQueries, read.q.dim(0));
  const int64_t stride = read.q.dim(0) / count;
  samples_[static_cast<size_t>(layer)] = {every(read.q, stride / 2, stride, count),
                                          every(read.mixed, stride / 2, stride, count)};
}

std::vector<LayerError> ErrorWatch::errors(Context& ctx, std::span<const LayerState> layers,
                                           int64_t frame) const {
  constexpr double kUnknown = std::numeric_limits<double>::quiet_NaN();
  std::vector<LayerError> out(layers.size(), {kUnknown, kUnknown});
  for (size_t n = 0; n < layers.size(); ++n) {
    const auto& [queries, mixed] = samples_[n];
    if (queries.numel() == 0) continue;
    const KvCache& cache = *layers[n].memory.cache;
    const auto scale = 1.0F / std::sqrt(static_cast<float>(queries.dim(2)));
    const Tensor now(ctx.device(), mixed.dtype(), mixed.shape());
    attend(ctx, queries, cache.view(), scale, now);
    out[n].commit_error = relative_change(mixed, now);
  }
  parallel_for(ctx, static_cast<int64_t>(layers.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const View q = samples_[static_cast<size_t>(n)].queries;
      if (q.numel() == 0) continue;
      const auto scale = 1.0F / std::sqrt(static_cast<float>(q.dim(2)));
      const KvCache& cache = *layers[static_cast<size_t>(n)].memory.cache;
      out[static_cast<size_t>(n)].moved_mass_bound =
          moved_mass_bound(q, cache, frame, scale, q.dim(0)) / static_cast<double>(q.dim(1));
    }
  });
  return out;
}

}  // namespace longtake
