// One scenario of a comparison: its plays, and the judgement of each against dense and the truth.
#pragma once

#include <cstdint>
#include <functional>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "models/world/model.h"
#include "pipeline/comparison.h"
#include "pipeline/rollout.h"
#include "pipeline/truth.h"

namespace longtake {

// Of a method of which nothing is known yet.
MethodResult empty_row(const NamedMethod& named, const world::TransformerConfig& sizes,
                       int64_t num_frames);

// Thrown out of a play that was asked to stop.
struct Stopped {};

class ScenarioRun {
 public:
  using FrameHook = std::function<void(const std::string& what, int64_t frame)>;

  // `film`: the plays write videos, if any are wanted. next_frame is called before every frame and
  // may throw. Everything is kept by reference.
  ScenarioRun(const world::Model& model, const Scenario& scenario,
              const std::vector<NamedMethod>& methods, const ComparisonOptions& options, bool film,
              FrameHook next_frame);

  // The method plays freely. Several may at the same time, each with its own context.
  void play(Context& ctx, size_t method);

  // All methods in lock step; after play(ctx, 0), and beside other plays if need be.
  void play_in_lockstep(Context& ctx);

  // Gives back what is not needed once everything was played.
  void release();

  // What was measured, by method: means of this scenario alone. Medians are not among them.
  const std::vector<MethodResult>& rows() const { return rows_; }

  int64_t num_primed() const { return scenario_.num_primed; }

  // The chunks that a method made, by frame of the video from num_primed() on.
  const std::vector<ChunkStats>& chunks(size_t method) const { return chunks_[method]; }

 private:
  using Frame = std::vector<uint8_t>;

  // What a play left behind.
  struct Recording {
    std::vector<Frame> frames;
    std::vector<Tensor> latents;     // kept of the dense run only
    std::vector<ChunkStats> chunks;  // of generated frames
  };

  class Scorer;

  void render_truth();
  int64_t num_frames(size_t method) const;
  Recording record(Context& ctx, size_t method);
  void judge(size_t method, const Recording& own);
  void probe(Context& ctx, size_t method, Rollout& rollout, const Rollout& dense, int64_t frame,
             bool score, View z);

  size_t frame_bytes() const { return static_cast<size_t>(width_ * height_ * 3); }

  const world::Model& model_;
  const Scenario& scenario_;
  const std::vector<NamedMethod>& methods_;
  const ComparisonOptions& options_;
  bool film_;
  FrameHook next_frame_;
  int64_t width_, height_;
  Shape latent_;
  std::vector<MethodResult> rows_;
  std::vector<std::vector<ChunkStats>> chunks_;
  std::once_flag rendered_;
  std::vector<Frame> truth_;
  std::vector<std::vector<uint8_t>> seen_;
  std::vector<ReturnPair> pairs_;
  std::mutex mutex_;  // of the next two
  bool has_dense_ = false;
  std::vector<std::pair<size_t, Recording>> waiting_;  // for the dense run, to be judged by it
  Recording dense_;
};

}  // namespace longtake
