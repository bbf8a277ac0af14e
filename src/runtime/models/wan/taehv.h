// TAEHV, the small coder of the Wan family's latents: one latent frame for four pixel frames, with
// the state of a stream in nine small images. Frames go through one at a time, so memory does not
// grow with the video.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>

#include "device/context.h"
#include "nn/weight_table.h"
#include "ops/conv.h"

namespace longtake::wan {

// Receives one frame [H, W, 3] f32, valid during the call.
using FrameSink = std::function<void(View frame)>;

// y = relu(conv(x, what came before x) + x)
struct TaehvBlock {
  std::optional<ConvWeight> conv0, conv2, conv4;

  void list(WeightTable& table, const std::string& name, int64_t channels, DType compute);
  // x [H, W, C] in the compute dtype is replaced by the block's output; memory: what came before.
  void run(Context& ctx, Tensor& memory, View x) const;
};

class TaehvDecoder {
 public:
  static constexpr int64_t kLatentChannels = 16;
  static constexpr int64_t kFramesSkipped = 3;  // of the first latent of a video

  // compute: f32 | bf16. The file's encoder is passed over.
  TaehvDecoder(DType compute, WeightTable& table);

  static constexpr int kStages = 3;
  static constexpr int kBlocks = 3;  // of a stage

  // Of one video: what every block last saw. Empty tensors: nothing yet.
  struct State {
    std::array<std::array<Tensor, kBlocks>, kStages> memory;  // [H, W, C] in the compute dtype
    int64_t num_latents = 0;
  };

  // z [16, h, w] f32: the transformer's own latents, not denormalised -> frames [8 h, 8 w, 3] f32,
  // about [0, 1], not clamped: one of the first latent, four of every other.
  void decode(Context& ctx, View z, State& state, const FrameSink& sink) const;

 private:
  struct Stage {
    std::array<TaehvBlock, kBlocks> blocks;
    std::optional<ConvWeight> grow;  // 1 x 1: one frame to the channels of `frames` frames
    std::optional<ConvWeight> conv;
    int64_t frames = 1;
  };

  // Everything from stage `index` on, for one frame.
  void run_stage(Context& ctx, int index, View x, State& state, int64_t& skip,
                 const FrameSink& sink) const;

  DType compute_;
  std::optional<ConvWeight> in_, out_;
  std::array<Stage, kStages> stages_;
};

class TaehvEncoder {
 public:
  static constexpr int64_t kFramesPerLatent = 4;

  // compute: f32 | bf16. The file's decoder is passed over.
  TaehvEncoder(DType compute, WeightTable& table);

  static constexpr int kStages = 3;
  static constexpr int kBlocks = 3;  // of a stage

  // Of one video: what every block last saw, and frames that wait to be pooled with the next.
  struct State {
    std::array<std::array<Tensor, kBlocks>, kStages> memory;
    std::array<Tensor, kStages> waiting;
    std::array<bool, kStages> waits{};
  };

  // rgb [8 h, 8 w, 3] f32 in [0, 1] -> after every fourth frame a latent [16, h, w] f32, as the
  // transformer takes it.
  void encode(Context& ctx, View rgb, State& state, const FrameSink& latent) const;

 private:
  struct Stage {
    std::optional<ConvWeight> pool;  // 1 x 1 over the channels of `frames` frames
    std::optional<ConvWeight> conv;  // stride 2
    std::array<TaehvBlock, kBlocks> blocks;
    int64_t frames = 1;
  };

  // Everything from stage `index` on, for one frame.
  void run_stage(Context& ctx, int index, View x, State& state, const FrameSink& latent) const;

  DType compute_;
  std::optional<ConvWeight> in_, out_;
  std::array<Stage, kStages> stages_;
};

}  // namespace longtake::wan
