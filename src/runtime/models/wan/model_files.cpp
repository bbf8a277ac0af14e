#include "models/wan/model_files.h"

#include <algorithm>
#include <filesystem>

#include "base/error.h"
#include "models/wan/checkpoint.h"
#include "models/wan/taehv.h"
#include "models/wan/text_encoder.h"
#include "models/wan/transformer.h"
#include "models/wan/vae.h"

namespace longtake::wan {
namespace {

namespace fs = std::filesystem;

// What the makers call their transformers, and where.
constexpr const char* kTransformers[] = {"diffusion_pytorch_model.safetensors",
                                         "diffusion_pytorch_model.safetensors.index.json",
                                         "checkpoints/self_forcing_dmd.pt",
                                         "self_forcing_dmd.pt",
                                         "checkpoints/rolling_forcing_dmd.pt",
                                         "rolling_forcing_dmd.pt",
                                         "models/longlive_base.pt",
                                         "longlive_base.pt",
                                         "chunkwise/causal_forcing.pt",
                                         "causal_forcing.pt"};
constexpr const char* kTextEncoders[] = {"models_t5_umt5-xxl-enc-bf16.safetensors",
                                         "models_t5_umt5-xxl-enc-bf16.pth"};
constexpr const char* kTokenizers[] = {"google/umt5-xxl/spiece.model", "spiece.model"};
constexpr const char* kVaes[] = {"Wan2.1_VAE.safetensors", "Wan2.1_VAE.pth"};
constexpr const char* kTaehvs[] = {"taew2_1.safetensors", "taew2_1.pth"};

template <size_t N>
std::vector<std::string> present(const std::string& folder, const char* const (&names)[N]) {
  std::vector<std::string> out;
  for (const char* name : names) {
    const fs::path path = fs::path(folder) / name;
    std::error_code error;
    if (fs::exists(path, error)) out.push_back(path.string());
  }
  return out;
}

template <size_t N>
std::string first(const std::string& folder, const char* const (&names)[N]) {
  const auto found = present(folder, names);
  return found.empty() ? std::string() : found[0];
}

}  // namespace

bool is_model_folder(const std::string& folder) {
  return !present(folder, kTransformers).empty();
}

ModelFiles find_model_files(const std::string& folder) {
  const auto transformers = present(folder, kTransformers);
  if (transformers.size() != 1) {
    std::string found = "none";
    for (size_t i = 0; i < transformers.size(); ++i)
      found = (i == 0 ? "" : found + " and ") + transformers[i];
    throw Error(ErrorKind::kInput, str(folder, ": expected one transformer, such as ",
                                       kTransformers[0], ", found ", found));
  }
  return {transformers[0], first(folder, kTextEncoders), first(folder, kTokenizers),
          first(folder, kVaes), first(folder, kTaehvs)};
}

Part part_of(const Checkpoint& file) {
  const auto holds = [&](const std::string& name) {
    return std::any_of(file.tensors().begin(), file.tensors().end(),
                       [&](const auto& tensor) { return original_name(tensor.name) == name; });
  };
  const auto is_lora = [](const auto& tensor) { return tensor.name.ends_with(".lora_A.weight"); };
  if (holds("patch_embedding.weight")) return Part::kTransformer;
  if (std::any_of(file.tensors().begin(), file.tensors().end(), is_lora)) return Part::kLora;
  if (holds("token_embedding.weight") && holds("blocks.0.ffn.gate.0.weight"))
    return Part::kTextEncoder;
  if (holds("decoder.head.0.gamma")) return Part::kVae;
  if (holds("decoder.22.weight")) return Part::kTaehv;
  return Part::kNone;
}

const char* name_of(Part part) {
  switch (part) {
    case Part::kTransformer:
      return "a Wan 2.1 transformer";
    case Part::kLora:
      return "low-rank updates of a transformer";
    case Part::kTextEncoder:
      return "a umT5 text encoder";
    case Part::kVae:
      return "a Wan 2.1 VAE";
    case Part::kTaehv:
      return "a TAEHV decoder";
    case Part::kNone:
      break;
  }
  return "no part of a Wan model";
}

std::vector<std::string> check_part(const Checkpoint& file, Part part) {
  WeightTable table(file, nullptr);
  switch (part) {
    case Part::kTransformer: {
      const Checkpoint generator = open_generator(file.path());
      return check_weights(transformer_config(generator), generator);
    }
    case Part::kTextEncoder:
      TextEncoder::list_weights(text_encoder_config(file), table);
      return table.problems();
    case Part::kVae:
      VaeDecoder(vae_dim(file), DType::kF32, table);
      return table.problems();
    case Part::kTaehv:
      TaehvDecoder(DType::kF32, table);
      return table.problems();
    case Part::kLora:
    case Part::kNone:
      break;
  }
  return {};
}

}  // namespace longtake::wan
