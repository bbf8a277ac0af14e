#include "models/world/model.h"

#include <cstring>
#include <utility>

#include "base/error.h"
#include "io/mapped_file.h"
#include "nn/weight_table.h"

namespace longtake::world {
namespace {

std::string in_folder(const std::string& folder, const char* file) {
  return folder + "/" + file;
}

Vocabulary read_vocabulary(const std::string& folder, const Config& config) {
  const std::string path = in_folder(folder, kVocabularyFile);
  const MappedFile file(path);
  const auto bytes = file.bytes();
  Vocabulary vocabulary({reinterpret_cast<const char*>(bytes.data()), bytes.size()}, path);
  const auto size = static_cast<int64_t>(vocabulary.size());
  if (size != config.text_encoder.vocab_size)
    throw Error(ErrorKind::kInput, str(path, ": expected ", config.text_encoder.vocab_size,
                                       " words as in ", kConfigFile, ", found ", size));
  return vocabulary;
}

// FNV-1a over words of eight bytes, and over the bytes of the tail.
uint64_t hash(std::span<const std::byte> bytes, uint64_t state) {
  constexpr uint64_t kPrime = 0x100000001b3ULL;
  size_t i = 0;
  for (; i + sizeof(uint64_t) <= bytes.size(); i += sizeof(uint64_t)) {
    uint64_t word = 0;
    std::memcpy(&word, bytes.data() + i, sizeof word);
    state = (state ^ word) * kPrime;
    state ^= state >> 29;  // FNV's own mixing only moves bits upward
  }
  for (; i < bytes.size(); ++i) state = (state ^ std::to_integer<uint64_t>(bytes[i])) * kPrime;
  return state;
}

}  // namespace

Model load_model(Context& ctx, const std::string& folder, DType compute) {
  Config config = read_config(folder);
  Vocabulary vocabulary = read_vocabulary(folder, config);
  const Checkpoint file(in_folder(folder, kWeightsFile));
  // The text encoder runs once a prompt, and stays on the CPU.
  Context host({}, ctx.threads());
  WeightTable table(file, &host);
  TextEncoder text_encoder(config.text_encoder, table);
  table.pack_for(ctx);
  Transformer transformer(config.transformer, config.text_encoder.dim, compute, table);
  Autoencoder autoencoder(config.autoencoder, compute, table);
  table.finish();
  return {folder,
          std::move(config),
          std::move(vocabulary),
          compute,
          std::move(text_encoder),
          std::move(transformer),
          std::move(autoencoder),
          table.bytes()};
}

Tensor encode_prompt(const Context& ctx, const Model& model, const std::string& prompt) {
  Context host({}, ctx.threads());
  return model.text_encoder.encode(host, model.vocabulary.tokenize(prompt)).to(ctx.device());
}

Config read_config(const std::string& folder) {
  const std::string path = in_folder(folder, kConfigFile);
  return parse_config(MappedFile(path).bytes(), path);
}

std::vector<std::string> check_weights(const Config& config, const Checkpoint& file) {
  WeightTable table(file, nullptr);
  TextEncoder(config.text_encoder, table);
  Transformer(config.transformer, config.text_encoder.dim, DType::kF32, table);
  Autoencoder(config.autoencoder, DType::kF32, table);
  return table.problems();
}

uint64_t model_fingerprint(const std::string& folder) {
  uint64_t state = 0xcbf29ce484222325ULL;
  for (const char* name : {kConfigFile, kVocabularyFile, kWeightsFile})
    state = hash(MappedFile(in_folder(folder, name)).bytes(), state);
  return state;
}

}  // namespace longtake::world
