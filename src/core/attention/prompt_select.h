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

#include "ann/index.h"
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
  virtual ~PromptSelector() = default;
  PromptSelector(const PromptSelector&) = delete;
  PromptSelector& operator=(const PromptSelector&) = delete;

  // A new prompt: everything is kept until choose(). On CUDA its pages must stay where they are.
  virtual void set_prompt(Context& ctx, const KvView& prompt) = 0;

  // Chooses for the queries q [L, N, D] of a frame.
  virtual void choose(Context& ctx, View q, float scale) = 0;

  // What is kept, copied together; valid until the next choose() or set_prompt().
  virtual KvView kept() const = 0;

  // members()[head][token]: the entry of kept() that token is, -1: dropped. On CUDA it waits.
  virtual std::vector<std::vector<int32_t>> members() const = 0;

  // Tokens kept over tokens there, of the last choice.
  virtual double density() const = 0;

 protected:
  PromptSelector() = default;
};

// For the context's device. Throws Error (kUsage) for options out of range. CUDA has products in
// place of both engines' estimates (prompt_tokens.h).
std::unique_ptr<PromptSelector> make_prompt_selector(Context& ctx, int64_t num_heads,
                                                     int64_t head_dim,
                                                     const PromptSelectOptions& options);

// Tokens kept of num_tokens.
int64_t num_tokens_kept(const PromptSelectOptions& options, int64_t num_tokens);

namespace cpu {
extern decltype(longtake::make_prompt_selector) make_prompt_selector;
}

namespace cuda {
extern decltype(longtake::make_prompt_selector) make_prompt_selector;
}

}  // namespace longtake
