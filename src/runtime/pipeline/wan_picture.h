// The picture that a Matrix-Game 2 video begins with, as every chunk is shown it: the latents of a
// video whose first frame it is and whose others are grey, and a mask that says so.
#pragma once

#include <cstdint>
#include <memory>

#include "device/context.h"
#include "models/wan/action_module.h"
#include "models/wan/vae_encoder.h"

namespace longtake {

// From this latent frame on the latents of grey frames no longer change: the encoder looks back no
// further (18 frames at full rate, 8 pairs, 18 fours, and those that the two halvings take).
inline constexpr int64_t kPictureLatents = 32;

class PictureLatents {
 public:
  // rgb [H, W, 3] u8 on the CPU. ctx must be that of every call of fill(), controls of its shape.
  PictureLatents(Context& ctx, wan::VaeEncoder encoder, View rgb, const wan::Controls& controls);

  // controls.image of the frames from first_frame on, which no call may be before those of an
  // earlier one. What a chunk needs is encoded when its turn comes, until nothing changes any more.
  void fill(Context& ctx, int64_t first_frame, wan::Controls& controls);

 private:
  void encode_next(Context& ctx);

  // What encoding needs; gone when it is done.
  struct Work {
    wan::VaeEncoder encoder;
    wan::VaeEncoder::State state;
    Tensor picture;  // [H, W, 3] f32 in [-1, 1], then grey
  };

  std::unique_ptr<Work> work_;
  Tensor latent_;            // [16, h, w] f32, the newest
  int64_t num_latents_ = 0;  // encoded so far
  Tensor ones_, zeros_;      // [masks, h, w] f32: of the first latent frame, and of the others
};

}  // namespace longtake
