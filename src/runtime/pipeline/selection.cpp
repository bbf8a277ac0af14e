#include "pipeline/selection.h"

#include <algorithm>
#include <memory>
#include <utility>

namespace longtake {

void set_selection(Context& ctx, const Method& method, const ModelSizes& sizes,
                   std::span<LayerState> layers) {
  const bool by_prompt = method.sparse_self && method.select.buckets == SelectBuckets::kPrompt;
  for (LayerState& layer : layers) {
    layer.memory.selector.reset();
    if (method.sparse_self)
      layer.memory.selector =
          make_page_selector(ctx, sizes.num_heads, sizes.head_dim, method.select);
    KvPages prompt = std::move(layer.prompt.pages);
    layer.prompt = {};
    if (method.sparse_prompt)
      layer.prompt.selector =
          make_prompt_selector(ctx, sizes.num_heads, sizes.head_dim, method.prompt_select);
    if (by_prompt)
      layer.prompt.buckets = std::make_unique<PromptBuckets>(sizes.num_heads, sizes.head_dim,
                                                             method.select.ann, method.select.seed);
    if (prompt.view().num_heads() > 0) layer.prompt.set(ctx, std::move(prompt));
  }
  if (!method.sparse_self) return;
  for (const int64_t dense : *method.dense_layers)
    layers[static_cast<size_t>(dense)].memory.selector.reset();
  // No cross attention comes before the first layer, so its tokens have no buckets.
  if (by_prompt) layers.front().memory.selector.reset();
}

bool is_sparse_step(const Method& method, int64_t step) {
  if (!method.sparse_self && !method.sparse_prompt) return false;
  const std::vector<int64_t>& dense = *method.dense_steps;
  return step < method.num_steps && !std::binary_search(dense.begin(), dense.end(), step);
}

}  // namespace longtake
