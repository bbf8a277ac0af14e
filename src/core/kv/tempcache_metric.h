// How far apart two keys of one head are. Keys are mapped so that plain Euclidean distance is the
// measure; the index and the exact check then work on the same vectors.
#pragma once

#include <cstdint>
#include <iosfwd>
#include <vector>

#include "kv/tempcache.h"

namespace longtake {

// kNats: E_q[(logit(k) - logit(k'))^2] = (k - k')^T S (k - k') / D, S = E[q q^T] over the head's
// own queries. With S = L L^T the map is k -> L^T k / sqrt(D): distances are nats. A plain cosine
// would mostly see what all keys share, which softmax does not see at all. kPaper: k -> k / |k|:
// the squared distance is 2 - 2 cosine.
//
// The queries are a running mean, but the map is a snapshot of it (with a centre that is
// subtracted: distances do not feel it, signs of random projections need it): mapped vectors stay
// comparable until the next refresh().
class KeyMetric {
 public:
  KeyMetric(int64_t head_dim, MergeRule rule);

  // queries [L, D], without the temporal rotation.
  void observe(const float* queries, int64_t count);

  // keys [L, D] -> out [L, D].
  void map_all(const float* keys, int64_t count, float* out) const;

  // Takes a new snapshot, centred on keys [L, D]. Without any query so far S is the identity.
  void refresh(const float* keys, int64_t count);

  void map(const float* key, float* out) const;

  void clear();

  void write(std::ostream& out) const;
  bool read(std::istream& in);

 private:
  int64_t head_dim_;
  MergeRule rule_;
  int64_t num_queries_ = 0;
  std::vector<double> second_moment_;        // [D, D]: sum of q q^T
  std::vector<float> map_;                   // [D, D]: L / sqrt(D), row = channel of the key
  std::vector<float> centre_;                // [D], mapped
  std::vector<float> transposed_, product_;  // scratch of observe()
};

}  // namespace longtake
