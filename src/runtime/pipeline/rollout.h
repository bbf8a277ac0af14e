// One chunk of a rollout: noise becomes a clean latent frame, and the frame is remembered.
#pragma once

#include <cstdint>
#include <vector>

#include "device/context.h"
#include "kv/cache.h"
#include "models/world/model.h"

namespace longtake {

class Rollout {
 public:
  // text [T, dim] f32: the encoded prompt. memory: policy and sizes of the caches; what follows
  // from the model is filled in. num_steps: sampling steps, 0 for the model's own.
  Rollout(Context& ctx, const world::Model& model, View text, CacheOptions memory,
          int64_t num_steps);

  // Everything below is about this frame, seen from (x, y): the view's top-left in world pixels.
  void begin_frame(Context& ctx, int64_t frame, int64_t x, int64_t y);

  // z [C, h, w] f32 receives the clean latent made from the frame's own noise.
  void denoise(Context& ctx, uint64_t seed, View z, const world::LayerObserver& observer = nullptr);

  // The clean pass: the frame's keys and values join every layer's history.
  void remember(Context& ctx, View z, const world::LayerObserver& observer = nullptr);

  // One velocity estimate at sampling step `step` (num_steps(): the clean level); for tests.
  void velocity(Context& ctx, int64_t step, View z, View out,
                const world::LayerObserver& observer = nullptr);

  void set_text(Context& ctx, View text);

  int64_t num_steps() const { return static_cast<int64_t>(noise_levels_.size()) - 1; }

  const world::Caches& caches() const { return caches_; }

  // Keys that a query of the frame in work sees, over those of the whole history and the frame.
  double density() const;

 private:
  const world::Model& model_;
  std::vector<double> noise_levels_;
  std::vector<world::Level> levels_;  // one per noise level
  world::TextKeys text_;
  world::Place place_;
  world::Caches caches_;
  Tensor velocity_, noise_;  // [C, h, w]
  int64_t frame_ = 0;
};

}  // namespace longtake
