#include "ann/index.h"

#include "ann/lsh.h"
#include "ann/quant.h"

namespace longtake {

std::unique_ptr<AnnIndex> make_ann_index(AnnEngine engine, int64_t dim, uint64_t seed) {
  if (engine == AnnEngine::kQuant) return std::make_unique<QuantIndex>(dim, QuantOptions{});
  LshOptions options;
  options.seed = seed;
  return std::make_unique<LshIndex>(dim, options);
}

}  // namespace longtake
