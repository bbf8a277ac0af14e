#include "attention/prompt_select.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "device/dispatch.h"

namespace longtake {

int64_t num_tokens_kept(const PromptSelectOptions& options, int64_t num_tokens) {
  const auto wanted =
      static_cast<int64_t>(std::ceil(options.density * static_cast<double>(num_tokens)));
  return std::clamp<int64_t>(wanted, std::min<int64_t>(1, num_tokens), num_tokens);
}

std::unique_ptr<PromptSelector> make_prompt_selector(Context& ctx, int64_t num_heads,
                                                     int64_t head_dim,
                                                     const PromptSelectOptions& options) {
  if (!(options.density >= 0) || !(options.density <= 1))
    throw Error(ErrorKind::kUsage, str("prompt density: expected 0..1, found ", options.density));
  LONGTAKE_DISPATCH(ctx, make_prompt_selector, num_heads, head_dim, options);
}

}  // namespace longtake
