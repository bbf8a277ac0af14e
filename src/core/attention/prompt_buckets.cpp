#include "attention/prompt_buckets.h"

#include <algorithm>

#include "ann/project.h"
#include "base/error.h"
#include "device/parallel.h"
#include "ops/expect.h"

namespace longtake {

PromptBuckets::PromptBuckets(int64_t num_heads, int64_t head_dim, AnnEngine ann, uint64_t seed)
    : head_dim_(head_dim),
      estimator_(ann, head_dim, seed),
      heads_(static_cast<size_t>(num_heads)) {}

void PromptBuckets::set_prompt(const KvView& prompt) {
  LONGTAKE_CHECK(prompt.num_heads() == static_cast<int64_t>(heads_.size()));
  LONGTAKE_CHECK(prompt.head_dim == head_dim_);
  num_tokens_ = 0;
  for (const KvPage& page : prompt.heads[0]) num_tokens_ += page.num_keys;
  LONGTAKE_CHECK(num_tokens_ < kNoBucket, num_tokens_);
  log_weights_.assign(static_cast<size_t>(num_tokens_), 0.0F);
  std::vector<float> value(static_cast<size_t>(head_dim_));
  for (size_t i = 0; i < heads_.size(); ++i) {
    heads_[i].keys.resize(static_cast<size_t>(num_tokens_ * head_dim_));
    float* key = heads_[i].keys.data();
    for (const KvPage& page : prompt.heads[i]) {
      for (int64_t slot = 0; slot < page.num_keys; ++slot, key += head_dim_)
        read_token(page, prompt.dtype, head_dim_, slot, key, value.data());
    }
  }
  buckets_.clear();
}

void PromptBuckets::assign(Context& ctx, View q, float scale) {
  const auto num_heads = static_cast<int64_t>(heads_.size());
  const int64_t count = q.dim(0);
  expect_shape("prompt bucket queries", q, {count, num_heads, head_dim_});
  LONGTAKE_CHECK(num_tokens_ > 0 && ctx.device().kind == DeviceKind::kCpu);
  const Workspace::Scope scope(ctx.workspace());
  const View rows =
      ctx.workspace().take(DType::kF32, {num_heads, std::max<int64_t>(1, count), head_dim_});
  parallel_for(ctx, num_heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float* own = rows.data<float>() + i * count * head_dim_;
      copy_head(q, i, own);
      Head& head = heads_[static_cast<size_t>(i)];
      head.logits.resize(static_cast<size_t>(count * num_tokens_));
      estimator_.estimate(own, count, head.keys.data(), log_weights_.data(), num_tokens_, scale,
                          head.scratch, head.logits.data());
    }
  });
  buckets_.resize(static_cast<size_t>(count));
  for (int64_t t = 0; t < count; ++t) {
    mass_.assign(static_cast<size_t>(num_tokens_), 0.0F);
    for (Head& head : heads_)
      add_softmax(head.logits.data() + t * num_tokens_, num_tokens_, mass_.data());
    buckets_[static_cast<size_t>(t)] =
        static_cast<Bucket>(std::max_element(mass_.begin(), mass_.end()) - mass_.begin());
  }
}

}  // namespace longtake
