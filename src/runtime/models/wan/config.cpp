#include "models/wan/config.h"

#include "base/error.h"

namespace longtake::wan {
namespace {

constexpr int64_t kMaxLayers = 1000;

int64_t size_of_axis(const Checkpoint& file, const std::string& name, int rank, int axis) {
  const StoredTensor* tensor = file.find(name);
  if (tensor == nullptr || tensor->shape.rank() != rank)
    throw Error(ErrorKind::kInput,
                str(file.path(), ": expected a Wan transformer with ", name, " of ", rank,
                    " axes, found ", tensor ? tensor->shape.to_string() : "no such tensor"));
  return tensor->shape[axis];
}

}  // namespace

TransformerConfig transformer_config(const Checkpoint& file, int64_t head_dim) {
  TransformerConfig config;
  config.dim = size_of_axis(file, "patch_embedding.weight", 5, 0);
  config.in_channels = size_of_axis(file, "patch_embedding.weight", 5, 1);
  config.out_channels = size_of_axis(file, "head.head.weight", 2, 0) / (kPatch * kPatch);
  config.freq_dim = size_of_axis(file, "time_embedding.0.weight", 2, 1);
  config.text_dim = size_of_axis(file, "text_embedding.0.weight", 2, 1);
  config.ffn_dim = size_of_axis(file, "blocks.0.ffn.0.weight", 2, 0);
  config.num_heads = config.dim / head_dim;
  while (config.num_layers < kMaxLayers &&
         file.find(str("blocks.", config.num_layers, ".modulation")) != nullptr)
    ++config.num_layers;
  constexpr int64_t kStep = 16;  // channels of a head, as the attention kernel takes them
  if (config.num_heads < 1 || config.num_heads * head_dim != config.dim || head_dim % kStep != 0 ||
      config.out_channels < 1 || config.freq_dim < 2 || config.freq_dim % 2 != 0)
    throw Error(ErrorKind::kInput,
                str(file.path(), ": expected a Wan transformer of heads of ", head_dim,
                    " channels, found ", config.dim, " channels, ", config.out_channels,
                    " outputs, ", config.freq_dim, " frequencies"));
  return config;
}

}  // namespace longtake::wan
