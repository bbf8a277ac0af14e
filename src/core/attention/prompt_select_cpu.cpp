#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "ann/project.h"
#include "attention/match.h"
#include "attention/prompt_select.h"
#include "base/error.h"
#include "device/parallel.h"
#include "ops/expect.h"

namespace longtake {

namespace {

class CpuPromptSelector final : public PromptSelector {
 public:
  CpuPromptSelector(int64_t num_heads, int64_t head_dim, const PromptSelectOptions& options)
      : head_dim_(head_dim),
        options_(options),
        estimator_(options.ann, head_dim, options.seed),
        heads_(static_cast<size_t>(num_heads)) {}

  void set_prompt(Context& ctx, const KvView& prompt) override;
  void choose(Context& ctx, View q, float scale) override;

  KvView kept() const override { return {dtype_, head_dim_, kept_}; }

  std::vector<std::vector<int32_t>> members() const override { return members_; }

  double density() const override {
    return num_tokens_ > 0 ? static_cast<double>(num_kept_) / static_cast<double>(num_tokens_) : 1;
  }

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

void CpuPromptSelector::set_prompt(Context& ctx, const KvView& prompt) {
  LONGTAKE_CHECK(prompt.num_heads() == static_cast<int64_t>(heads_.size()));
  LONGTAKE_CHECK(prompt.head_dim == head_dim_);
  dtype_ = prompt.dtype;
  num_tokens_ = 0;
  for (const KvPage& page : prompt.heads[0]) num_tokens_ += page.num_keys;
  log_weights_.assign(static_cast<size_t>(num_tokens_), 0.0F);
  const size_t num_pages = prompt.heads[0].size();
  store_ = std::make_unique<PageStore>(ctx.device(), dtype_, head_dim_);
  store_->reserve(num_pages * heads_.size());
  room_.assign(heads_.size(), {});
  kept_.assign(heads_.size(), {});
  members_.assign(heads_.size(), std::vector<int32_t>(static_cast<size_t>(num_tokens_)));
  for (size_t i = 0; i < heads_.size(); ++i) {
    Head& head = heads_[i];
    head.keys.resize(static_cast<size_t>(num_tokens_ * head_dim_));
    head.values.resize(head.keys.size());
    int64_t at = 0;
    for (const KvPage& page : prompt.heads[i]) {
      for (int64_t slot = 0; slot < page.num_keys; ++slot, at += head_dim_)
        read_token(page, dtype_, head_dim_, slot, head.keys.data() + at, head.values.data() + at);
      room_[i].push_back(store_->take());
    }
    kept_[i].reserve(num_pages);
    head.order.resize(static_cast<size_t>(num_tokens_));
    std::iota(head.order.begin(), head.order.end(), 0);
    keep_best(static_cast<int64_t>(i), num_tokens_);
  }
  num_kept_ = num_tokens_;
}

void CpuPromptSelector::choose(Context& ctx, View q, float scale) {
  const int64_t num_heads = static_cast<int64_t>(heads_.size());
  const int64_t queries = q.dim(0);
  expect_shape("prompt queries", q, {queries, num_heads, head_dim_});
  num_kept_ = num_tokens_kept(options_, num_tokens_);
  const Workspace::Scope scope(ctx.workspace());
  const View rows =
      ctx.workspace().take(DType::kF32, {num_heads, std::max<int64_t>(1, queries), head_dim_});
  parallel_for(ctx, num_heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float* own = rows.data<float>() + i * queries * head_dim_;
      copy_head(q, i, own);
      rank_tokens(heads_[static_cast<size_t>(i)], own, queries, scale);
      keep_best(i, num_kept_);
    }
  });
}

void CpuPromptSelector::rank_tokens(Head& head, const float* queries, int64_t count, float scale) {
  const auto tokens = static_cast<size_t>(num_tokens_);
  head.logits.resize(static_cast<size_t>(count) * tokens);
  estimator_.estimate(queries, count, head.keys.data(), log_weights_.data(), num_tokens_, scale,
                      head.scratch, head.logits.data());
  if (options_.rule == PromptRule::kMass) {
    head.rank.assign(tokens, 0.0F);
    for (int64_t t = 0; t < count; ++t)
      add_softmax(head.logits.data() + static_cast<size_t>(t) * tokens, num_tokens_,
                  head.rank.data());
  } else {
    head.rank.assign(tokens, -std::numeric_limits<float>::infinity());
    for (int64_t t = 0; t < count; ++t) {
      const float* logits = head.logits.data() + static_cast<size_t>(t) * tokens;
      for (size_t i = 0; i < tokens; ++i) head.rank[i] = std::max(head.rank[i], logits[i]);
    }
  }
  std::iota(head.order.begin(), head.order.end(), 0);
  std::sort(head.order.begin(), head.order.end(), [&](int32_t a, int32_t b) {
    const float x = head.rank[static_cast<size_t>(a)];
    const float y = head.rank[static_cast<size_t>(b)];
    return x != y ? x > y : a < b;
  });
}

void CpuPromptSelector::keep_best(int64_t index, int64_t count) {
  Head& head = heads_[static_cast<size_t>(index)];
  std::vector<int32_t>& members = members_[static_cast<size_t>(index)];
  PageList& kept = kept_[static_cast<size_t>(index)];
  std::sort(head.order.begin(), head.order.begin() + count);
  std::fill(members.begin(), members.end(), -1);
  kept.clear();
  for (int64_t i = 0; i < count; ++i) {
    const int64_t slot = i % kPageTokens;
    if (slot == 0) {
      KvPage page = room_[static_cast<size_t>(index)][static_cast<size_t>(i / kPageTokens)];
      clear_page(page, dtype_, head_dim_);
      kept.push_back(page);
    }
    const auto token = static_cast<size_t>(head.order[static_cast<size_t>(i)]);
    const size_t at = token * static_cast<size_t>(head_dim_);
    write_token(kept.back(), dtype_, head_dim_, slot, head.keys.data() + at,
                head.values.data() + at, 0);
    members[token] = static_cast<int32_t>(i);
  }
}

}  // namespace

std::unique_ptr<PromptSelector> cpu::make_prompt_selector(Context&, int64_t num_heads,
                                                          int64_t head_dim,
                                                          const PromptSelectOptions& options) {
  return std::make_unique<CpuPromptSelector>(num_heads, head_dim, options);
}

}  // namespace longtake
