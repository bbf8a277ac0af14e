// What merging can have cost attention at most, from what a cache knows of its groups: no look at
// the keys that are gone. Beside it, what a commit did cost.
//
// Let an entry of logit s stand for keys whose exponentials add up to exp(L), low <= L <= high. The
// masses p of the entries and those they should have, P ~ p exp(L - s), then differ by a total
// variation of at most max over x of H(x) / (H(x) + l(1 - x)) - x: an x of the mass p grows as far
// as it can (H) while the rest shrinks as far as it can (l). With |L - s| <= eta everywhere that is
// tanh(eta / 2); mass on entries that stand for themselves makes it smaller.
#pragma once

#include <cstdint>
#include <span>

#include "kv/cache.h"
#include "tensor/tensor.h"

namespace longtake {

// That bound for one query, in 0..1. logits, low, high [entries], low <= high.
double moved_mass_bound(std::span<const double> logits, std::span<const double> low,
                        std::span<const double> high);

// Its sum over heads and every `stride`-th query, from stride / 2 on, of q [L, N, D] (rotated,
// asking at `frame`), against the cache's history and the chunk in work; 1 a query where the cache
// is not bounded. Divide by the number of queries and heads for the mean.
double moved_mass_bound(View q, const KvCache& cache, int64_t frame, float scale, int64_t stride);

}  // namespace longtake
