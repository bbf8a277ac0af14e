#include "attention/host_copy.h"

#include <algorithm>
#include <mutex>

#include "base/error.h"
#include "build_config.h"

namespace longtake {

// Pages of the host that a device's copy becomes when somebody first looks at it.
struct HostCopy::Unpacked {
  Unpacked(DType dtype, int64_t head_dim) : store({}, dtype, head_dim) {}

  std::once_flag once;
  PageStore store;
  std::vector<PageList> heads;
};

HostCopy::HostCopy(Context& ctx, const KvView& view, int64_t chunk_tokens)
    : dtype_(view.dtype), head_dim_(view.head_dim) {
  if (view.device == nullptr) {
    heads_.assign(view.heads.begin(), view.heads.end());
    return;
  }
  if constexpr (kHasCuda) {
    raw_ = std::make_unique<cuda::RawPages>(cuda::copy_pages(ctx, *view.device, chunk_tokens));
    unpacked_ = std::make_unique<Unpacked>(dtype_, head_dim_);
  }
}

HostCopy::~HostCopy() = default;

KvView HostCopy::view() const {
  if (raw_ == nullptr) return {dtype_, head_dim_, heads_};
  if constexpr (kHasCuda) {
    std::call_once(unpacked_->once, [&] {
      cuda::unpack(*raw_, dtype_, head_dim_, unpacked_->store, unpacked_->heads);
    });
  }
  return {dtype_, head_dim_, unpacked_->heads};
}

HostSelection HostCopy::selection(Context& ctx, const Selection& selection) const {
  if (selection.device == nullptr)
    return {selection.tile_queries,
            {selection.offsets.begin(), selection.offsets.end()},
            {selection.pages.begin(), selection.pages.end()}};
  HostSelection out;
  out.tile_queries = selection.tile_queries;
  if constexpr (kHasCuda) {
    const std::vector<std::vector<int32_t>> rows = cuda::copy_lists(ctx, *selection.device);
    LONGTAKE_CHECK(raw_ != nullptr && !raw_->heads.empty());
    const size_t tiles = rows.size() / raw_->heads.size();
    out.offsets.push_back(0);
    for (size_t row = 0; row < rows.size(); ++row) {
      const std::vector<int32_t>& own = raw_->heads[row / tiles];
      std::vector<int32_t> place(raw_->numbers.size(), -1);  // in the head's list, by place
      for (size_t i = 0; i < own.size(); ++i)
        place[static_cast<size_t>(own[i])] = static_cast<int32_t>(i);
      for (const int32_t number : rows[row]) {
        const auto found = std::lower_bound(raw_->numbers.begin(), raw_->numbers.end(), number);
        LONGTAKE_CHECK(found != raw_->numbers.end() && *found == number, "page ", number);
        const int32_t page = place[static_cast<size_t>(found - raw_->numbers.begin())];
        for (int64_t part = 0; part < cuda::kHostPages; ++part)
          out.pages.push_back(static_cast<int32_t>(page * cuda::kHostPages + part));
      }
      out.offsets.push_back(static_cast<int32_t>(out.pages.size()));
    }
  }
  return out;
}

}  // namespace longtake
