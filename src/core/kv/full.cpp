// Policy `full`: every committed token stays. The store doubles when it is full; pages never move.
#include <algorithm>

#include "kv/host_cache.h"

namespace longtake {
namespace {

class FullCache final : public HostCache {
 public:
  FullCache(Context& ctx, const CacheOptions& options) : HostCache(ctx, options) {
    const int64_t tokens = std::max(options.reserve_tokens, options.tokens_per_frame);
    const int64_t current = (options.tokens_per_frame + kPageTokens - 1) / kPageTokens;
    const int64_t pages = (tokens + kPageTokens - 1) / kPageTokens + current;
    store_.reserve(static_cast<size_t>(options.num_heads * pages));
    for (PageList& list : pages_) list.reserve(static_cast<size_t>(pages));
  }

  bool is_bounded() const override { return true; }

  void commit(Context&, View k, View v, ChunkPosition) override {
    check_chunk(k, v);
    drop_current();
    append(k, v, 0, k.dim(0), /*fill=*/true);
  }
};

}  // namespace

std::unique_ptr<KvCache> make_full_cache(Context& ctx, const CacheOptions& options) {
  return std::make_unique<FullCache>(ctx, options);
}

}  // namespace longtake
