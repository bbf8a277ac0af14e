// The embedded world model: a folder with config.json, vocabulary.txt and model.safetensors, ready
// to run.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "device/context.h"
#include "io/checkpoint.h"
#include "io/vocabulary.h"
#include "models/world/autoencoder.h"
#include "models/world/config.h"
#include "models/world/text_encoder.h"
#include "models/world/transformer.h"

namespace longtake::world {

inline constexpr const char* kConfigFile = "config.json";
inline constexpr const char* kVocabularyFile = "vocabulary.txt";
inline constexpr const char* kWeightsFile = "model.safetensors";

// Immutable once loaded; sessions share it.
struct Model {
  std::string folder;
  Config config;
  Vocabulary vocabulary;
  DType compute = DType::kF32;  // what matrix products and convolutions read
  TextEncoder text_encoder;
  Transformer transformer;
  Autoencoder autoencoder;
  size_t weight_bytes = 0;  // packed, in memory
};

// compute: f32 | bf16. Throws Error (kInput) that names the file and everything wrong with it.
Model load_model(Context& ctx, const std::string& folder, DType compute);

// The words of a prompt as the transformer takes them, [T, dim] f32 on ctx's device. The text
// encoder runs on the CPU.
Tensor encode_prompt(const Context& ctx, const Model& model, const std::string& prompt);

Config read_config(const std::string& folder);

// One line for every missing, surplus or mis-shaped tensor of a weight file; nothing is loaded.
std::vector<std::string> check_weights(const Config& config, const Checkpoint& file);

// Differs for models whose configuration or weights differ: a saved state fits one model only.
uint64_t model_fingerprint(const std::string& folder);

}  // namespace longtake::world
