#include "models/wan/random_model.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <numeric>
#include <vector>

#include "base/error.h"
#include "device/parallel.h"
#include "io/safetensors.h"
#include "models/wan/image_encoder.h"
#include "models/wan/taehv.h"
#include "models/wan/text_encoder.h"
#include "models/wan/transformer.h"
#include "models/wan/vae_encoder.h"

namespace longtake::wan {
namespace {

namespace fs = std::filesystem;

using std::string_literals::operator""s;

constexpr int64_t kTextLen = 512;
constexpr const char* kGameFolder = "base_distilled_model";
constexpr uint64_t kGolden = 0x9E3779B97F4A7C15ULL;  // splitmix64's increment

struct Sizes {
  TransformerConfig transformer;
  TextEncoderConfig text;
  ImageEncoderConfig image;  // of a transformer that reads an image
  int64_t vae_dim;
};

Sizes sizes_of(const std::string& name) {
  const TextEncoderConfig umt5_xxl{256384, 4096, 4096, 10240, 64, 24};
  if (name == "1.3b") return {{1536, 8960, 12, 30, 16, 16, 256, 4096}, umt5_xxl, {}, 96};
  if (name == "14b") return {{5120, 13824, 40, 40, 16, 16, 256, 4096}, umt5_xxl, {}, 96};
  if (name == "tiny") return {{256, 320, 2, 2, 16, 16, 256, 64}, {512, 64, 64, 128, 4, 2}, {}, 8};
  if (name == "matrix-game-2")
    return {{1536, 8960, 12, 30, 36, 16, 256, 1280, true, {15, 16, 4, 128, true}},
            {},
            {1280, 5120, 31, 14, 16},
            96};
  if (name == "matrix-game-2-tiny")
    return {{256, 320, 2, 2, 36, 16, 256, 160, true, {1, 2, 4, 16, true}},
            {},
            {160, 320, 1, 14, 16},
            8};
  throw Error(ErrorKind::kUsage,
              str("size: expected 1.3b, 14b, tiny, matrix-game-2 or matrix-game-2-tiny, found '",
                  name, "'"));
}

// Uniform in [-1, 1), element `index` of the tensor with this key.
float random_value(uint64_t key, uint64_t index) {
  uint64_t z = key + (index + 1) * kGolden;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ULL;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBULL;
  z ^= z >> 31;
  return static_cast<float>(static_cast<double>(z >> 40) * 0x1p-23 - 1);
}

// Norms are one, biases zero, everything else has the gain that keeps activations in range.
void fill(Context& ctx, const std::string& name, uint64_t seed, View out) {
  uint64_t key = 0xcbf29ce484222325ULL;
  for (const char c : name) key = (key ^ static_cast<uint8_t>(c)) * 0x100000001b3ULL;
  key ^= seed * kGolden;
  const bool is_norm =
      name.ends_with("gamma") || (name.ends_with("weight") && out.shape().rank() == 1);
  const float offset = is_norm ? 1 : 0;
  const float fan_in = static_cast<float>(out.numel()) / static_cast<float>(out.dim(0));
  const float scale = is_norm || name.ends_with("bias") ? 0
                      : name.ends_with("modulation")
                          ? 1 / std::sqrt(static_cast<float>(out.dim(-1)))
                          : std::sqrt(3 / fan_in);
  constexpr int64_t kGrain = 1 << 16;
  parallel_for(ctx, out.numel(), kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float value = offset + scale * random_value(key, static_cast<uint64_t>(i));
      if (out.dtype() == DType::kF32)
        out.data<float>()[i] = value;
      else
        out.data<bf16>()[i] = bf16(value);
    }
  });
}

class Writer {
 public:
  Writer(Context& ctx, fs::path folder, const RandomModelOptions& options)
      : ctx_(ctx), folder_(std::move(folder)), options_(options) {}

