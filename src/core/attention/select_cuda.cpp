#include <algorithm>

#include "attention/page_lists.h"
#include "attention/select.h"
#include "base/error.h"
#include "device/cuda_runtime.h"
#include "ops/expect.h"

namespace longtake::cuda {
namespace {

class DevicePageSelector final : public PageSelector {
 public:
  DevicePageSelector(int64_t num_heads, int64_t head_dim, double density)
      : num_heads_(num_heads), head_dim_(head_dim), density_(density) {}

  Selection select(Context& ctx, View q, const KvView& kv, int64_t, int64_t, float scale,
                   std::span<const Bucket>) override {
    expect_shape("select", q, {q.dim(0), num_heads_, head_dim_});
    LONGTAKE_CHECK(kv.device != nullptr && kv.device->summaries != nullptr);
    const DevicePages& pages = *kv.device;
    const auto rows = static_cast<int>(num_heads_ * ((q.dim(0) + kTileQueries - 1) / kTileQueries));
    if (lister_ == nullptr || rows > lister_->max_rows() ||
        pages.max_pages_per_head > lister_->max_pages_per_head()) {
      // A cache that grew: before anything is recorded anew.
      lister_ = std::make_unique<PageLister>(std::max(rows, lister_ ? lister_->max_rows() : 0),
                                             pages.max_pages_per_head, static_cast<int>(head_dim_));
    }
    lists_ =
        lister_->list(q.raw(), q.dtype() == DType::kF32, q.dim(0), pages.heads, *pages.summaries,
                      scale, {density_, pages.first_pages, pages.last_pages}, stream_of(ctx));
    return {kTileQueries, {}, {}, &lists_};
  }

  double density() const override { return lister_ ? lister_->density() : 1; }

 private:
  int64_t num_heads_, head_dim_;
  double density_;
  std::unique_ptr<PageLister> lister_;
  PageLists lists_;
};

}  // namespace

std::unique_ptr<PageSelector> make_page_selector(Context& ctx, int64_t num_heads, int64_t head_dim,
                                                 const SelectOptions& options) {
  if (options.buckets == SelectBuckets::kPrompt)
    throw Error(ErrorKind::kUsage, str("buckets of the prompt: expected --device cpu, found ",
                                       ctx.device().to_string()));
  return std::make_unique<DevicePageSelector>(num_heads, head_dim, options.density);
}

}  // namespace longtake::cuda
