#include "kv/cache.h"

#include "base/error.h"
#include "build_config.h"
#include "kv/device_cache.h"
#include "kv/host_cache.h"

namespace longtake {
namespace {

std::unique_ptr<KvCache> make_host_cache(Context& ctx, const CacheOptions& options) {
  if (options.memory == "full") return make_full_cache(ctx, options);
  if (options.memory == "window") return make_window_cache(ctx, options);
  if (options.memory == "tempcache") return make_temp_cache(ctx, options);
  return make_flow_cache(ctx, options);
}

// What the layer gets of the budget that was given to all alike.
CacheOptions with_share(const CacheOptions& options) {
  CacheOptions out = options;
  out.layer_shares.clear();
  const auto layers = static_cast<int64_t>(options.layer_shares.size());
  if (options.layer < 0) return out;
  if (options.layer >= layers)
    throw Error(ErrorKind::kUsage, str("layer shares: expected one for layer ", options.layer,
                                       ", found ", layers, " of them"));
  const double share = options.layer_shares[static_cast<size_t>(options.layer)];
  if (!(share >= 0 && share <= static_cast<double>(layers)))
    throw Error(ErrorKind::kUsage, str("layer share: expected 0..", layers, ", found ", share));
  int64_t& budget = out.tempcache.budget_tokens;
  const int64_t least = least_tempcache_budget(options);
  if (budget > least)
    budget = least + static_cast<int64_t>(share * static_cast<double>(budget - least));
  return out;
}

}  // namespace

std::shared_ptr<CommitBatch> make_commit_batch(Context& ctx) {
  if (ctx.device().kind == DeviceKind::kCpu) return nullptr;
  if constexpr (kHasCuda) {
    return cuda::make_device_commit_batch(ctx);
  } else {
    throw Error("cache: expected a build with CUDA, found one without");
  }
}

std::unique_ptr<KvCache> make_cache(Context& ctx, const CacheOptions& options) {
  const auto positive = [](const char* what, int64_t value) {
    if (value <= 0)
      throw Error(ErrorKind::kUsage, str("cache ", what, ": expected above 0, found ", value));
  };
  positive("num_heads", options.num_heads);
  positive("head_dim", options.head_dim);
  positive("tokens_per_frame", options.tokens_per_frame);
  positive("chunk_frames", options.chunk_frames);
  if (options.head_dim % 2 != 0)
    throw Error(ErrorKind::kUsage,
                str("cache head_dim: expected an even number, found ", options.head_dim));
  if (options.memory != "full" && options.memory != "window" && options.memory != "tempcache" &&
      options.memory != "flowcache")
    throw Error(ErrorKind::kUsage, str("memory: expected full, window, tempcache or flowcache, ",
                                       "found '", options.memory, "'"));
  if (!options.layer_shares.empty()) return make_cache(ctx, with_share(options));
  if (ctx.device().kind == DeviceKind::kCpu) return make_host_cache(ctx, options);
  if constexpr (kHasCuda) {
    return cuda::make_device_cache(ctx, options);
  } else {
    throw Error("cache: expected a build with CUDA, found one without");
  }
}

int64_t least_tempcache_budget(const CacheOptions& options) {
  return (options.sink_frames + options.tempcache.exact_frames + 1) * options.tokens_per_frame;
}

void check_tempcache(const CacheOptions& options) {
  const TempCacheOptions& merge = options.tempcache;
  if (options.sink_frames < 0 || merge.exact_frames < 0)
    throw Error(ErrorKind::kUsage,
                str("tempcache: expected 0 or more exact and sink frames, found ",
                    merge.exact_frames, " and ", options.sink_frames));
  const bool paper = merge.rule == MergeRule::kPaper;
  if (!(merge.merge_threshold >= 0) || (paper && merge.merge_threshold > 1))
    throw Error(ErrorKind::kUsage,
                str("merge threshold: expected ", paper ? "a cosine in 0..1" : "0 nats or more",
                    ", found ", merge.merge_threshold));
  if (!(merge.max_error >= 0) || (paper && merge.max_error > 0))
    throw Error(ErrorKind::kUsage,
                str("max error: expected ", paper ? "none with a cosine" : "0 nats or more",
                    ", found ", merge.max_error));
  if (merge.time_pairs < 0 || 2 * merge.time_pairs > options.head_dim)
    throw Error(ErrorKind::kUsage, str("time_pairs: expected 0..", options.head_dim / 2, ", found ",
                                       merge.time_pairs));
  const int64_t least = least_tempcache_budget(options);
  if (merge.budget_tokens != 0 && merge.budget_tokens < least)
    throw Error(
        ErrorKind::kUsage,
        str("memory budget: expected at least ", least,
            " keys per head (sink and exact frames and one more), found ", merge.budget_tokens));
}

}  // namespace longtake
