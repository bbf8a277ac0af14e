// Where the parts of a Wan model lie in a folder, as people download them.
#pragma once

#include <string>
#include <vector>

#include "io/checkpoint.h"

namespace longtake::wan {

// Paths; empty: there is none.
struct ModelFiles {
  std::string
      transformer;  // diffusion_pytorch_model.safetensors(.index.json), or a *.pt of a maker
  std::string text_encoder;  // models_t5_umt5-xxl-enc-bf16.pth | .safetensors
  std::string tokenizer;     // google/umt5-xxl/spiece.model
  std::string vae;           // Wan2.1_VAE.pth | .safetensors
  std::string taehv;         // taew2_1.pth | .safetensors
};

// Whether the folder holds a transformer under a known name.
bool is_model_folder(const std::string& folder);

// Looks at names only. Throws Error (kInput) when the folder holds no transformer, or several.
ModelFiles find_model_files(const std::string& folder);

// The kind of model whose weights a file holds, by the names of its tensors.
enum class Part { kNone, kTransformer, kLora, kTextEncoder, kVae, kTaehv };

Part part_of(const Checkpoint& file);

const char* name_of(Part part);

// What the file lacks of that part, has too much or in another shape, one line each; nothing is
// loaded. kLora and kNone: nothing to say.
std::vector<std::string> check_part(const Checkpoint& file, Part part);

}  // namespace longtake::wan
