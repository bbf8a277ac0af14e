// The one parallel loop of our CPU kernels. Parts are contiguous and fixed by the thread count, so
// results are the same in every run with the same number of threads.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <span>

#include "device/context.h"

namespace longtake {

// Calls body(begin, end) on disjoint parts of [0, count), at least `grain` items each. body must
// not throw.
template <typename Body>
void parallel_for(Context& ctx, int64_t count, int64_t grain, const Body& body) {
  const int64_t most = std::max<int64_t>(1, count / std::max<int64_t>(1, grain));
  const int threads = static_cast<int>(std::min<int64_t>(ctx.threads(), most));
  if (threads == 1) {
    body(int64_t{0}, count);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    const int64_t parts = omp_get_num_threads();
    const int64_t part = omp_get_thread_num();
    body(count * part / parts, count * (part + 1) / parts);
  }
}

// Calls body(item) for items of very different costs: the dearest first, each to the thread with
// the least work so far. Which thread takes what depends on the costs alone.
template <typename Body>
void parallel_for_ragged(Context& ctx, std::span<const int32_t> costs, const Body& body) {
  const Workspace::Scope scope(ctx.workspace());
  const auto count = static_cast<int64_t>(costs.size());
  const auto take = [&](int64_t n) {
    return ctx.workspace().take(DType::kI32, {n}).template data<int32_t>();
  };
  int32_t* order = take(count);
  int32_t* owner = take(count);
  int32_t* load = take(ctx.threads());
  const auto cost = [&](int32_t item) { return costs[static_cast<size_t>(item)]; };
  std::iota(order, order + count, 0);
  std::sort(order, order + count,
            [&](int32_t a, int32_t b) { return cost(a) != cost(b) ? cost(a) > cost(b) : a < b; });
  std::fill(load, load + ctx.threads(), 0);
  for (int64_t i = 0; i < count; ++i) {
    const auto thread = std::min_element(load, load + ctx.threads()) - load;
    owner[order[i]] = static_cast<int32_t>(thread);
    load[thread] += cost(order[i]);
  }
  parallel_for(ctx, ctx.threads(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = 0; item < count; ++item) {
      if (owner[item] >= begin && owner[item] < end) body(item);
    }
  });
}

}  // namespace longtake
