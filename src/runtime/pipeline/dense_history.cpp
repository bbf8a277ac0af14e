#include "pipeline/dense_history.h"

#include <algorithm>
#include <utility>

#include "base/error.h"

namespace longtake {

DenseHistory::DenseHistory(Context& ctx, std::vector<std::unique_ptr<KvCache>> caches) {
  for (const auto& cache : caches)
    layers_.push_back(std::make_unique<HostCopy>(ctx, cache->view(), 0));
  if (ctx.device().kind == DeviceKind::kCpu) caches_ = std::move(caches);
}

PageList DenseHistory::first(int64_t layer, int64_t head, int64_t tokens) const {
  PageList out;
  int64_t left = tokens;
  for (const KvPage& page :
       layers_[static_cast<size_t>(layer)]->view().heads[static_cast<size_t>(head)]) {
    if (left == 0) break;
    out.push_back(page);
    out.back().num_keys = static_cast<int32_t>(std::min<int64_t>(left, page.num_keys));
    left -= out.back().num_keys;
  }
  LONGTAKE_CHECK(left == 0, tokens, " keys, ", left, " of them missing");
  return out;
}

}  // namespace longtake
