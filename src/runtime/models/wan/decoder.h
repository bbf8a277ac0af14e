// Either of the two coders as a stream of one video: latents in, pictures out, and back.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "device/context.h"
#include "io/checkpoint.h"
#include "models/wan/taehv.h"

namespace longtake::wan {

inline constexpr int64_t kLatentPixels = 8;     // one latent covers 8 x 8 pixels
inline constexpr int64_t kFramesPerLatent = 4;  // but the first latent of a video is one frame
inline constexpr double kFramesPerSecond = 16;

// Frames that so many first latents of a video are, and the latents that so many frames need.
inline constexpr int64_t frames_of_latents(int64_t latents) {
  return latents == 0 ? 0 : 1 + kFramesPerLatent * (latents - 1);
}

inline constexpr int64_t latents_of_frames(int64_t frames) {
  return frames == 0 ? 0 : 1 + (frames - 1 + kFramesPerLatent - 1) / kFramesPerLatent;
}

enum class DecoderKind : uint8_t { kVae, kTaehv };

class Decoder {
 public:
  virtual ~Decoder() = default;

  // z [16, h, w] f32, the next latent. On CUDA its frames are on their way when the call returns
  // (what a latent is decoded by is recorded once, device/graph.h). Returns how many there will be.
  virtual int64_t begin(Context& ctx, View z) = 0;

  // Waits, and hands out the frames [8 h, 8 w, 3] u8 of all latents begun since the last call, on
  // the CPU, one call each.
  virtual void finish(Context& ctx, const FrameSink& rgb) = 0;

  void decode(Context& ctx, View z, const FrameSink& rgb) {
    begin(ctx, z);
    finish(ctx, rgb);
  }
};

// Along one axis of a picture, in latents: tiles of `size`, which overlap by a quarter at least.
struct TileAxis {
  int64_t size = 0;
  std::vector<int64_t> begins;
};

// tile 0, or as large as the picture: one tile.
TileAxis tiles_along(int64_t latents, int64_t tile);

// compute: f32 | bf16; bytes, if not null, receives what the weights take. tile, in latents: with
// it a picture is decoded in squares that overlap and are blended (linear ramps over what they
// share), so that temporaries are those of a square; attention and what lies near a border see
// their own square only. Throws Error (kInput).
std::unique_ptr<Decoder> open_decoder(Context& ctx, const Checkpoint& file, DecoderKind kind,
                                      DType compute, size_t* bytes = nullptr, int64_t tile = 0);

class Encoder {
 public:
  virtual ~Encoder() = default;

  // rgb [8 h, 8 w, 3] u8, the video's next frame, on the CPU or on ctx's device; latent receives
  // every latent [16, h, w] f32 that is complete by then, on ctx's device.
  virtual void encode(Context& ctx, View rgb, const FrameSink& latent) = 0;

  // The video ends. Of frames that are too few for a latent the VAE makes none, as the official
  // code, and TAEHV one by repeating the last.
  virtual void finish(Context& ctx, const FrameSink& latent) = 0;
};

// Throws Error (kInput).
std::unique_ptr<Encoder> open_encoder(Context& ctx, const Checkpoint& file, DecoderKind kind,
                                      DType compute);

}  // namespace longtake::wan
