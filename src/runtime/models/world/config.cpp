#include "models/world/config.h"

#include <nlohmann/json.hpp>

#include "base/error.h"
#include "io/json.h"

namespace longtake::world {
namespace {

constexpr JsonLimits kLimits{1 << 20, 8};
constexpr int64_t kMaxDim = 16384;
constexpr int64_t kMaxLayers = 256;
constexpr int64_t kMaxHeads = 256;
constexpr int64_t kMaxHeadDim = 256;  // what the attention kernel takes
constexpr int64_t kHeadDimStep = 16;
constexpr int64_t kMostSteps = 1000;
constexpr double kLeastShift = 0.01;
constexpr double kMostShift = 100;

void expect(bool ok, const std::string& what, const std::string& expected,
            const std::string& found) {
  if (!ok) throw Error(ErrorKind::kInput, str(what, ": expected ", expected, ", found ", found));
}

AutoencoderConfig read_autoencoder(const JsonObject& json, const std::string& what) {
  AutoencoderConfig c;
  c.latent_channels = json.integer("latent_channels", 1, 256);
  const auto widths = json.integers("widths", c.widths.size(), 1, 4096);
  expect(widths.size() == c.widths.size(), what + ": autoencoder.widths", "3 integers",
         std::to_string(widths.size()));
  std::copy(widths.begin(), widths.end(), c.widths.begin());
  return c;
}

TextEncoderConfig read_text_encoder(const JsonObject& json, const std::string& what) {
  TextEncoderConfig c;
  c.vocab_size = json.integer("vocab_size", 2, 1 << 20);
  c.dim = json.integer("dim", kHeadDimStep, kMaxDim);
  c.num_layers = json.integer("num_layers", 1, kMaxLayers);
  c.num_heads = json.integer("num_heads", 1, kMaxHeads);
  c.ffn_dim = json.integer("ffn_dim", 1, kMaxDim);
  c.text_len = json.integer("text_len", 1, 4096);
  expect(c.dim % (c.num_heads * kHeadDimStep) == 0 && c.head_dim() <= kMaxHeadDim,
         what + ": text_encoder.dim",
         str("num_heads times a multiple of ", kHeadDimStep, " up to ", kMaxHeadDim),
         str(c.dim, " for ", c.num_heads, " heads"));
  return c;
}

TransformerConfig read_transformer(const JsonObject& json, const std::string& what) {
  TransformerConfig c;
  c.dim = json.integer("dim", kHeadDimStep, kMaxDim);
  c.num_layers = json.integer("num_layers", 1, kMaxLayers);
  c.num_heads = json.integer("num_heads", 1, kMaxHeads);
  c.head_dim = json.integer("head_dim", kHeadDimStep, kMaxHeadDim);
  c.ffn_dim = json.integer("ffn_dim", 1, kMaxDim);
  c.patch_size = json.integer("patch_size", 1, 8);
  c.latent_channels = json.integer("latent_channels", 1, 256);
  c.latent_height = json.integer("latent_height", 1, 256);
  c.latent_width = json.integer("latent_width", 1, 256);
  c.eps = static_cast<float>(json.number("eps", 1e-12, 1e-2));
  c.rope_time_pairs = json.integer("rope_time_pairs", 0, kMaxHeadDim / 2);
  c.rope_time_theta = json.number("rope_time_theta", 1, 1e9);
  c.rope_space_harmonics = json.integers("rope_space_harmonics", kMaxHeadDim / 4, 1, 4096);
  c.torus_tokens = json.integer("torus_tokens", 1, 1 << 16);
  c.pose_harmonics = json.integers("pose_harmonics", 64, 1, 4096);

  const std::string at = what + ": transformer.";
  expect(c.dim == c.num_heads * c.head_dim, at + "dim", "num_heads * head_dim",
         str(c.dim, " for ", c.num_heads, " * ", c.head_dim));
  expect(c.head_dim % kHeadDimStep == 0, at + "head_dim", str("a multiple of ", kHeadDimStep),
         std::to_string(c.head_dim));
  const int64_t pairs = c.rope_time_pairs + 2 * static_cast<int64_t>(c.rope_space_harmonics.size());
  expect(2 * pairs == c.head_dim, at + "rope_time_pairs + 2 rope_space_harmonics",
         str(c.head_dim / 2, " rotary pairs"), std::to_string(pairs));
  expect(c.latent_height % c.patch_size == 0 && c.latent_width % c.patch_size == 0,
         at + "latent_height, latent_width", str("multiples of patch_size ", c.patch_size),
         str(c.latent_height, " x ", c.latent_width));
  // The autoencoder halves three times between convolutions that need whole pixels; H.264 needs
  // even sizes. Both hold for every multiple of 8 pixels.
  return c;
}

SamplerConfig read_sampler(const JsonObject& json, const std::string& what) {
  SamplerConfig c;
  const std::string type = json.string("type");
  expect(type == "ode" || type == "renoise", what + ": sampler.type", "ode or renoise",
         '"' + printable(type) + '"');
  c.type = type == "ode" ? SamplerType::kOde : SamplerType::kRenoise;
  c.num_steps = json.integer("num_steps", 1, kMostSteps);
  c.shift = json.number("shift", kLeastShift, kMostShift);
  // Both may be absent or 0: such a frame is like the others.
  if (json.has("first_steps")) c.first_steps = json.integer("first_steps", 0, kMostSteps);
  if (json.has("first_shift")) c.first_shift = json.number("first_shift", 0, kMostShift);
  if (c.first_shift == 0) c.first_shift = c.shift;
  expect(c.first_shift >= kLeastShift, what + ": sampler.first_shift",
         str("0 or at least ", kLeastShift), str(c.first_shift));
  return c;
}

}  // namespace

Config parse_config(std::span<const std::byte> text, const std::string& what) {
  const nlohmann::json json = parse_json(text, what, kLimits);
  const JsonObject root(json, what);
  const std::string type = root.string("model_type");
  expect(type == kModelType, what + ": model_type", str('"', kModelType, '"'),
         '"' + printable(type) + '"');
  Config config;
  config.autoencoder = read_autoencoder(root.object("autoencoder"), what);
  config.text_encoder = read_text_encoder(root.object("text_encoder"), what);
  config.transformer = read_transformer(root.object("transformer"), what);
  config.sampler = read_sampler(root.object("sampler"), what);
  expect(config.autoencoder.latent_channels == config.transformer.latent_channels,
         what + ": autoencoder.latent_channels",
         str("the transformer's ", config.transformer.latent_channels),
         std::to_string(config.autoencoder.latent_channels));
  return config;
}

}  // namespace longtake::world
