// Sizes of the Wan family, as their weight files show them.
#pragma once

#include <cstdint>
#include <string>

#include "io/checkpoint.h"

namespace longtake::wan {

inline constexpr int64_t kPatch = 2;          // a token covers 2 x 2 latents of one frame
inline constexpr int64_t kHeadDim = 128;      // of every released model
inline constexpr int64_t kTrainSteps = 1000;  // timesteps are in 0..1000, 1000 is noise
inline constexpr float kEps = 1e-6F;          // of every norm
inline constexpr double kTheta = 10000;       // of RoPE and of the timestep's sinusoid

// Of a world model's action modules.
inline constexpr int64_t kActionHeadDim = 64;
inline constexpr int64_t kActionWindow = 12;  // pixel frames whose actions a latent frame sees
inline constexpr int64_t kMouseAxes = 2;      // up and right

struct ActionConfig {
  int64_t num_layers = 0;     // the first ones have a module; 0: the model takes no actions
  int64_t num_heads = 0;      // of kActionHeadDim channels each
  int64_t keyboard_keys = 0;  // inputs of a pixel frame
  int64_t embed_dim = 0;      // that they become
  bool has_mouse = false;
};

struct TransformerConfig {
  int64_t dim = 0;
  int64_t ffn_dim = 0;
  int64_t num_heads = 0;
  int64_t num_layers = 0;
  int64_t in_channels = 0;
  int64_t out_channels = 0;
  int64_t freq_dim = 0;      // values that describe a timestep
  int64_t text_dim = 0;      // of the tokens that cross attention reads ...
  bool reads_image = false;  // ... which are an image's, not a text's
  ActionConfig actions = {};

  int64_t head_dim() const { return dim / num_heads; }

  // Rotary pairs of a head that turn with the frame; rows and columns share the others evenly.
  int64_t space_pairs() const { return head_dim() / 2 / 3; }

  int64_t time_pairs() const { return head_dim() / 2 - 2 * space_pairs(); }
};

// The configuration that a generator's tensors (original names) imply, with heads of head_dim
// channels. Throws Error (kInput) when the file is no Wan transformer.
TransformerConfig transformer_config(const Checkpoint& file, int64_t head_dim = kHeadDim);

}  // namespace longtake::wan
