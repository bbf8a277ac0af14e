// Prompt-induced buckets: each token of a frame belongs to the prompt token that it matches best,
// by the estimate of match.h. Queries and keys of one bucket speak of the same thing, whatever
// layer or frame they come from; AnnSA can select by that (select.h).
//
// A token has one bucket for all heads: that of most attention, summed over the heads.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "attention/match.h"
#include "device/context.h"
#include "kv/page.h"
#include "tensor/tensor.h"

namespace longtake {

class PromptBuckets {
 public:
  // `seed` is that of the random projections.
  PromptBuckets(int64_t num_heads, int64_t head_dim, AnnEngine ann, uint64_t seed);

  // A new prompt of fewer than kNoBucket tokens; no token is assigned yet.
  void set_prompt(const KvView& prompt);

  // Assigns the tokens with these queries of cross attention, q [L, N, D].
  void assign(Context& ctx, View q, float scale);

  // By token of the last assign(): the index of a prompt token.
  std::span<const Bucket> buckets() const { return buckets_; }

 private:
  struct Head {
    std::vector<float> keys;  // [T, D]
    std::vector<float> logits;
    MatchEstimator::Scratch scratch;
  };

  int64_t head_dim_;
  MatchEstimator estimator_;
  int64_t num_tokens_ = 0;          // of the prompt
  std::vector<float> log_weights_;  // [T]: plain keys, zeros
  std::vector<Head> heads_;
  std::vector<float> mass_;  // [T] of one token
  std::vector<Bucket> buckets_;
};

}  // namespace longtake
