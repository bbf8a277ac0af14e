// One chunk of a rollout: noise becomes a clean latent frame, and the frame is remembered.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "device/context.h"
#include "models/world/model.h"
#include "pipeline/method.h"
#include "pipeline/step_cache.h"

namespace longtake {

class Rollout {
 public:
  // text [T, dim] f32: the encoded prompt, on ctx's device. The full history reserves memory for
  // expected_frames.
  Rollout(Context& ctx, const world::Model& model, View text, const Method& method,
          int64_t expected_frames);
  Rollout(const Rollout&) = delete;
  Rollout& operator=(const Rollout&) = delete;

  // Everything below is about this frame, seen from (x, y): the view's top-left in world pixels. On
  // CUDA the latest frame must have been finished (Context::synchronize). True: a cache lies
  // elsewhere now, and what was recorded (Graph) of denoise() and remember() is void.
  bool begin_frame(Context& ctx, int64_t frame, int64_t x, int64_t y);

  // z [C, h, w] f32 receives the clean latent made from the frame's own noise.
  void denoise(Context& ctx, uint64_t seed, View z, PassObserver* observer = nullptr);

  // The clean pass: the frame's keys and values join every layer's history.
  void remember(Context& ctx, View z, PassObserver* observer = nullptr);

  // Whether denoise() and remember() may be recorded: the host decides nothing between the steps.
  bool is_replayable() const { return step_cache_ == nullptr; }

  // One velocity estimate at sampling step `step` (frame_steps(): the clean level); for tests.
  void velocity(Context& ctx, int64_t step, View z, View out, PassObserver* observer = nullptr);

  void set_text(Context& ctx, View text);

  // Selects as `method` says from here on; the history stays as it is, and with it the policy.
  void set_selection(Context& ctx, const Method& method);

  // For measurements: frames that have a history take so many sampling steps from here on, and
  // their steps ask `reuse` instead of the method's step cache (null: no more).
  void measure_steps(Context& ctx, int64_t num_steps, world::LayerReuse* reuse);

  // The method as it is played: steps and dense parts are named.
  const Method& method() const { return method_; }

  // Sampling steps of a frame that has a history.
  int64_t num_steps() const { return usual_.num_steps(); }

  // Of the frame in work: without a history there may be more.
  int64_t frame_steps() const { return schedule_->num_steps(); }

  // The sampling step in work; frame_steps(): the clean pass.
  int64_t step() const { return step_; }

  // The frame's last sampling step that is sparse; without one the last of all.
  int64_t last_sparse_step() const;

  std::span<const LayerState> layers() const { return layers_; }

  // Gives away what the layers remember; the rollout is over.
  std::vector<std::unique_ptr<KvCache>> take_caches();

  // Query-key pairs of self attention at the sampling steps of the latest frame, over those of
  // dense attention over the whole history.
  double density() const;

  // Sampling steps of the latest frame that ran the layers.
  int64_t steps_run() const { return dense_steps_run_ + sparse_steps_run_; }

 private:
  // The noise levels of a frame's steps, from 1 (noise) to 0 (clean).
  struct Schedule {
    std::vector<double> noise_levels;
    std::vector<world::Level> levels;  // one per noise level

    int64_t num_steps() const { return static_cast<int64_t>(noise_levels.size()) - 1; }
  };

  Schedule make_schedule(Context& ctx, int64_t num_steps, double shift) const;

  bool is_sparse(int64_t step) const;

  world::Pass pass(int64_t step, PassObserver* observer);

  const world::Model& model_;
  Method method_;
  Schedule usual_, first_;              // of frames with a history, and without
  const Schedule* schedule_ = &usual_;  // of the frame in work
  world::Place place_;
  std::vector<LayerState> layers_;
  bool reads_all_ = false;                 // AnnSA would choose among too few keys
  std::unique_ptr<StepCache> step_cache_;  // null: every step is computed
  world::LayerReuse* measured_ = nullptr;  // takes its place
  Tensor velocity_, noise_;                // [C, h, w]
  Tensor clock_;                           // i64 [1]: the frame in work
  int64_t frame_ = 0, step_ = 0;
  int64_t dense_steps_run_ = 0, sparse_steps_run_ = 0;  // of the latest frame
};

}  // namespace longtake
