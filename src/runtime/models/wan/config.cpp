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

// Of a file whose layers have modules. Throws Error (kInput) for a model that has them everywhere:
// the foundation of the few-step ones, which takes a sampler of another kind.
ActionConfig action_config(const Checkpoint& file, int64_t num_layers) {
  const std::string first = "blocks.0.action_model.";
  ActionConfig config;
  while (config.num_layers < num_layers &&
         file.find(str("blocks.", config.num_layers, ".action_model.proj_keyboard.weight")) !=
             nullptr)
    ++config.num_layers;
  if (config.num_layers == 0) return config;
  if (config.num_layers == num_layers)
    throw Error(ErrorKind::kInput,
                str(file.path(),
                    ": expected a distilled Matrix-Game 2, with action modules in its "
                    "first layers, found the foundation model, which has them in all ",
                    num_layers));
  config.embed_dim = size_of_axis(file, first + "keyboard_embed.0.weight", 2, 0);
  config.keyboard_keys = size_of_axis(file, first + "keyboard_embed.0.weight", 2, 1);
  config.num_heads = size_of_axis(file, first + "proj_keyboard.weight", 2, 1) / kActionHeadDim;
  config.has_mouse = file.find(first + "proj_mouse.weight") != nullptr;
  return config;
}

}  // namespace

TransformerConfig transformer_config(const Checkpoint& file, int64_t head_dim) {
  TransformerConfig config;
  config.dim = size_of_axis(file, "patch_embedding.weight", 5, 0);
  config.in_channels = size_of_axis(file, "patch_embedding.weight", 5, 1);
  config.out_channels = size_of_axis(file, "head.head.weight", 2, 0) / (kPatch * kPatch);
  config.freq_dim = size_of_axis(file, "time_embedding.0.weight", 2, 1);
  config.reads_image = file.find("img_emb.proj.1.weight") != nullptr &&
                       file.find("text_embedding.0.weight") == nullptr;
  config.text_dim = config.reads_image ? size_of_axis(file, "img_emb.proj.1.weight", 2, 1)
                                       : size_of_axis(file, "text_embedding.0.weight", 2, 1);
  config.ffn_dim = size_of_axis(file, "blocks.0.ffn.0.weight", 2, 0);
  config.num_heads = config.dim / head_dim;
  while (config.num_layers < kMaxLayers &&
         file.find(str("blocks.", config.num_layers, ".modulation")) != nullptr)
    ++config.num_layers;
  config.actions = action_config(file, config.num_layers);
  constexpr int64_t kStep = 16;  // channels of a head, as the attention kernel takes them
  if (config.num_heads < 1 || config.num_heads * head_dim != config.dim || head_dim % kStep != 0 ||
      config.out_channels < 1 || config.freq_dim < 2 || config.freq_dim % 2 != 0)
    throw Error(ErrorKind::kInput,
                str(file.path(), ": expected a Wan transformer of heads of ", head_dim,
                    " channels, found ", config.dim, " channels, ", config.out_channels,
                    " outputs, ", config.freq_dim, " frequencies"));
  if (config.actions.num_layers == 0 && config.in_channels != config.out_channels)
    throw Error(ErrorKind::kInput,
                str(file.path(), ": expected a model of text or actions, found one that reads ",
                    config.in_channels, " channels and makes ", config.out_channels,
                    ", such as an image-to-video model"));
  return config;
}

}  // namespace longtake::wan
