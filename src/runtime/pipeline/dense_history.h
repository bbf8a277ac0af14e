// DenseHistory: all keys and values of a rollout that kept everything, where instruments look at
// them: what other methods are held against.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "attention/host_copy.h"
#include "device/context.h"
#include "kv/cache.h"

namespace longtake {

class DenseHistory {
 public:
  // Of the caches of all layers, policy "full".
  DenseHistory(Context& ctx, std::vector<std::unique_ptr<KvCache>> caches);

  // Pages of the first `tokens` keys of a head. Several threads may ask.
  PageList first(int64_t layer, int64_t head, int64_t tokens) const;

 private:
  std::vector<std::unique_ptr<KvCache>> caches_;  // on the CPU, where the copies show their pages
  std::vector<std::unique_ptr<HostCopy>> layers_;
};

}  // namespace longtake
