// What a model with actions is given in the place of a prompt: the picture that the video begins
// with, and what is pressed.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "command_line.h"
#include "device/context.h"
#include "media/frame.h"
#include "models/wan/config.h"
#include "models/wan/model_files.h"
#include "pipeline/wan_actions.h"
#include "pipeline/wan_picture.h"

namespace longtake::cli {

class Game {
 public:
  static constexpr double kFramesPerSecond = 12;  // of the official videos

  // Checks flags and files. Throws Error.
  Game(const GenerateFlags& flags, const wan::ModelFiles& files,
       const wan::TransformerConfig& config);

  // Of the flags; 0: they say nothing, and there is a gentle way.
  int64_t num_actions() const { return num_actions_; }

  // Reads the picture, or a video's last frame, cut to width x height pixels at its middle.
  void read_picture(int64_t width, int64_t height);

  // Its tokens [T, text_dim] f32 on the CPU, where the encoder runs and is gone afterwards.
  Tensor encode_picture(DType compute, int threads) const;

  // Before the first chunk.
  void begin(Context& ctx, DType compute, const wan::Controls& controls);

  // What the chunk at latent frame `first_frame` is made under.
  void fill(Context& ctx, int64_t first_frame, wan::Controls& controls);

 private:
  View picture() const {
    return {const_cast<uint8_t*>(picture_.rgb.data()),
            DType::kU8,
            Device{},
            {picture_.height, picture_.width, 3}};
  }

  std::string init_;
  wan::ModelFiles files_;
  wan::TransformerConfig config_;
  ActionRows rows_;
  int64_t num_actions_ = 0;
  Frame picture_;
  std::optional<ActionWindows> windows_;
  std::optional<PictureLatents> latents_;
};

}  // namespace longtake::cli
