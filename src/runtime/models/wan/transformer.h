// The diffusion transformer of Wan 2.1, made causal by Self-Forcing, Rolling-Forcing, LongLive,
// Causal-Forcing and, with actions, by Matrix-Game 2: one pass over a few latent frames, each with
// a timestep of its own, which attend to each other, to the prompt (or an image) and, through the
// caches, to frames remembered.
//
// What a pass needs is split by how often it changes, as in models/world/transformer.h: the
// prompt's keys once per prompt, Level once per timestep, the rotation once per chunk.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "device/context.h"
#include "models/wan/action_module.h"
#include "models/wan/config.h"
#include "nn/dit_layer.h"
#include "nn/weight_table.h"

namespace longtake::wan {

// What a timestep does to the layers: modulation + e0, and the head's modulation + e.
struct Level {
  Tensor layers;  // [num_layers, 6, dim]
  Tensor head;    // [2, dim]: shift, scale
};

// One run through the layers.
struct Pass {
  std::span<const Level* const> levels;  // of every frame
  const RopeTable& rope;                 // of every token
  std::span<LayerState> layers;
  HistoryReading reading;
  int64_t unread_frames = 0;  // first frames whose keys are neither read nor remembered
  bool sparse = false;
  PromptReading prompt = PromptReading::kAll;
  PassObserver* observer = nullptr;
  Controls* controls = nullptr;  // of a model with actions
};

// One line for every missing, surplus or mis-shaped tensor of a generator (original names); nothing
// is loaded.
std::vector<std::string> check_weights(const TransformerConfig& config, const Checkpoint& file);

// An image's tokens as the layers read them: two linear layers between two norms.
struct ImageEmbedding {
  Tensor norm_in_weight, norm_in_bias, norm_out_weight, norm_out_bias;
  FeedForward mlp;

  void list(WeightTable& table, int64_t in, int64_t out);
  // tokens [T, in] f32, out [T, out] f32 | bf16.
  void forward(Context& ctx, View tokens, View out) const;
};

class Transformer {
 public:
  // compute: storage of matrix inputs, f32 | bf16. residual: precision of the stream between the
  // layers; f32 as Wan runs it, bf16 as Self-Forcing and its successors do.
  Transformer(const TransformerConfig& config, DType compute, DType residual, WeightTable& table);

  const TransformerConfig& config() const { return config_; }

  // The prompt's keys and values for every layer. text [T, text_dim] f32: encoded tokens; rows of
  // zeros behind them count, since the model was trained to see them; the last row may stand for
  // last_count equal ones, which is the same and cheaper (a key that counts as many), where no
  // layer selects of the prompt. Of a model that reads an image: the image's tokens
  // (models/wan/image_encoder.h).
  void set_text(Context& ctx, View text, std::span<LayerState> layers,
                int64_t last_count = 1) const;

  // timestep in [0, 1000]: 0 clean, 1000 noise.
  Level level(Context& ctx, double timestep) const;

  // Rotation of as many tokens, and its angles for frames of rows x columns tokens from the one on
  // that clock [1] i64 names. Any frame is fine: angles are made in double precision, not looked
  // up.
  RopeTable make_rope(Context& ctx, int64_t tokens) const;
  void set_rope(Context& ctx, View clock, int64_t rows, int64_t columns, RopeTable& rope) const;

  // x [F, in_channels, H, W] f32, flow [F, out_channels, H, W] f32: the estimate of noise - clean.
  // H and W are multiples of 2. With controls x has out_channels: their image has the others.
  void flow(Context& ctx, View x, const Pass& pass, View flow) const;

  // The pass over clean frames whose keys and values join every layer's history: those behind
  // pass.unread_frames, at `position`. It stops when the last layer has its keys.
  void commit(Context& ctx, View x, const Pass& pass, ChunkPosition position) const;

 private:
  using FrameModulations = std::array<View, 32>;  // more frames than any model sees at once

  // Tokens of x, [F S, dim] f32, in the workspace; the caches show what the pass may read.
  View begin(Context& ctx, View x, const Pass& pass) const;
  void embed(Context& ctx, View x, const Controls* controls, View tokens) const;
  // The first `count` layers on tokens, in place.
  void run_layers(Context& ctx, const Pass& pass, int64_t count,
                  std::optional<ChunkPosition> commit, View tokens) const;
  // What the pass is to one layer; `frames` receives the modulations it refers to.
  LayerPass make_layer_pass(const Pass& pass, int64_t layer, std::optional<ChunkPosition> commit,
                            View tokens, FrameModulations& frames) const;

  TransformerConfig config_;
  DType compute_;
  DType residual_;
  std::optional<LinearWeight> patch_embedding_;
  FeedForward text_embedding_, time_embedding_;
  std::optional<ImageEmbedding> image_embedding_;  // in the place of the text's
  std::optional<LinearWeight> time_projection_;
  std::vector<DitLayer> layers_;
  std::vector<ActionModule> actions_;  // of the first layers
  Tensor head_modulation_;             // [1, 2, dim]
  std::optional<LinearWeight> head_;
};

}  // namespace longtake::wan
