// Rollouts of the Wan family: noise becomes clean latents, chunk after chunk, and each chunk is
// remembered. ChunkRollout finishes one chunk before it begins the next (Self-Forcing,
// Causal-Forcing, LongLive); RollingRollout has several in work at once, each a step cleaner than
// the one behind it (Rolling-Forcing).
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <span>
#include <vector>

#include "device/context.h"
#include "models/wan/schedule.h"
#include "models/wan/transformer.h"

namespace longtake {

struct WanOptions {
  std::vector<int64_t> steps = {1000, 750, 500, 250};  // nominal timesteps, noise first
  float shift = wan::kShift;
  int64_t chunk_frames = 3;
  int64_t context_frames = 21;  // most frames that a pass reads, its own included
  int64_t sink_frames = 0;      // of them the first of the video
  bool moves_sink = false;      // the sink is read as if just before the window
  bool keeps_sink = true;       // ... when the prompt changes; else frames of the new prompt are it
  std::string memory = "window";
  int64_t height = 0, width = 0;  // of a latent frame
  DType dtype = DType::kF32;      // of the cache: the transformer's compute dtype
};

// Options of the released models, sizes apart.
WanOptions self_forcing_options();
WanOptions longlive_options(bool infinite);
WanOptions rolling_forcing_options();

// Which noise is wanted: what a chunk begins with (step 0), or what its estimate after step - 1 is
// noised with again.
struct NoiseDraw {
  int64_t first_frame;
  int64_t step;
};

// Fills out [F, C, H, W] f32 with normal numbers.
using NoiseSource = std::function<void(const NoiseDraw&, View out)>;

// Noise that a seed determines, whatever was drawn before.
NoiseSource noise_of_seed(uint64_t seed);

// What both kinds share: the layers' state, levels, rotations.
class WanRollout {
 public:
  virtual ~WanRollout() = default;
  WanRollout(const WanRollout&) = delete;
  WanRollout& operator=(const WanRollout&) = delete;

  // Frames finished so far.
  int64_t num_frames() const { return next_frame_; }

  std::span<const LayerState> layers() const { return layers_; }

  // Sees every pass from then on; nullptr: none.
  void observe(PassObserver* observer) { observer_ = observer; }

 protected:
  // text [T, text_dim] f32; window_frames: history kept behind the sink.
  WanRollout(Context& ctx, const wan::Transformer& transformer, View text,
             const WanOptions& options, int64_t window_frames);

  int64_t num_steps() const { return static_cast<int64_t>(timesteps_.size()); }

  // A list of `count` frames, all of one level; valid until the next call.
  std::span<const wan::Level* const> all_of(const wan::Level& level, int64_t count);

  // The pass of the frames from first_frame on whose levels are given.
  wan::Pass pass(Context& ctx, int64_t first_frame, std::span<const wan::Level* const> levels);

  const wan::Transformer& transformer_;
  WanOptions options_;
  wan::Schedule schedule_;
  std::vector<float> timesteps_;    // warped
  std::vector<wan::Level> levels_;  // of the timesteps; the last one is the clean level
  std::vector<const wan::Level*> frame_levels_;  // of the frames of a pass
  std::vector<LayerState> layers_;
  int64_t next_frame_ = 0;

 private:
  std::map<int64_t, RopeTable> ropes_;  // by number of frames
  Tensor clock_;                        // i64 [1]: the first frame of the pass in work
  PassObserver* observer_ = nullptr;
};

class ChunkRollout final : public WanRollout {
 public:
  // text [T, text_dim] f32.
  ChunkRollout(Context& ctx, const wan::Transformer& transformer, View text,
               const WanOptions& options);

  // latents [chunk_frames, C, H, W] f32 receives the next chunk.
  void next_chunk(Context& ctx, const NoiseSource& noise, View latents);

  // Clean latents [F, C, H, W] that are to be continued: an image's or a video's.
  void remember(Context& ctx, View latents);

  // The chunks to come follow another prompt: what is remembered of the newest frames is computed
  // again under it.
  void switch_prompt(Context& ctx, View text);

 private:
  // The newest latents, oldest first: [n, C, H, W], n at most context_frames.
  View recent() const;
  void keep_recent(View latents);

  Tensor flow_, noise_;  // [chunk_frames, C, H, W]
  Tensor recent_;        // [context_frames, C, H, W], used from the front
  int64_t num_recent_ = 0;
};

class RollingRollout final : public WanRollout {
 public:
  // text [T, text_dim] f32. num_chunks: length of the video, at least as many as there are steps;
  // 0: endless.
  RollingRollout(Context& ctx, const wan::Transformer& transformer, View text,
                 const WanOptions& options, int64_t num_chunks);

  // latents [chunk_frames, C, H, W] f32 receives the next chunk; the first takes a pass for every
  // step, every other one pass.
  void next_chunk(Context& ctx, const NoiseSource& noise, View latents);

 private:
  // One pass over all chunks in work; afterwards the first of them may be finished.
  void run_window(Context& ctx, const NoiseSource& noise);
  // The finished chunk's keys and values join the history.
  void remember_first(Context& ctx, View latents);

  View chunk(View frames, int64_t index) const {
    return frames.rows(index * options_.chunk_frames, (index + 1) * options_.chunk_frames);
  }

  int64_t num_chunks_;
  int64_t window_ = 0;           // number of the next pass over all chunks in work
  Tensor noisy_, clean_, flow_;  // [steps * chunk_frames, C, H, W], oldest chunk first
  Tensor noise_;                 // [chunk_frames, C, H, W]
};

}  // namespace longtake
