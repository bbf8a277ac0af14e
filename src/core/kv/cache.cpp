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

}  // namespace

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
  if (ctx.device().kind == DeviceKind::kCpu) return make_host_cache(ctx, options);
  if constexpr (kHasCuda) {
    return cuda::make_device_cache(ctx, options);
  } else {
    throw Error("cache: expected a build with CUDA, found one without");
  }
}

}  // namespace longtake
