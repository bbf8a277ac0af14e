// Where the parts of a Wan model lie in a folder, as people download them.
#pragma once

#include <string>
#include <vector>

#include "io/checkpoint.h"

namespace longtake::wan {

// Paths; empty: there is none.
struct ModelFiles {
  std::string
      transformer;   // diffusion_pytorch_model.safetensors(.index.json), or a *.pt of a maker
  std::string lora;  // models/lora.pt beside LongLive's transformer
  std::string text_encoder;   // models_t5_umt5-xxl-enc-bf16.pth | .safetensors
  std::string tokenizer;      // google/umt5-xxl/spiece.model
  std::string vae;            // Wan2.1_VAE.pth | .safetensors
  std::string taehv;          // taew2_1.pth | .safetensors
  std::string image_encoder;  // models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth
  // How the transformer is played, by its file's name: "self-forcing", "causal-forcing",
  // "causal-forcing-framewise", "longlive", "rolling-forcing" or "matrix-game-2" (with "-drive" or
  // "-run"); a name that says nothing is "self-forcing". And the state dict to take, as
  // open_generator() wants it.
  std::string family, group;
};

// Whether the path is a transformer's file, or a folder with one under a known name.
bool is_model(const std::string& path);

// Looks at names only. path: a folder, or a transformer's file in one; base: another folder whose
// text encoder, tokenizer and decoders come first ("": none). What neither has is looked for in
// wan_models/Wan2.1-T2V-1.3B, where the makers' code expects it. Throws Error (kInput) when a
// folder holds no transformer, or several.
ModelFiles find_model_files(const std::string& path, const std::string& base = "");

// The kind of model whose weights a file holds, by the names of its tensors. kGame: a transformer
// with action modules.
enum class Part { kNone, kTransformer, kGame, kLora, kTextEncoder, kImageEncoder, kVae, kTaehv };

Part part_of(const Checkpoint& file);

const char* name_of(Part part);

// What the file lacks of that part, has too much or in another shape, one line each; nothing is
// loaded. kLora and kNone: nothing to say.
std::vector<std::string> check_part(const Checkpoint& file, Part part);

}  // namespace longtake::wan
