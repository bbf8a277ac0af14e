// Rollouts of the Wan family: noise becomes clean latents, chunk after chunk, and each chunk is
// remembered. ChunkRollout finishes one chunk before it begins the next (Self-Forcing,
// Causal-Forcing, LongLive, Matrix-Game 2); RollingRollout has several in work at once, each a step
// cleaner than the one behind it (Rolling-Forcing).
//
// On CUDA a pass is recorded and replayed (device/graph.h), one record for every kind of pass that
// comes again; noise and the steps between passes are a few launches beside them. Host and device
// meet when the caller synchronises, once a chunk.
#pragma once

#include <compare>
#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "device/context.h"
#include "device/graph.h"
#include "device/stage_clock.h"
#include "models/wan/schedule.h"
#include "models/wan/transformer.h"
#include "pipeline/method.h"

namespace longtake {

struct WanOptions {
  std::vector<int64_t> steps = {1000, 750, 500, 250};  // nominal timesteps, noise first
  float shift = wan::kShift;
  int64_t chunk_frames = 3;
  bool is_rolling = false;      // RollingRollout's models
  int64_t context_frames = 21;  // most frames that a pass reads, its own included
  int64_t sink_frames = 0;      // of them the first of the video
  bool moves_sink = false;      // the sink is read as if just before the window
  bool recaches = false;        // the newest frames are remembered again under another prompt ...
  bool keeps_sink = true;       // ... but for the sink; else frames of the new prompt are it
  // What is remembered and read; nullopt: own_method(). One with a window of its own takes the
  // place of sink_frames and context_frames, one with a number of steps that of `steps`.
  std::optional<Method> method;
  int64_t expected_frames = 0;    // the full history reserves memory for so many
  int64_t height = 0, width = 0;  // of a latent frame
  DType dtype = DType::kF32;      // of the cache: the transformer's compute dtype
};

// Options of the released models, without a size.
WanOptions self_forcing_options();
WanOptions longlive_options(bool infinite);
WanOptions rolling_forcing_options();
// With the size that they were trained at. context_frames: 6, or 4 of the model that drives.
WanOptions matrix_game_options(int64_t context_frames);

// The same by name: self-forcing, causal-forcing, causal-forcing-framewise, longlive,
// longlive-infinite, rolling-forcing, matrix-game-2, matrix-game-2-drive or matrix-game-2-run.
// Throws Error (kUsage) for another.
WanOptions options_of_family(const std::string& family);

// The method that a model was trained with, a window; and any other one, whose memory is by default
// as large: a preset and settings on top, as make_method takes them. Throws Error (kUsage), also
// for what these rollouts cannot play, or not on ctx's device.
Method own_method(const WanOptions& options);
Method choose_method(Context& ctx, const WanOptions& options, const wan::TransformerConfig& config,
                     const std::string& preset, const MethodSettings& settings);

ModelSizes model_sizes(const WanOptions& options, const wan::TransformerConfig& config);

// Which noise is wanted: what a chunk begins with (step 0), or what its estimate after step - 1 is
// noised with again.
struct NoiseDraw {
  int64_t first_frame;
  int64_t step;
};

// Fills out [F, C, H, W] f32, on the rollout's device, with normal numbers.
using NoiseSource = std::function<void(const NoiseDraw&, View out)>;

// Noise that a seed determines, whatever was drawn before. ctx must outlive it.
NoiseSource noise_of_seed(Context& ctx, uint64_t seed);

// What both kinds share: the layers' state, levels, rotations.
class WanRollout {
 public:
  virtual ~WanRollout() = default;
  WanRollout(const WanRollout&) = delete;
  WanRollout& operator=(const WanRollout&) = delete;

  // Frames finished so far.
  int64_t num_frames() const { return next_frame_; }

  std::span<const LayerState> layers() const { return layers_; }

  // The method as it is played: steps and dense parts are named.
  const Method& method() const { return *options_.method; }

  // Of a model with actions: what the next chunk is made under, for the caller to fill in. nullptr:
  // the model takes none.
  wan::Controls* controls() { return controls_ ? &*controls_ : nullptr; }

  // Sees every pass from then on, none of which is replayed; nullptr: nobody does.
  void observe(PassObserver* observer) { observer_ = observer; }

  // The next frames, as many as fit q and at most a chunk, are remembered by queries, keys and
  // values that the caller made, the same for all layers: for measurements behind a long history.
  // q, k, v [F S, N, D] in the cache's dtype, q and k rotated.
  void remember_keys(Context& ctx, View q, View k, View v);

  // latents [chunk_frames, C, H, W] f32 receives the next chunk.
  virtual void next_chunk(Context& ctx, const NoiseSource& noise, View latents) = 0;

  // Clean latents [F, C, H, W] that are to be continued: an image's or a video's.
  virtual void remember(Context& ctx, View latents) = 0;

  // What is made from here on follows another prompt, [T, text_dim] f32 on the CPU or on ctx's
  // device.
  virtual void switch_prompt(Context& ctx, View text) = 0;

  // Of the sampling passes since the last call: query-key pairs of self attention over those of
  // dense attention over all frames so far.
  double take_density();

  // Of the latest clean pass. On CUDA after Context::synchronize().
  double clean_ms() const { return clean_clock_.ms(0, 1); }

