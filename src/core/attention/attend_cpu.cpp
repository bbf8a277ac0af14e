// attend on the CPU: plain loops.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "attention/attend.h"
#include "device/dispatch.h"
#include "device/parallel.h"

namespace longtake::cpu {

void attend(Context& ctx, View q, const KvView& kv, const Selection* selection, float scale,
            View out) {
  const int64_t queries = q.dim(0), heads = q.dim(1), dim = q.dim(2);
  const int64_t tiles =
      selection ? (queries + selection->tile_queries - 1) / selection->tile_queries : 1;
  parallel_for(ctx, heads * queries, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / queries, i = task % queries;
      const PageList& list = kv.heads[static_cast<size_t>(head)];
      std::array<float, 256> acc{};
      float top = -1e30F, sum = 0;
      int64_t first = 0, last = static_cast<int64_t>(list.size());
      if (selection) {
        const auto row = static_cast<size_t>(head * tiles + i / selection->tile_queries);
        first = selection->offsets[row];
        last = selection->offsets[row + 1];
      }
      for_float_type(q.dtype(), [&]<typename T>() {
        constexpr int64_t kPair = sizeof(T) == 2 ? 2 : 1;
        const T* query = q.data<T>() + (i * heads + head) * dim;
        for (int64_t p = first; p < last; ++p) {
          const auto index = selection ? selection->pages[static_cast<size_t>(p)] : p;
          const KvPage& page = list[static_cast<size_t>(index)];
          const T* keys = reinterpret_cast<const T*>(page.keys);
          const T* values = reinterpret_cast<const T*>(page.values);
          for (int64_t t = 0; t < kPageTokens; ++t) {
            if (page.bias[t] == -std::numeric_limits<float>::infinity()) continue;
            float s = 0;
            for (int64_t d = 0; d < dim; ++d)
              s += static_cast<float>(query[d]) *
                   static_cast<float>(keys[(d / kPair * kPageTokens + t) * kPair + d % kPair]);
            s = s * scale + page.bias[t];
            const float now = std::max(top, s);
            const float keep = std::exp(top - now), weight = std::exp(s - now);
            sum = sum * keep + weight;
            top = now;
            for (int64_t d = 0; d < dim; ++d)
              acc[static_cast<size_t>(d)] =
                  acc[static_cast<size_t>(d)] * keep +
                  weight * static_cast<float>(values[(t / kPair * dim + d) * kPair + t % kPair]);
          }
        }
      });
      for_float_type(out.dtype(), [&]<typename T>() {
        T* to = out.data<T>() + (i * heads + head) * dim;
        for (int64_t d = 0; d < dim; ++d)
          to[d] = static_cast<T>(sum > 0 ? acc[static_cast<size_t>(d)] / sum : 0.0F);
      });
    }
  });
}

}  // namespace longtake::cpu