  void write(const std::string& file, const std::vector<TensorSpec>& specs) {
    Tensor tensor;
    write_safetensors((folder_ / file).string(), specs, {{"format", "pt"}},
                      [&](const TensorSpec& spec) {
                        tensor = Tensor();  // the old one's memory first
                        tensor = Tensor(ctx_.device(), spec.dtype, spec.shape);
                        fill(ctx_, spec.name, options_.seed, tensor);
                        return tensor.view();
                      });
  }

  // One file, or shards and their index when it would be too large.
  void write_sharded(const std::string& stem, const std::vector<TensorSpec>& specs) {
    std::vector<std::vector<TensorSpec>> shards(1);
    size_t bytes = 0;
    for (const TensorSpec& spec : specs) {
      const size_t more = static_cast<size_t>(spec.shape.numel()) * size_of(spec.dtype);
      if (bytes + more > options_.shard_bytes && !shards.back().empty()) {
        shards.emplace_back();
        bytes = 0;
      }
      shards.back().push_back(spec);
      bytes += more;
    }
    if (shards.size() == 1) return write(stem + ".safetensors", specs);
    nlohmann::json map = nlohmann::json::object();
    for (size_t i = 0; i < shards.size(); ++i) {
      char part[64];
      std::snprintf(part, sizeof part, "-%05zu-of-%05zu.safetensors", i + 1, shards.size());
      for (const TensorSpec& spec : shards[i]) map[spec.name] = stem + part;
      write(stem + part, shards[i]);
    }
    write_bytes(
        stem + ".safetensors.index.json",
        nlohmann::json{{"metadata", nlohmann::json::object()}, {"weight_map", map}}.dump(1) + "\n");
  }

  void write_bytes(const std::string& file, const std::string& bytes) {
    std::ofstream out(folder_ / file, std::ios::binary);
    out << bytes;
    out.close();
    if (!out) throw Error(str((folder_ / file).string(), ": expected to write it, found no space"));
  }

  // prefix: before every name.
  std::vector<TensorSpec> specs(const WeightTable& table, const std::string& prefix = "") const {
    std::vector<TensorSpec> out;
    for (const auto& [name, shape] : table.wanted())
      out.push_back({prefix + name, options_.dtype, shape});
    return out;
  }

 private:
  Context& ctx_;
  fs::path folder_;
  RandomModelOptions options_;
};

std::string config_text(const TransformerConfig& c) {
  const bool is_game = c.actions.num_layers > 0;
  nlohmann::json json{{"_class_name", is_game ? "CausalWanModel" : "WanModel"},
                      {"model_type", is_game ? "i2v" : "t2v"},
                      {"dim", c.dim},
                      {"ffn_dim", c.ffn_dim},
                      {"freq_dim", c.freq_dim},
                      {"in_dim", c.in_channels},
                      {"num_heads", c.num_heads},
                      {"num_layers", c.num_layers},
                      {"out_dim", c.out_channels},
                      {"text_len", kTextLen},
                      {"eps", kEps}};
  if (is_game) {
    std::vector<int64_t> blocks(static_cast<size_t>(c.actions.num_layers));
    std::iota(blocks.begin(), blocks.end(), 0);
    json["action_config"] = {{"blocks", blocks},
                             {"enable_mouse", c.actions.has_mouse},
                             {"heads_num", c.actions.num_heads},
                             {"hidden_size", c.actions.embed_dim},
                             {"keyboard_dim_in", c.actions.keyboard_keys}};
  }
  return json.dump(2);
}

// Protocol buffers, as far as a SentencePiece model needs them.
void append_varint(std::string& out, uint64_t value) {
  for (; value >= 0x80; value >>= 7) out += static_cast<char>(value | 0x80);
  out += static_cast<char>(value);
}

void append_int(std::string& out, uint64_t field, uint64_t value) {
  append_varint(out, field << 3);
  append_varint(out, value);
}

void append_bytes(std::string& out, uint64_t field, const std::string& bytes) {
  append_varint(out, field << 3 | 2);
  append_varint(out, bytes.size());
  out += bytes;
}

