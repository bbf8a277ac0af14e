// One scenario of a comparison: its plays, and the judgement of each against dense and the truth.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "models/world/model.h"
#include "pipeline/background.h"
#include "pipeline/comparison.h"
#include "pipeline/dense_history.h"
#include "pipeline/rollout.h"
#include "pipeline/truth.h"

namespace longtake {

// Of a method of which nothing is known yet.
MethodResult empty_row(const NamedMethod& named, const world::TransformerConfig& sizes,
                       int64_t num_frames);

// Methods but the first by whom they can share a history with in lock step: all that keep what
// dense attention keeps, then each of the others by itself.
std::vector<std::vector<size_t>> lockstep_groups(const std::vector<NamedMethod>& methods);

// Thrown out of a play that was asked to stop.
struct Stopped {};

class ScenarioRun {
 public:
  using FrameHook = std::function<void(const std::string& what, int64_t frame)>;

  // `film`: the plays write videos, if any are wanted. next_frame is called before every frame and
  // may throw. Plays leave their judgement to `background`. Everything is kept by reference.
  ScenarioRun(const world::Model& model, const Scenario& scenario,
              const std::vector<NamedMethod>& methods, const ComparisonOptions& options, bool film,
              FrameHook next_frame, Background& background);

  // The method plays freely. Several may at the same time, each with its own context.
  void play(Context& ctx, size_t method);

  // The methods of a group in lock step; after play(ctx, 0), and beside other plays if need be.
  void play_in_lockstep(Context& ctx, const std::vector<size_t>& group);

  // Everything was played: gives back what is not needed once it has been judged.
  void release();

  // What was measured, by method, once the background has finished: means of this scenario alone.
  // Medians are not among them.
  std::vector<MethodResult> rows() const;

  int64_t num_primed() const { return scenario_.num_primed; }

  // The chunks that a method made, by frame of the video from num_primed() on.
  const std::vector<ChunkStats>& chunks(size_t method) const { return chunks_[method]; }

  // Seconds of judgement, over all threads.
  double judged_s() const { return judged_s_; }

 private:
  using Frame = std::vector<uint8_t>;

  // What a play left behind.
  struct Recording {
    std::vector<Frame> frames;
    std::vector<Tensor> latents;     // kept of the dense run only
    std::vector<ChunkStats> chunks;  // of generated frames
  };

  // A frame that a method made in lock step.
  struct Probe {
    bool is_made = false;
    int64_t frame = 0;
    double relative_l2 = 0, density = 0, psnr = 0, ssim = 0;
    Frame rgb;
    std::vector<AttentionScore> layers, prompt_layers;
  };

  class Scorer;

  void render_truth();
  int64_t num_frames(size_t method) const;
  bool is_probed(int64_t frame) const;
  Recording record(Context& ctx, size_t method);
  void judge(size_t method, const Recording& own);
  void probe(Context& ctx, Rollout& rollout, const std::function<void(PassObserver*)>& denoise,
             bool score, View z, Probe& out);

  // In the background; the run stays whole until it has been done.
  void later(std::function<void()> job);
  void leave();

  size_t frame_bytes() const { return static_cast<size_t>(width_ * height_ * 3); }

  const world::Model& model_;
  const Scenario& scenario_;
  const std::vector<NamedMethod>& methods_;
  const ComparisonOptions& options_;
  bool film_;
  FrameHook next_frame_;
  Background& background_;
  int64_t width_, height_;
  Shape latent_;
  std::vector<MethodResult> rows_;  // without lock step
  std::vector<std::vector<ChunkStats>> chunks_;
  std::vector<std::vector<Probe>> probes_;  // by method, in the order of frames
  std::once_flag rendered_;
  std::vector<Frame> truth_;
  std::vector<std::vector<uint8_t>> seen_;
  std::vector<ReturnPair> pairs_;
  std::mutex mutex_;  // of the next two
  bool has_dense_ = false;
  // For the dense run, to be judged by it.
  std::vector<std::pair<size_t, std::shared_ptr<const Recording>>> waiting_;
  Recording dense_;
  std::unique_ptr<const DenseHistory> history_;  // of the dense run, where lock step needs it
  std::atomic<int64_t> users_ = 1;               // the plays, and every job of the background
  std::atomic<double> judged_s_ = 0;
};

}  // namespace longtake
