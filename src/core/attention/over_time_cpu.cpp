// attend_over_time on the CPU: a few keys for every query, a plain loop over queries and heads.
#include <algorithm>
#include <cmath>

#include "attention/over_time.h"
#include "device/dispatch.h"
#include "device/parallel.h"

namespace longtake::cpu {

void attend_over_time(Context& ctx, View q, View k, View v, View clock, float scale, View out) {
  const int64_t places = q.dim(1), heads = q.dim(2), head_dim = q.dim(3);
  const int64_t row = heads * head_dim;
  const int64_t frames = k.dim(0), history = frames - q.dim(0);
  const int64_t first = history - std::min(history, clock.data<int64_t>()[0]);
  const bool is_shared = k.dim(1) == 1;
  const int64_t key_frame = k.dim(1) * row;
  for_float_type(q.dtype(), [&]<typename T>() {
    const auto* keys = k.data<T>();
    const auto* values = v.data<T>();
    constexpr int64_t kGrain = 16;
    parallel_for(ctx, q.dim(0) * places * heads, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t place = item / heads % places;
        const int64_t at = (is_shared ? 0 : place * row) + item % heads * head_dim;
        const T* query = q.data<T>() + item * head_dim;
        float mixed[256] = {};
        float top = -INFINITY, sum = 0;
        for (int64_t t = first; t < frames; ++t) {
          const T* key = keys + t * key_frame + at;
          const T* value = values + t * key_frame + at;
          float logit = 0;
          for (int64_t d = 0; d < head_dim; ++d)
            logit += static_cast<float>(query[d]) * static_cast<float>(key[d]);
          logit *= scale;
          const float next = std::max(top, logit);
          const float keep = std::exp(top - next), weight = std::exp(logit - next);
          top = next;
          sum = sum * keep + weight;
          for (int64_t d = 0; d < head_dim; ++d)
            mixed[d] = mixed[d] * keep + weight * static_cast<float>(value[d]);
        }
        T* to = out.data<T>() + item * head_dim;
        for (int64_t d = 0; d < head_dim; ++d) to[d] = static_cast<T>(mixed[d] / sum);
      }
    });
  });
}

}  // namespace longtake::cpu
