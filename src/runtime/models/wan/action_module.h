// The action modules of Matrix-Game 2: behind the cross attention of a model's first layers, what
// the player does with mouse and keyboard is added to the tokens. The mouse goes through attention
// of every place to itself in the frames before, the keyboard through attention to what was pressed
// around each of those frames. Both remember a few frames.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "device/context.h"
#include "models/wan/config.h"
#include "nn/attention.h"
#include "nn/feed_forward.h"
#include "nn/weight_table.h"

namespace longtake::wan {

// Keys and values along time: frames of history, oldest first, and behind them those of the chunk
// in work. [T, places, heads, 64] in the compute dtype; one place when all share them.
struct TimeMemory {
  Tensor k, v;
};

// What one module remembers.
struct ActionMemory {
  TimeMemory mouse, keyboard;
};

// What a chunk is made under beside noise and image context, and what the modules remember. The
// caller fills image, mouse and keyboard before every chunk.
struct Controls {
  // [F, in_channels - out_channels, H, W] f32, read behind the noisy latents' channels.
  Tensor image;
  // [F S, kActionWindow * kMouseAxes] f32, alike for all tokens of a frame; empty without a mouse.
  Tensor mouse;
  // [F * kActionWindow, keyboard_keys] f32, one row a pixel frame.
  Tensor keyboard;
  RopeTable rope;                      // of the chunk's frames, [F, 32]
  View clock;                          // i64 [1]: the first of them
  std::vector<ActionMemory> memories;  // of the modules

  int64_t num_frames() const { return image.dim(0); }
};

// For chunks of `frames` latents of height x width, remembering `history` frames. clock: see above;
// it must outlive what is returned.
Controls make_controls(Context& ctx, const TransformerConfig& config, DType compute, View clock,
                       int64_t frames, int64_t history, int64_t height, int64_t width);

// The rotation for where the clock stands.
void set_rope(Context& ctx, Controls& controls);

class ActionModule {
 public:
  // name: "blocks.3.action_model."; dim: of the tokens.
  void list(WeightTable& table, const std::string& name, int64_t dim, const ActionConfig& config,
            DType compute);

  // x [F S, dim] f32, in place, rounded to `residual` after each of the two additions. commits: the
  // chunk is clean and joins what is remembered.
  void run(Context& ctx, const Controls& controls, ActionMemory& memory, DType residual,
           bool commits, View x) const;

 private:
  void add_mouse(Context& ctx, const Controls& controls, TimeMemory& memory, DType residual,
                 View x) const;
  void add_keyboard(Context& ctx, const Controls& controls, TimeMemory& memory, DType residual,
                    View x) const;
  // Keys and values take their place in the memory, and x += projection(attention of q to it).
  // q [F S, N, 64] f32, k, v [F places, N, 64] f32; q and k are normalised in place.
  void attend_and_add(Context& ctx, const Controls& controls, TimeMemory& memory, View q, View k,
                      View v, const LinearWeight& projection, DType residual, View x) const;

  ActionConfig config_;
  FeedForward mouse_mlp_;
  Tensor mouse_norm_weight_, mouse_norm_bias_;
  std::optional<LinearWeight> mouse_qkv_, mouse_out_;
  FeedForward keyboard_embedding_;
  std::optional<LinearWeight> keyboard_q_, keyboard_kv_, keyboard_out_;
  Tensor ones_;  // [64]: the norms of q and k have no weights
};

}  // namespace longtake::wan
