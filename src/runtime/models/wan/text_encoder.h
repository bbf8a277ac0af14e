// umT5, the text encoder of the Wan family: a prompt's tokens to embeddings, once per prompt.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "device/context.h"
#include "io/checkpoint.h"
#include "nn/weight_table.h"
#include "ops/linear.h"

namespace longtake::wan {

struct TextEncoderConfig {
  int64_t vocab_size = 0;
  int64_t dim = 0;
  int64_t attention_dim = 0;
  int64_t ffn_dim = 0;
  int64_t num_heads = 0;
  int64_t num_layers = 0;
};

// The configuration that the file's tensors imply. Throws Error (kInput) when it is no umT5
// encoder.
TextEncoderConfig text_encoder_config(const Checkpoint& file);

// The bucket, 0..31, of the distance from a query to a key.
int64_t distance_bucket(int64_t distance);

class TextEncoder {
 public:
  // The table of words stays in the file, of which a prompt reads a few rows; `file` is kept for
  // that. compute: f32 | bf16. Throws Error (kInput) that names what differs.
  TextEncoder(Context& ctx, Checkpoint file, DType compute);

  const TextEncoderConfig& config() const { return config_; }

  // Asks a table that loads nothing for every tensor of such an encoder.
  static void list_weights(const TextEncoderConfig& config, WeightTable& table);

  // Sees the residual stream [L, dim] f32 behind every layer; for tests.
  using LayerObserver = std::function<void(int64_t layer, View x)>;

  // ids of the prompt's tokens, without padding -> [ids.size(), dim] f32. Padded tokens would
  // change nothing: they are masked everywhere. Throws Error (kInput) for an id outside the
  // vocabulary.
  Tensor encode(Context& ctx, std::span<const int32_t> ids,
                const LayerObserver& observer = nullptr) const;

  // The same with rows of zeros behind it, [text_len, dim], as the transformer takes it. Ids behind
  // text_len are left out.
  Tensor encode_padded(Context& ctx, std::span<const int32_t> ids, int64_t text_len) const;

 private:
  struct Layer {
    Tensor norm1, norm2;
    std::optional<LinearWeight> q, k, v, o, gate, fc1, fc2;
    Tensor distance_bias;  // [32, num_heads]
  };

  static void list(WeightTable& table, const TextEncoderConfig& config, DType compute,
                   std::vector<Layer>& layers, Tensor& final_norm);
  void attend(Context& ctx, const Layer& layer, View x, View out) const;
  void feed_forward(Context& ctx, const Layer& layer, View x, View out) const;

  Checkpoint file_;
  TextEncoderConfig config_;
  DType compute_;
  std::vector<Layer> layers_;
  Tensor final_norm_;
};

}  // namespace longtake::wan
