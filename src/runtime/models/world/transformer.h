// The block-causal diffusion transformer of the embedded world: one forward pass over one frame,
// attending to the prompt and, through the caches, to every frame remembered.
//
// What a pass needs is split by how often it changes, so that nothing is computed twice:
// TextKeys once per prompt, Level once per noise level, Place once per frame.
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
#include "nn/attention.h"
#include "nn/feed_forward.h"
#include "nn/weight_table.h"

namespace longtake::world {

// The prompt's keys and values for cross attention, one set per layer.
using TextKeys = std::vector<KvPages>;

// What a noise level does to the layers: modulation + e0, and the head's modulation + e.
struct Level {
  Tensor layers;  // [num_layers, 6, dim]: shift1, scale1, gate1, shift2, scale2, gate2
  Tensor head;    // [2, dim]: shift, scale
};

// Where and when a frame is: rotation of its tokens and what the pose adds to them.
struct Place {
  RopeTable rope;      // [S, head_dim / 2]
  Tensor pose_tokens;  // [S, dim] f32: pose_embedding of the tokens' world coordinates
};

// Caches of all layers.
using Caches = std::vector<std::unique_ptr<KvCache>>;

class Transformer {
 public:
  // compute: storage of matrix inputs, f32 | bf16. text_dim: width of the text encoder's output.
  Transformer(const TransformerConfig& config, int64_t text_dim, DType compute, WeightTable& table);

  // text [T, text_dim] f32.
  TextKeys text_keys(Context& ctx, View text) const;

  // t in [0, 1]: 0 clean, 1 noise.
  Level level(Context& ctx, double t) const;

  Place make_place(Context& ctx) const;
  // camera_x, camera_y: top-left corner of the view in tokens; frame: time index.
  void set_place(Context& ctx, double camera_x, double camera_y, int64_t frame, Place& place) const;

  // z, velocity [C, h, w] f32: the estimate of (noise - clean) at this level.
  void velocity(Context& ctx, View z, const Level& level, const Place& place, const TextKeys& text,
                const Caches& caches, View velocity, const LayerObserver& observer = nullptr) const;

  // The pass over a finished frame whose keys and values join every layer's history. It stops when
  // the last layer has its keys: nobody reads the rest.
  void commit(Context& ctx, View z, const Level& clean, const Place& place, const TextKeys& text,
              const Caches& caches, ChunkPosition position,
              const LayerObserver& observer = nullptr) const;

 private:
  struct Layer {
    Attention self_attn;
    Attention cross_attn;
    Tensor norm3_weight, norm3_bias;
    FeedForward ffn;
    Tensor modulation;  // [6, dim]
  };

  // Tokens of z with the pose added: x [S, dim] f32.
  void embed(Context& ctx, View z, const Place& place, View x) const;
  // One layer on x [S, dim] f32, in place; modulation [6, dim].
  void run_layer(Context& ctx, const Layer& layer, View modulation, const Place& place,
                 const KvPages& text, KvCache& cache, std::optional<ChunkPosition> commit,
                 View x) const;

  TransformerConfig config_;
  DType compute_;
  std::optional<LinearWeight> patch_embedding_, pose_embedding_;
  FeedForward text_embedding_, time_embedding_;
  std::optional<LinearWeight> time_projection_;
  std::vector<Layer> layers_;
  Tensor head_modulation_;  // [2, dim]
  std::optional<LinearWeight> head_;
};

}  // namespace longtake::world
