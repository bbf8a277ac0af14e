#include "models/wan/model_files.h"

#include <algorithm>
#include <filesystem>
#include <string_view>

#include "base/error.h"
#include "models/wan/checkpoint.h"
#include "models/wan/image_encoder.h"
#include "models/wan/taehv.h"
#include "models/wan/text_encoder.h"
#include "models/wan/transformer.h"
#include "models/wan/vae.h"

namespace longtake::wan {
namespace {

namespace fs = std::filesystem;

struct KnownFile {
  const char* name;
  const char* family;
  const char* group;
};

// What the makers call their transformers, where they put them, and which of a file's state dicts
// their own code takes.
constexpr KnownFile kTransformers[] = {
    {"diffusion_pytorch_model.safetensors", "self-forcing", ""},
    {"diffusion_pytorch_model.safetensors.index.json", "self-forcing", ""},
    {"checkpoints/self_forcing_dmd.pt", "self-forcing", "generator_ema"},
    {"self_forcing_dmd.pt", "self-forcing", "generator_ema"},
    {"checkpoints/rolling_forcing_dmd.pt", "rolling-forcing", "generator_ema"},
    {"rolling_forcing_dmd.pt", "rolling-forcing", "generator_ema"},
    {"longlive_models/models/longlive_base.pt", "longlive", "generator"},
    {"models/longlive_base.pt", "longlive", "generator"},
    {"longlive_base.pt", "longlive", "generator"},
    {"chunkwise/causal_forcing.pt", "causal-forcing", "generator"},
    {"framewise/causal_forcing.pt", "causal-forcing-framewise", "generator_ema"},
    {"chunkwise/longvideo.pt", "rolling-forcing", "generator_ema"},
    {"causal_forcing.pt", "causal-forcing", "generator"},
    {"base_distilled_model/base_distill.safetensors", "matrix-game-2", ""},
    {"base_distill.safetensors", "matrix-game-2", ""},
    {"gta_distilled_model/gta_keyboard2dim.safetensors", "matrix-game-2-drive", ""},
    {"gta_keyboard2dim.safetensors", "matrix-game-2-drive", ""},
    {"templerun_distilled_model/templerun_7dim_onlykey.safetensors", "matrix-game-2-run", ""},
    {"templerun_7dim_onlykey.safetensors", "matrix-game-2-run", ""}};
constexpr const char* kTextEncoders[] = {"models_t5_umt5-xxl-enc-bf16.safetensors",
                                         "models_t5_umt5-xxl-enc-bf16.pth"};
constexpr const char* kTokenizers[] = {"google/umt5-xxl/spiece.model", "spiece.model"};
constexpr const char* kVaes[] = {"Wan2.1_VAE.safetensors", "Wan2.1_VAE.pth"};
constexpr const char* kTaehvs[] = {"taew2_1.safetensors", "taew2_1.pth"};
constexpr const char* kImageEncoders[] = {
    "models_clip_open-clip-xlm-roberta-large-vit-huge-14.safetensors",
    "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"};
constexpr const char* kLora = "lora.pt";
constexpr const char* kBaseModel = "wan_models/Wan2.1-T2V-1.3B";

bool is_there(const fs::path& path) {
  std::error_code error;
  return fs::exists(path, error);
}

bool is_file(const fs::path& path) {
  std::error_code error;
  return fs::is_regular_file(path, error);
}

std::vector<const KnownFile*> present(const fs::path& folder) {
  std::vector<const KnownFile*> out;
  for (const KnownFile& transformer : kTransformers) {
    if (is_there(folder / transformer.name)) out.push_back(&transformer);
  }
  return out;
}

// The first of the names that a folder holds, folder by folder; "": none does.
template <size_t N>
std::string first(const std::vector<fs::path>& folders, const char* const (&names)[N]) {
  for (const fs::path& folder : folders) {
    for (const char* name : names) {
      if (is_there(folder / name)) return (folder / name).string();
    }
  }
  return {};
}

// The longest known name that the path ends in; null: none.
const KnownFile* by_name(const std::string& path) {
  const KnownFile* best = nullptr;
  for (const KnownFile& known : kTransformers) {
    const std::string_view name = known.name;
    if (path.ends_with(name) &&
        (best == nullptr || name.size() > std::string_view(best->name).size()))
      best = &known;
  }
  return best;
}

}  // namespace

bool is_model(const std::string& path) {
  return is_file(path) || !present(path).empty();
}

ModelFiles find_model_files(const std::string& path, const std::string& base) {
  ModelFiles files;
  const KnownFile* known = nullptr;
  std::vector<fs::path> folders;
  if (!base.empty()) folders.emplace_back(base);
  if (is_file(path)) {
    files.transformer = path;
    known = by_name(path);
    // The folder that the name is part of is at most two above the file's own.
    fs::path folder = fs::absolute(path).parent_path();
    for (int i = 0; i < 3; ++i, folder = folder.parent_path()) folders.push_back(folder);
  } else {
    const auto transformers = present(path);
    if (transformers.size() != 1) {
      std::string found = "none";
      for (size_t i = 0; i < transformers.size(); ++i)
        found = (i == 0 ? "" : found + " and ") + transformers[i]->name;
      throw Error(ErrorKind::kInput, str(path, ": expected one transformer, such as ",
                                         kTransformers[0].name, ", found ", found));
    }
    known = transformers[0];
    files.transformer = (fs::path(path) / known->name).string();
    // What several transformers share lies above them.
    const fs::path folder = fs::absolute(path).lexically_normal();
    folders.push_back(path);
    folders.push_back((folder.has_filename() ? folder : folder.parent_path()).parent_path());
  }
  for (size_t i = 0, count = folders.size(); i < count; ++i)
    folders.push_back(folders[i] / kBaseModel);
  files.family = known != nullptr ? known->family : kTransformers[0].family;
  files.group = known != nullptr ? known->group : "";
  const fs::path lora = fs::path(files.transformer).parent_path() / kLora;
  if (files.family == "longlive" && is_there(lora)) files.lora = lora.string();
  files.text_encoder = first(folders, kTextEncoders);
  files.tokenizer = first(folders, kTokenizers);
  files.vae = first(folders, kVaes);
  files.taehv = first(folders, kTaehvs);
  files.image_encoder = first(folders, kImageEncoders);
  return files;
}

Part part_of(const Checkpoint& file) {
  const auto holds = [&](const std::string& name) {
    return std::any_of(file.tensors().begin(), file.tensors().end(),
                       [&](const auto& tensor) { return original_name(tensor.name) == name; });
  };
  const auto is_lora = [](const auto& tensor) { return tensor.name.ends_with(".lora_A.weight"); };
  if (holds("patch_embedding.weight"))
    return holds("blocks.0.action_model.proj_keyboard.weight") ? Part::kGame : Part::kTransformer;
  if (std::any_of(file.tensors().begin(), file.tensors().end(), is_lora)) return Part::kLora;
  if (holds("token_embedding.weight") && holds("blocks.0.ffn.gate.0.weight"))
    return Part::kTextEncoder;
  if (holds("visual.pos_embedding")) return Part::kImageEncoder;
  if (holds("decoder.head.0.gamma")) return Part::kVae;
  if (holds("decoder.22.weight")) return Part::kTaehv;
  return Part::kNone;
}

const char* name_of(Part part) {
  switch (part) {
    case Part::kTransformer:
      return "a Wan 2.1 transformer";
    case Part::kGame:
      return "a Matrix-Game 2 transformer";
    case Part::kLora:
      return "low-rank updates of a transformer";
    case Part::kTextEncoder:
      return "a umT5 text encoder";
    case Part::kImageEncoder:
      return "a CLIP image encoder";
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
    case Part::kTransformer:
    case Part::kGame: {
      const Checkpoint generator = open_generator(file.path());
      return check_weights(transformer_config(generator), generator);
    }
    case Part::kTextEncoder:
      TextEncoder::list_weights(text_encoder_config(file), table);
      return table.problems();
    case Part::kImageEncoder:
      ImageEncoder(image_encoder_config(file), DType::kF32, table);
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
