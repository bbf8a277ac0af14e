// The prompt's words to embeddings: a small bidirectional transformer, run once per prompt, in f32.
#pragma once

#include <functional>
#include <span>
#include <vector>

#include "device/context.h"
#include "models/world/config.h"
#include "nn/attention.h"
#include "nn/feed_forward.h"
#include "nn/weight_table.h"

namespace longtake::world {

// Sees the residual stream [L, dim] f32 after every layer; for tests and debugging.
using LayerObserver = std::function<void(int64_t layer, View x)>;

class TextEncoder {
 public:
  TextEncoder(const TextEncoderConfig& config, WeightTable& table);

  // ids in [0, vocab_size) -> [ids.size(), dim] f32.
  Tensor encode(Context& ctx, std::span<const int32_t> ids,
                const LayerObserver& observer = nullptr) const;

 private:
  struct Layer {
    Tensor norm1;
    Attention attn;
    Tensor norm2;
    FeedForward ffn;
  };

  TextEncoderConfig config_;
  Tensor embedding_;  // [vocab_size, dim]
  std::vector<Layer> layers_;
  Tensor final_norm_;
};

}  // namespace longtake::world
