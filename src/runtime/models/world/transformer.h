// The block-causal diffusion transformer of the embedded world: one forward pass over one frame,
// attending to the prompt and, through the caches, to every frame remembered.
//
// What a pass needs is split by how often it changes, so that nothing is computed twice: the
// prompt's keys once per prompt, Level once per noise level, Place once per frame.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "device/context.h"
#include "kv/cache.h"
#include "models/world/config.h"
#include "models/world/text_encoder.h"
#include "nn/dit_layer.h"
#include "nn/feed_forward.h"
#include "nn/weight_table.h"

namespace longtake::world {

// What a noise level does to the layers: modulation + e0, and the head's modulation + e.
struct Level {
  Tensor layers;  // [num_layers, 6, dim]: shift1, scale1, gate1, shift2, scale2, gate2
  Tensor head;    // [2, dim]: shift, scale
  Tensor time;    // [dim]: e itself
};

// Where and when a frame is: rotation of its tokens and what the pose adds to them.
struct Place {
  RopeTable rope;       // [S, head_dim / 2]
  Tensor pose;          // [S, 4 harmonics] f32: sines and cosines of the tokens' coordinates
  Tensor pose_tokens;   // [S, dim] f32: pose_embedding of that
  RopeTable host_rope;  // where the host writes them
  Tensor host_pose;
};

// Spares a pass its layers: what they added to the stream in an earlier pass is added again.
class LayerReuse {
 public:
  virtual ~LayerReuse() = default;

  // Whether the layers must run. time [dim]: the noise level's embedding; x [S, dim] f32: the
  // tokens that enter the layers.
  virtual bool must_run(Context& ctx, View time, View x) = 0;

  // [S, dim] f32: what the layers added when they last ran; the pass writes and reads it.
  virtual View residual() = 0;
};

// One run through the layers.
struct Pass {
  const Level& level;
  const Place& place;
  std::span<LayerState> layers;
  bool sparse = false;  // layers with a selector read only what it chooses
  PromptReading prompt = PromptReading::kAll;
  LayerReuse* reuse = nullptr;  // of velocity(); null: the layers run
  PassObserver* observer = nullptr;
};

class Transformer {
 public:
  // compute: storage of matrix inputs, f32 | bf16. text_dim: width of the text encoder's output.
  Transformer(const TransformerConfig& config, int64_t text_dim, DType compute, WeightTable& table);

  // The prompt's keys and values for every layer; text [T, text_dim] f32.
  void set_text(Context& ctx, View text, std::span<LayerState> layers) const;

  // t in [0, 1]: 0 clean, 1 noise.
  Level level(Context& ctx, double t) const;

  Place make_place(Context& ctx) const;
  // camera_x, camera_y: top-left corner of the view in tokens; frame: time index. On CUDA the
  // latest pass must have run.
  void set_place(Context& ctx, double camera_x, double camera_y, int64_t frame, Place& place) const;

  // z, velocity [C, h, w] f32: the estimate of (noise - clean) at this level.
  void velocity(Context& ctx, View z, const Pass& pass, View velocity) const;

  // The pass over a finished frame whose keys and values join every layer's history. It stops when
  // the last layer has its keys: nobody reads the rest.
  void commit(Context& ctx, View z, const Pass& clean, ChunkPosition position) const;

 private:
  // Tokens of z with the pose added: x [S, dim] f32.
  void embed(Context& ctx, View z, const Place& place, View x) const;
  // All layers on x [S, dim] f32, in place; with `commit`, of the last only what joins the history.
  void run_layers(Context& ctx, const Pass& pass, std::optional<ChunkPosition> commit,
                  View x) const;
  // The layer's modulation at the pass's level, [6, dim].
  View modulation(const Pass& pass, int64_t layer) const;

  TransformerConfig config_;
  DType compute_;
  std::optional<LinearWeight> patch_embedding_, pose_embedding_;
  FeedForward text_embedding_, time_embedding_;
  std::optional<LinearWeight> time_projection_;
  std::vector<DitLayer> layers_;
  Tensor head_modulation_;  // [2, dim]
  std::optional<LinearWeight> head_;
};

}  // namespace longtake::world
