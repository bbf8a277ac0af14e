// AnnCA: which prompt tokens a frame attends to. A token stays if the frame's queries match it, by
// the estimate of match.h; the tokens that stay, and no others, are read by later passes over the
// frame. Heads choose apart.
//
// Two rules rank the tokens, and the best are kept until the share asked for is reached:
//   match  a token is as good as its best match with any one query (the paper's rule, with a bucket
//          as wide as that share needs);
//   mass   a token is as good as the attention that all queries together would give it.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "attention/match.h"
#include "device/context.h"
#include "kv/page.h"
#include "tensor/tensor.h"

namespace longtake {

enum class PromptRule : uint8_t { kMatch, kMass };

struct PromptSelectOptions {
  AnnEngine ann = AnnEngine::kLsh;
  PromptRule rule = PromptRule::kMass;
  double density = 0.33;  // prompt tokens kept over tokens there, 0..1, rounded up; one at least
  uint64_t seed = 0;      // of the random projections
};

class PromptSelector {
 public:
  // Throws Error (kUsage) for options out of range.
  PromptSelector(int64_t num_heads, int64_t head_dim, const PromptSelectOptions& options);

  // A new prompt: everything is kept until choose().
  void set_prompt(Context& ctx, const KvView& prompt);

  // Chooses for the queries q [L, N, D] of a frame.
  void choose(Context& ctx, View q, float scale);

  // What is kept, copied together; valid until the next choose() or set_prompt().
  KvView kept() const { return {dtype_, head_dim_, kept_}; }

  // members()[head][token]: the entry of kept() that token is, -1: dropped.
  const std::vector<std::vector<int32_t>>& members() const { return members_; }

  // Tokens kept over tokens there, of the last choice.
  double density() const;

 private:
  struct Head {
    std::vector<float> keys, values;  // [T, D], unpacked
    std::vector<float> logits, rank;
    std::vector<int32_t> order;
    MatchEstimator::Scratch scratch;
  };

  void rank_tokens(Head& head, const float* queries, int64_t count, float scale);
  // Copies the `count` best tokens, in the prompt's order.
  void keep_best(int64_t head, int64_t count);

  int64_t head_dim_;
  PromptSelectOptions options_;
  MatchEstimator estimator_;
  DType dtype_ = DType::kF32;
  int64_t num_tokens_ = 0, num_kept_ = 0;
  std::vector<float> log_weights_;  // [T]: plain keys, zeros
  std::vector<Head> heads_;
  std::unique_ptr<PageStore> store_;
  std::vector<PageList> room_, kept_;  // by head: pages for the whole prompt; those in use
  std::vector<std::vector<int32_t>> members_;
};

}  // namespace longtake
