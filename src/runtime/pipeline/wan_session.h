// WanSession: one video of a model of the Wan family, from encoded prompts to pictures. It owns the
// rollout, the latents and the place in the video.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>

#include "device/context.h"
#include "device/stage_clock.h"
#include "models/wan/decoder.h"
#include "models/wan/transformer.h"
#include "pipeline/stats.h"
#include "pipeline/wan_rollout.h"

namespace longtake {

struct WanSessionOptions {
  WanOptions rollout;
  uint64_t seed = 0;
  int64_t num_chunks = 0;  // to be made; 0: endless. A rolling rollout ends better if it knows

  // Called before a chunk is begun, with the number of its first frame: the place to switch prompts
  // and to set what it is made under. False: there is none to be made. With it a session on CUDA
  // makes the next chunk while the pictures of one are decoded and handed out.
  std::function<bool(int64_t first_frame)> before_chunk;
};

class WanSession {
 public:
  // text [T, text_dim] f32: the encoded prompt, on the CPU or on ctx's device. ctx, transformer and
  // decoder must outlive the session; the decoder begins a video. Throws Error (kUsage).
  WanSession(Context& ctx, const wan::Transformer& transformer, wan::Decoder& decoder, View text,
             const WanSessionOptions& options);

  // Makes the next chunk; rgb receives its frames [H, W, 3] u8, one call each: 1 + 4 (n - 1) of a
  // video's first n latents, 4 n of every other. What it cost is in last_chunk().
  void next_chunk(const wan::FrameSink& rgb);

  // What is begun from here on follows another prompt, [T, text_dim] f32.
  void switch_prompt(View text) { rollout_->switch_prompt(ctx_, text); }

  // Latents [F, 16, h, w] f32 that are to be continued, before the first chunk: only remembered.
  // Their pictures are not handed out.
  void remember(View latents);

  // Frames handed out so far.
  int64_t num_frames() const { return num_frames_; }

  // The latest chunk that was handed out, [chunk_frames, 16, h, w] f32.
  View latents() const { return latents_[1 - next_]; }

  const WanRollout& rollout() const { return *rollout_; }

  // WanRollout::controls().
  wan::Controls* controls() { return rollout_->controls(); }

  const ChunkStats& last_chunk() const { return last_chunk_; }

  // Of the context, and of the one that decodes beside it.
  size_t workspace_bytes() const {
    return ctx_.workspace().bytes_reserved() +
           (beside_ ? beside_->workspace().bytes_reserved() : 0);
  }

  // Sees every pass from then on; nullptr: none.
  void observe(PassObserver* observer) { rollout_->observe(observer); }

 private:
  // Begins the chunk whose first frame that is; false: there is none.
  bool begin_chunk(int64_t first_frame);

  // Pictures of a chunk, one latent after the other, or all while the next chunk is made.
  void decode(View made, const wan::FrameSink& rgb);
  void decode_beside_next(View made, const wan::FrameSink& rgb);
  void describe_caches();

  // Where decoding runs: beside the rollout, if there is a stream for it.
  Context& decoding() { return beside_ ? *beside_ : ctx_; }

  Context& ctx_;
  std::optional<Context> beside_;
  wan::Decoder& decoder_;
  std::function<bool(int64_t)> before_chunk_;
  std::unique_ptr<WanRollout> rollout_;
  NoiseSource noise_;
  Tensor latents_[2];  // of the chunk that is handed out, and of the next
  int next_ = 0;       // where the next chunk goes
  bool is_begun_ = false;
  StageClock clock_, decode_clock_;
  int64_t num_frames_ = 0;
  ChunkStats last_chunk_;
  double commit_ms_ = 0, select_ms_ = 0;  // of all layers so far
};

}  // namespace longtake
