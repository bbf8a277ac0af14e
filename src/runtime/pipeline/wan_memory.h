// What playing a model of the Wan family will take, from its files' headers and the options alone:
// a run that cannot fit is refused before anything slow begins.
#pragma once

#include <cstddef>

#include "device/device.h"
#include "io/checkpoint.h"
#include "models/wan/decoder.h"
#include "pipeline/wan_rollout.h"

namespace longtake {

struct WanMemory {
  double weights = 0;  // of transformer and decoder
  double cache = 0;    // of all layers
  double work = 0;     // temporaries of a pass or a decoded frame, whichever is larger
  double stream = 0;   // what the decoder keeps from frame to frame

  size_t total() const { return static_cast<size_t>(weights + cache + work + stream); }
};

// An estimate of what the device must hold, meant to be a little too high; tile as for
// open_decoder. Throws Error (kInput).
WanMemory memory_to_play(const WanOptions& options, const wan::TransformerConfig& config,
                         const Checkpoint& decoder, wan::DecoderKind kind, Device device,
                         int64_t tile = 0);

// Adds what the encoder of a model's first picture needs while the video begins; vae: its file.
void add_picture_encoder(const WanOptions& options, const Checkpoint& vae, WanMemory& memory);

// Of the text encoder, which is gone before the transformer comes.
size_t memory_to_encode(const Checkpoint& text_encoder, DType compute);

// The same of the image encoder.
size_t memory_to_encode_image(const Checkpoint& image_encoder, DType compute);

// Memory that the system or the GPU could give this process now; what cannot be found out is no
// limit.
size_t free_memory_bytes(Device device);

}  // namespace longtake
