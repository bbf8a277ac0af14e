// The image encoder of Wan's image-to-video models: the visual half of an open CLIP, ViT-H/14
// (Radford et al. 2021), whose last layer but one says what a picture shows. For one picture a
// video, on the CPU.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "device/context.h"
#include "io/checkpoint.h"
#include "nn/feed_forward.h"
#include "nn/weight_table.h"

namespace longtake::wan {

inline constexpr int64_t kImageHeadDim = 80;  // of the released encoder

struct ImageEncoderConfig {
  int64_t dim = 0;
  int64_t ffn_dim = 0;
  int64_t num_layers = 0;  // those that run: all of the file's but the last
  int64_t patch = 0;       // pixels of a token's side
  int64_t side = 0;        // tokens of the picture's side

  int64_t pixels() const { return side * patch; }

  int64_t num_tokens() const { return 1 + side * side; }  // the first one is the picture's own
};

// The configuration that a file's tensors imply. Throws Error (kInput) when it is no such encoder.
ImageEncoderConfig image_encoder_config(const Checkpoint& file);

class ImageEncoder {
 public:
  // compute: f32 | bf16.
  ImageEncoder(const ImageEncoderConfig& config, DType compute, WeightTable& table);

  const ImageEncoderConfig& config() const { return config_; }

  // rgb [H, W, 3] u8 -> tokens [num_tokens, dim] f32. The picture is scaled to a square, by bicubic
  // interpolation without smoothing, as the released code does it.
  Tensor encode(Context& ctx, View rgb) const;

 private:
  struct Layer {
    Tensor norm1_weight, norm1_bias, norm2_weight, norm2_bias;
    std::optional<LinearWeight> qkv, out;
    FeedForward mlp;
  };

  void attend(Context& ctx, const Layer& layer, View h, View out) const;

  ImageEncoderConfig config_;
  DType compute_;
  std::optional<LinearWeight> patch_embedding_;
  Tensor own_token_, positions_, norm_weight_, norm_bias_;
  std::vector<Layer> layers_;
};

// A picture [H, W, 3] u8 as [side, side, 3] f32 in 0..255: bicubic (a = -0.75), no smoothing, edges
// repeated, pixel centres in step.
std::vector<float> scaled_bicubic(View rgb, int64_t side);

}  // namespace longtake::wan
