// MatchEstimator: how well queries match keys, without computing their products exactly. By one of
// two engines:
//   quant  the product of query and key, both in 8 bits with a scale each;
//   lsh    the angle between them by the share of equal signs of random projections
//          (Charikar 2002), times their lengths.
// Keys are centred on their mean, which softmax does not see.
#pragma once

#include <cstdint>
#include <vector>

#include "ann/index.h"
#include "tensor/tensor.h"

namespace longtake {

// out [L, D] = x[:, head] of x [L, N, D] f32 | bf16.
void copy_head(View x, int64_t head, float* out);

class MatchEstimator {
 public:
  // Buffers of one estimate; they keep their capacity.
  struct Scratch {
    std::vector<float> centred, columns, rounded;
    std::vector<uint64_t> codes;
  };

  // `seed` is that of the random projections.
  MatchEstimator(AnnEngine engine, int64_t head_dim, uint64_t seed);

  // logits [count, num_keys], about scale * queries keys^T + log_weights up to a constant per
  // query: queries [count, D], keys [num_keys, D], log_weights [num_keys].
  void estimate(const float* queries, int64_t count, const float* keys, const float* log_weights,
                int64_t num_keys, float scale, Scratch& scratch, float* logits) const;

 private:
  uint64_t code(const float* vector) const;

  AnnEngine engine_;
  int64_t head_dim_;
  std::vector<float> directions_;  // [D, kSigns]: lsh
};

}  // namespace longtake
