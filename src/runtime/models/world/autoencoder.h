// Frames to latents and back: convolutions over channels-last images, one frame at a time, no
// state.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "device/context.h"
#include "models/world/config.h"
#include "nn/weight_table.h"
#include "ops/conv.h"

namespace longtake::world {

class Autoencoder {
 public:
  Autoencoder(const AutoencoderConfig& config, DType compute, WeightTable& table);

  // z [C, h, w] f32, normalised latents -> pixels [8 h, 8 w, 3] f32, about [-1, 1], not clamped.
  void decode(Context& ctx, View z, View pixels) const;

  // pixels [8 h, 8 w, 3] f32 in [-1, 1] -> z [C, h, w] f32.
  void encode(Context& ctx, View pixels, View z) const;

  // x + conv2(silu(norm2(conv1(silu(norm1(x))))))
  struct Residual {
    Tensor norm1, norm2;
    std::optional<ConvWeight> conv1, conv2;

    void list(WeightTable& table, const std::string& name, int64_t channels, DType compute);
    void forward(Context& ctx, View x) const;  // x [H, W, C] f32, in place
  };

 private:
  DType compute_;
  Tensor mean_, std_;  // of the latents, [C]

  struct {
    std::optional<ConvWeight> in, down1, down2, out;
    Residual res1, res2a, res2b, res3a, res3b;
    Tensor norm;
  } encoder_;

  struct {
    std::optional<ConvWeight> in, up1, up2, out;
    Residual res1a, res1b, res2a, res2b, res3;
    Tensor norm;
  } decoder_;
};

}  // namespace longtake::world
