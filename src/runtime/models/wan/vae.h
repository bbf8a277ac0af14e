// The decoder of the Wan 2.1 VAE, streaming: every convolution over time looks back only, so each
// frame goes through alone and what it must know of the past lies in the state. Any split of a
// video into calls gives the same bits.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "device/context.h"
#include "io/checkpoint.h"
#include "models/wan/taehv.h"
#include "nn/weight_table.h"
#include "ops/conv.h"

namespace longtake::wan {

// Per-channel scale of the latents: z = normalised * kLatentStd + kLatentMean.
inline constexpr std::array<float, 16> kLatentMean = {
    -0.7571F, -0.7089F, -0.9113F, 0.1075F,  -0.1745F, 0.9653F,  -0.1517F, 1.5508F,
    0.4134F,  -0.0715F, 0.5517F,  -0.3632F, -0.1922F, -0.9497F, 0.2503F,  -0.2921F};
inline constexpr std::array<float, 16> kLatentStd = {
    2.8184F, 1.4541F, 2.3275F, 2.6558F, 1.2196F, 1.7708F, 2.6052F, 2.0743F,
    3.2687F, 2.1526F, 2.8652F, 1.5579F, 1.6382F, 1.1253F, 2.8251F, 1.9160F};

// The last two frames [H, W, C] that a convolution over time took; empty before the first: zeros.
using FrameHistory = std::array<Tensor, 2>;

// 3 frames x k x k, looking back: the channels of the frame and of the two before it go into one
// 2-D convolution.
struct CausalConv {
  std::optional<ConvWeight> weight;

  void list(WeightTable& table, const std::string& name, int64_t out, int64_t in, int64_t kernel,
            DType compute);
  // x [H, W, in] in the compute dtype -> [H, W, out] of `dtype` in the workspace; joins `history`.
  View forward(Context& ctx, View x, FrameHistory& history, DType dtype) const;
};

// x + conv(silu(norm(conv(silu(norm(x)))))); x through a 1 x 1 convolution if the widths differ.
struct VaeResidual {
  Tensor norm1, norm2;
  CausalConv conv1, conv2;
  std::optional<ConvWeight> shortcut;

  using State = std::array<FrameHistory, 2>;

  void list(WeightTable& table, const std::string& name, int64_t out, int64_t in, DType compute);
  // x [H, W, in] f32 -> [H, W, out] f32 in the workspace.
  View forward(Context& ctx, View x, State& state) const;
};

// x + attention of all pixels of the frame to each other, one head as wide as the image.
struct VaeAttention {
  Tensor norm;
  std::optional<ConvWeight> to_qkv, proj;

  void list(WeightTable& table, const std::string& name, int64_t channels, DType compute);
  void forward(Context& ctx, View x) const;  // x [H, W, C] f32, in place
};

// Twice as large, half as many channels; of a temporal one every frame but a video's first becomes
// two.
struct VaeUpsample {
  CausalConv time_conv;  // without weight: space only
  std::optional<ConvWeight> conv;

  struct State {
    FrameHistory history;
    bool has_begun = false;
  };

  void list(WeightTable& table, const std::string& name, int64_t channels, bool is_temporal,
            DType compute);
  // x [H, W, C] f32; calls next(frame [2 H, 2 W, C / 2] f32) once or twice.
  void forward(Context& ctx, View x, State& state, const FrameSink& next) const;
};

class VaeDecoder {
 public:
  static constexpr int64_t kLatentChannels = 16;

  // `dim`: channels at full size, 96 in the released model; vae_dim tells it. compute: f32 | bf16.
  // The file's encoder is passed over.
  VaeDecoder(int64_t dim, DType compute, WeightTable& table);

  static constexpr size_t kGroups = 4;  // of blocks, each followed by an upsampling but the last
  static constexpr size_t kGroupBlocks = 3;

  // Of one video; as it is made, nothing has been decoded.
  struct State {
    FrameHistory in, out;
    std::array<VaeResidual::State, 2> middle;
    std::array<std::array<VaeResidual::State, kGroupBlocks>, kGroups> blocks;
    std::array<VaeUpsample::State, kGroups - 1> upsamples;
  };

  // z [16, h, w] f32, normalised as the transformer makes it -> frames [8 h, 8 w, 3] f32, about
  // [-1, 1], not clamped: one of the first latent, four of every other.
  void decode(Context& ctx, View z, State& state, const FrameSink& sink) const;

 private:
  // Everything from group `index` on, for one frame x [H, W, C] f32.
  void run_group(Context& ctx, size_t index, View x, State& state, const FrameSink& sink) const;

  DType compute_;
  Tensor latent_mean_, latent_std_;
  std::optional<ConvWeight> conv2_;  // 1 x 1, before the decoder proper
  CausalConv in_, out_;
  VaeResidual middle1_, middle2_;
  VaeAttention attention_;
  std::array<std::array<VaeResidual, kGroupBlocks>, kGroups> blocks_;
  std::array<VaeUpsample, kGroups - 1> upsamples_;
  Tensor head_norm_;
};

// silu(norm(x)) of [H, W, C] f32 by the VAE's norm over channels, in `dtype`, in the workspace.
View norm_silu(Context& ctx, View x, const Tensor& gamma, DType dtype);

// The `dim` of a file's decoder. Throws Error (kInput) when it is no Wan VAE.
int64_t vae_dim(const Checkpoint& file);

}  // namespace longtake::wan
