// The caches of CUDA devices: pages (device_pages.h), page tables and every policy's state lie on
// the GPU, and a commit is a few launches that a graph may replay.
#pragma once

#include <memory>

#include "kv/cache.h"

namespace longtake::cuda {

// Throws Error(kUsage) for a policy or sizes that no kernel knows.
std::unique_ptr<KvCache> make_device_cache(Context& ctx, const CacheOptions& options);

std::shared_ptr<CommitBatch> make_device_commit_batch(Context& ctx);

}  // namespace longtake::cuda
