// The one parallel loop of our CPU kernels. Parts are contiguous and fixed by the thread count, so
// results are the same in every run with the same number of threads.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>

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

}  // namespace longtake