// A SentencePiece model whose words are single letters, and bytes for all others: umT5's layout
// without its vocabulary.
std::string letters_tokenizer() {
  enum : uint64_t { kNormal = 1, kUnknown = 2, kControl = 3, kByte = 6 };

  std::string model;
  const auto add = [&](const std::string& piece, uint64_t type) {
    std::string message;
    append_bytes(message, 1, piece);
    message += "\x15";  // field 2, four bytes: the score
    const float score = type == kNormal ? -1.0F : 0.0F;
    message.append(reinterpret_cast<const char*>(&score), sizeof score);
    append_int(message, 3, type);
    append_bytes(model, 1, message);
  };
  add("<pad>", kControl);
  add("</s>", kControl);
  add("<s>", kControl);
  add("<unk>", kUnknown);
  for (int byte = 0; byte < 256; ++byte) {
    char piece[8];
    std::snprintf(piece, sizeof piece, "<0x%02X>", byte);
    add(piece, kByte);
  }
  add("\xe2\x96\x81", kNormal);  // what stands for a space
  for (char letter = '!'; letter <= '~'; ++letter) add(std::string(1, letter), kNormal);
  std::string trainer;
  append_int(trainer, 3, 1);   // unigram
  append_int(trainer, 35, 1);  // bytes for what is unknown
  append_int(trainer, 40, 3);  // <unk>, <s>, </s>, <pad>
  append_int(trainer, 41, 2);
  append_int(trainer, 42, 1);
  append_int(trainer, 43, 0);
  append_bytes(model, 2, trainer);
  std::string normalizer;
  append_bytes(normalizer, 1, "identity");
  append_bytes(model, 3, normalizer);
  return model;
}

}  // namespace

void write_random_model(Context& ctx, const std::string& folder,
                        const RandomModelOptions& options) {
  const Sizes sizes = sizes_of(options.size);
  if (options.dtype != DType::kF32 && options.dtype != DType::kBF16)
    throw Error(ErrorKind::kUsage,
                str("dtype: expected f32 or bf16, found ", name_of(options.dtype)));
  std::error_code error;
  fs::create_directories(folder, error);
  if (error) throw Error(str(folder, ": expected to make it, found ", error.message()));
  Writer writer(ctx, folder, options);
  const Checkpoint none;
  const bool is_game = sizes.transformer.actions.num_layers > 0;
  {
    WeightTable table(none, nullptr);
    Transformer(sizes.transformer, DType::kF32, DType::kF32, table);
    const std::string config = config_text(sizes.transformer) + "\n";
    if (is_game) {
      fs::create_directories(fs::path(folder) / kGameFolder, error);
      writer.write(kGameFolder + "/base_distill.safetensors"s, writer.specs(table, "model."));
      writer.write_bytes(kGameFolder + "/config.json"s, config);
    } else {
      writer.write_sharded("diffusion_pytorch_model", writer.specs(table));
      writer.write_bytes("config.json", config);
    }
  }
  if (options.transformer_only) return;
  if (is_game) {
    ImageEncoderConfig all = sizes.image;
    ++all.num_layers;  // the last one, which nobody asks for
    WeightTable table(none, nullptr);
    ImageEncoder(all, DType::kF32, table);
    writer.write("models_clip_open-clip-xlm-roberta-large-vit-huge-14.safetensors",
                 writer.specs(table));
  } else if (options.text_encoder) {
    WeightTable table(none, nullptr);
    TextEncoder::list_weights(sizes.text, table);
    writer.write("models_t5_umt5-xxl-enc-bf16.safetensors", writer.specs(table));
    writer.write_bytes("spiece.model", letters_tokenizer());
  }
  {
    WeightTable table(none, nullptr);
    VaeDecoder(sizes.vae_dim, DType::kF32, table);
    VaeEncoder(sizes.vae_dim, DType::kF32, table);
    writer.write("Wan2.1_VAE.safetensors", writer.specs(table));
  }
  WeightTable table(none, nullptr);
  TaehvDecoder(DType::kF32, table);
  TaehvEncoder(DType::kF32, table);
  writer.write("taew2_1.safetensors", writer.specs(table));
}

}  // namespace longtake::wan