  // Throws Error if a clean pass met numbers that are not finite, naming layer and head. On CUDA
  // after Context::synchronize(); on the CPU the pass itself throws it.
  void expect_finite() const;

 protected:
  // text [T, text_dim] f32, on the CPU or on ctx's device.
  WanRollout(Context& ctx, const wan::Transformer& transformer, View text,
             const WanOptions& options);

  int64_t num_steps() const { return static_cast<int64_t>(timesteps_.size()); }

  // A list of `count` frames, all of one level; valid until the next call.
  std::span<const wan::Level* const> all_of(const wan::Level& level, int64_t count);

  void set_text(Context& ctx, View text);

  // Makes room for so many frames more, before anything of them is computed.
  void prepare(Context& ctx, int64_t num_frames);

  // What is recorded is void: pages lie elsewhere, or the prompt is another one.
  void forget_recordings(Context& ctx);

  // The pass of the frames from first_frame on whose levels are given.
  wan::Pass pass(Context& ctx, int64_t first_frame, std::span<const wan::Level* const> levels);

  // A sampling pass, counted: x, out [F, C, H, W], the same memory every time.
  void sample(Context& ctx, View x, const wan::Pass& pass, int64_t first_frame, View out);

  // A clean pass, timed; x as above.
  void commit(Context& ctx, View x, const wan::Pass& pass, ChunkPosition position);

  // Frames behind the sink that are remembered by a window, and where those of other policies would
  // begin.
  int64_t history_frames() const;

  const wan::Transformer& transformer_;
  WanOptions options_;
  wan::Schedule schedule_;
  std::vector<float> timesteps_;    // warped
  std::vector<wan::Level> levels_;  // of the timesteps; the last one is the clean level
  std::vector<const wan::Level*> frame_levels_;  // of the frames of a pass
  std::vector<LayerState> layers_;
  Tensor clock_;  // i64 [1]: the first frame of the chunk in work
  int64_t next_frame_ = 0;

 private:
  // What a record depends on: two passes of one kind differ only in what the device knows.
  struct PassKind {
    bool commits;
    int64_t num_frames;
    const wan::Level* first_level;
    HistoryReading::Sink sink;
    int64_t window_frames;

    auto operator<=>(const PassKind&) const = default;
  };

  void run(Context& ctx, bool commits, const wan::Pass& pass, const std::function<void()>& steps);

  // How often caches have moved what they hold.
  size_t count_moves() const;

  std::map<int64_t, RopeTable> ropes_;  // by number of frames
  std::optional<wan::Controls> controls_;
  std::map<PassKind, Graph> recordings_;
  size_t num_moves_ = 0;  // when the recordings were good
  StageClock clean_clock_;
  PassObserver* observer_ = nullptr;
  double pairs_read_ = 0, pairs_there_ = 0;
};

class ChunkRollout final : public WanRollout {
 public:
  // text [T, text_dim] f32.
  ChunkRollout(Context& ctx, const wan::Transformer& transformer, View text,
               const WanOptions& options);

  void next_chunk(Context& ctx, const NoiseSource& noise, View latents) override;
  void remember(Context& ctx, View latents) override;
  // A model that recaches computes what is remembered of the newest frames again.
  void switch_prompt(Context& ctx, View text) override;

 private:
  // The newest latents, oldest first: [n, C, H, W], n at most context_frames.
  View recent() const;
  void keep_recent(Context& ctx, View latents);
  // The first frames of chunk_ join the history.
  void remember_chunk(Context& ctx, int64_t num_frames);

  Tensor chunk_, flow_, noise_;  // [chunk_frames, C, H, W]
  Tensor recent_;  // of a model that recaches: [context_frames, C, H, W], used from the front
  int64_t num_recent_ = 0;
};

class RollingRollout final : public WanRollout {
 public:
  // text [T, text_dim] f32. num_chunks: length of the video, at least as many as there are steps;
  // 0: endless.
  RollingRollout(Context& ctx, const wan::Transformer& transformer, View text,
                 const WanOptions& options, int64_t num_chunks);

  // The first chunk takes a pass for every step, every other one pass.
  void next_chunk(Context& ctx, const NoiseSource& noise, View latents) override;
  // Only before the first chunk.
  void remember(Context& ctx, View latents) override;
  // Chunks in work go on under the new prompt.
  void switch_prompt(Context& ctx, View text) override;

 private:
  // One pass over all chunks in work; afterwards the first of them may be finished.
  void run_window(Context& ctx, const NoiseSource& noise);
  // The keys and values of the first frames of clean_ join the history.
  void remember_clean(Context& ctx, int64_t num_frames);

  // Of those in work, counted from the first that is not given.
  int64_t first_chunk() const { return (next_frame_ - given_frames_) / options_.chunk_frames; }

  View chunk(View frames, int64_t index) const {
    return frames.rows(index * options_.chunk_frames, (index + 1) * options_.chunk_frames);
  }

  int64_t num_chunks_;
  int64_t given_frames_ = 0;     // remembered before the first chunk
  int64_t window_ = 0;           // number of the next pass over all chunks in work
  Tensor noisy_, clean_, flow_;  // [steps * chunk_frames, C, H, W], oldest chunk first
  Tensor noise_;                 // [chunk_frames, C, H, W]
};

}  // namespace longtake
