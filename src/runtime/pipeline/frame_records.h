// The three parts of a frame of a rollout, each recorded once and replayed (device/graph.h).
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

#include "device/branch.h"
#include "device/context.h"
#include "device/graph.h"
#include "pipeline/rollout.h"

namespace longtake {

class FrameRecords {
 public:
  // Begins the rollout's frame: x, y as in Rollout::begin_frame. Records that are no longer good
  // are forgotten.
  void begin_frame(Context& ctx, Rollout& rollout, int64_t frame, int64_t x, int64_t y) {
    if (rollout.begin_frame(ctx, frame, x, y)) forget();
    // A frame without history is computed in its own way.
    replays_ = rollout.is_replayable() && frame > 0;
  }

  // What the parts do is `steps`, the same every time.
  void denoise(Context& ctx, const std::function<void()>& steps) { run(ctx, denoising_, steps); }

  void remember(Context& ctx, const std::function<void()>& steps) { run(ctx, remembering_, steps); }

  void decode(Context& ctx, const std::function<void()>& steps) { run(ctx, decoding_, steps); }

  // The Context to decode with what is on ctx's stream now: on CUDA another one, so that the frame
  // is decoded beside the clean pass; elsewhere ctx. finish_decoding() makes ctx wait for it.
  Context& begin_decoding(Context& ctx) {
    if (ctx.device().kind == DeviceKind::kCpu) return ctx;
    if (!beside_) beside_ = std::make_unique<Context>(ctx.device(), ctx.threads());
    follow(*beside_, ctx);
    return *beside_;
  }

  void finish_decoding(Context& ctx) {
    if (beside_) follow(ctx, *beside_);
  }

  void forget() {
    for (Graph* graph : {&denoising_, &remembering_, &decoding_}) graph->reset();
  }

 private:
  void run(Context& ctx, Graph& graph, const std::function<void()>& steps) {
    replays_ ? graph.run(ctx, steps) : steps();
  }

  bool replays_ = false;
  std::unique_ptr<Context> beside_;
  Graph denoising_, remembering_, decoding_;
};

}  // namespace longtake
