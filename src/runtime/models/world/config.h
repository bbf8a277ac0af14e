// Sizes of the embedded world model, as config.json states them. docs/world-model.md defines them.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace longtake::world {

inline constexpr const char* kModelType = "longtake-world";
inline constexpr int64_t kLatentPixels = 8;     // one latent covers 8 x 8 pixels
inline constexpr double kFramesPerSecond = 16;  // a slow step of 4 px is 64 px/s
inline constexpr int64_t kTimeSinusoid = 256;   // values that describe a noise level
inline constexpr float kTextEps = 1e-6F;
inline constexpr float kChannelNormEps = 1e-4F;

struct AutoencoderConfig {
  int64_t latent_channels = 0;
  std::array<int64_t, 3> widths{};  // channels at 1/2, 1/4 and 1/8 of the frame's size
};

struct TextEncoderConfig {
  int64_t vocab_size = 0;
  int64_t dim = 0;
  int64_t num_layers = 0;
  int64_t num_heads = 0;
  int64_t ffn_dim = 0;
  int64_t text_len = 0;  // most tokens of a prompt

  int64_t head_dim() const { return dim / num_heads; }
};

struct TransformerConfig {
  int64_t dim = 0;
  int64_t num_layers = 0;
  int64_t num_heads = 0;
  int64_t head_dim = 0;
  int64_t ffn_dim = 0;
  int64_t patch_size = 0;
  int64_t latent_channels = 0;
  int64_t latent_height = 0;
  int64_t latent_width = 0;
  float eps = 0;
  int64_t rope_time_pairs = 0;
  double rope_time_theta = 0;
  std::vector<int64_t> rope_space_harmonics;  // turns round the torus, one rotary pair each
  int64_t torus_tokens = 0;                   // the world's side
  std::vector<int64_t> pose_harmonics;

  int64_t rows() const { return latent_height / patch_size; }

  int64_t columns() const { return latent_width / patch_size; }

  int64_t frame_tokens() const { return rows() * columns(); }

  int64_t patch_values() const { return latent_channels * patch_size * patch_size; }

  int64_t token_pixels() const { return patch_size * kLatentPixels; }

  int64_t frame_height() const { return latent_height * kLatentPixels; }

  int64_t frame_width() const { return latent_width * kLatentPixels; }
};

enum class SamplerType { kOde, kRenoise };

struct SamplerConfig {
  SamplerType type = SamplerType::kOde;
  int64_t num_steps = 0;
  double shift = 0;
  // A frame without history is a whole screen of news: it gets at least so many steps, on noise
  // levels of their own shift.
  int64_t first_steps = 0;
  double first_shift = 0;
};

struct Config {
  AutoencoderConfig autoencoder;
  TextEncoderConfig text_encoder;
  TransformerConfig transformer;
  SamplerConfig sampler;
};

// `what` names the text in errors. Every size is bounded before anything depends on it.
Config parse_config(std::span<const std::byte> text, const std::string& what);

}  // namespace longtake::world
