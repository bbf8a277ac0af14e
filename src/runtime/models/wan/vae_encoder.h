// The encoder of the Wan 2.1 VAE, streaming: a video's first frame is a latent, and so is every
// four frames behind it. Any split of a video into calls gives the same bits.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>

#include "device/context.h"
#include "models/wan/vae.h"
#include "nn/weight_table.h"

namespace longtake::wan {

// Half as large; a temporal one makes one frame of every two, but keeps a video's first one.
struct VaeDownsample {
  std::optional<ConvWeight> conv;       // stride 2, zeros at the right and the bottom only
  std::optional<ConvWeight> time_conv;  // none: space only

  struct State {
    Tensor zeros;                   // that images are padded with
    std::array<Tensor, 2> waiting;  // smaller frames, the oldest of the next three
    int64_t num_waiting = 0;
    bool has_begun = false;
  };

  void list(WeightTable& table, const std::string& name, int64_t channels, bool is_temporal,
            DType compute);
  // x [H, W, C] f32, H and W even; calls next(frame [H / 2, W / 2, C] f32) once or not at all.
  void forward(Context& ctx, View x, State& state, const FrameSink& next) const;
};

class VaeEncoder {
 public:
  static constexpr int64_t kLatentChannels = 16;

  // `dim`: as the decoder's. compute: f32 | bf16. The file's decoder is passed over.
  VaeEncoder(int64_t dim, DType compute, WeightTable& table);

  static constexpr size_t kGroups = 4;  // of blocks, each followed by a downsampling but the last
  static constexpr size_t kGroupBlocks = 2;

  // Of one video; as it is made, nothing has been encoded.
  struct State {
    FrameHistory in, out;
    std::array<VaeResidual::State, 2> middle;
    std::array<std::array<VaeResidual::State, kGroupBlocks>, kGroups> blocks;
    std::array<VaeDownsample::State, kGroups - 1> downsamples;
  };

  // rgb [8 h, 8 w, 3] f32 in [-1, 1] -> latents [16, h, w] f32, normalised as the transformer takes
  // them: one after a video's first frame, and one after every fourth frame from there.
  void encode(Context& ctx, View rgb, State& state, const FrameSink& latent) const;

 private:
  // Everything from group `index` on, for one frame x [H, W, C] f32.
  void run_group(Context& ctx, size_t index, View x, State& state, const FrameSink& latent) const;

  DType compute_;
  CausalConv in_, out_;
  std::array<std::array<VaeResidual, kGroupBlocks>, kGroups> blocks_;
  std::array<VaeDownsample, kGroups - 1> downsamples_;
  VaeResidual middle1_, middle2_;
  VaeAttention attention_;
  Tensor head_norm_, latent_mean_, latent_std_;
  std::optional<ConvWeight> conv1_;  // 1 x 1, behind the encoder proper: means, then variances
};

}  // namespace longtake::wan
