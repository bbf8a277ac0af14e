#include <optional>

#include "attention/prompt_select.h"
#include "attention/prompt_tokens.h"
#include "base/error.h"
#include "device/cuda_runtime.h"
#include "ops/expect.h"

namespace longtake::cuda {
namespace {

class DevicePromptSelector final : public PromptSelector {
 public:
  DevicePromptSelector(int64_t num_heads, int64_t head_dim, const PromptSelectOptions& options)
      : num_heads_(num_heads), head_dim_(head_dim), options_(options) {}

  void set_prompt(Context& ctx, const KvView& prompt) override {
    LONGTAKE_CHECK(prompt.device != nullptr && prompt.num_heads() == num_heads_ &&
                   prompt.head_dim == head_dim_);
    prompt_ = prompt;
    has_chosen_ = false;
    tokens_.emplace(*prompt.device,
                    static_cast<int>(num_tokens_kept(options_, prompt.device->num_tokens)),
                    stream_of(ctx));
  }

  void choose(Context& ctx, View q, float scale) override {
    expect_shape("prompt queries", q, {q.dim(0), num_heads_, head_dim_});
    expect_dtype("prompt queries", q, prompt_.dtype);
    tokens_->choose(q.raw(), q.dim(0), options_.rule == PromptRule::kMass, scale, stream_of(ctx));
    has_chosen_ = true;
  }

  KvView kept() const override {
    KvView view = prompt_;
    if (has_chosen_) view.device = &tokens_->kept();
    return view;
  }

  std::vector<std::vector<int32_t>> members() const override {
    const auto tokens = static_cast<size_t>(prompt_.device->num_tokens);
    std::vector<std::vector<int32_t>> out(static_cast<size_t>(num_heads_));
    check(cudaDeviceSynchronize(), "prompt tokens");
    const std::vector<int32_t> all = on_host(tokens_->members());
    for (size_t h = 0; h < out.size(); ++h) {
      for (size_t i = 0; i < tokens; ++i)
        out[h].push_back(has_chosen_ ? all[h * tokens + i] : static_cast<int32_t>(i));
    }
    return out;
  }

  double density() const override {
    if (!has_chosen_ || prompt_.device->num_tokens == 0) return 1;
    return static_cast<double>(tokens_->kept().num_tokens) /
           static_cast<double>(prompt_.device->num_tokens);
  }

 private:
  int64_t num_heads_, head_dim_;
  PromptSelectOptions options_;
  KvView prompt_;
  std::optional<PromptTokens> tokens_;
  bool has_chosen_ = false;
};

}  // namespace

std::unique_ptr<PromptSelector> make_prompt_selector(Context&, int64_t num_heads, int64_t head_dim,
                                                     const PromptSelectOptions& options) {
  return std::make_unique<DevicePromptSelector>(num_heads, head_dim, options);
}

}  // namespace longtake::cuda
