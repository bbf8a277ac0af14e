#include "device/graph.h"

#include "build_config.h"

namespace longtake {
namespace {

std::shared_ptr<cuda::Recording> record(Context& ctx, const std::function<void()>& steps) {
  if constexpr (kHasCuda) {
    auto recording = std::make_shared<cuda::Recording>(*ctx.cuda());
    recording->begin();
    try {
      steps();
    } catch (...) {
      recording->abandon();
      throw;
    }
    recording->end();
    return recording;
  } else {
    return nullptr;
  }
}

}  // namespace

void Graph::run(Context& ctx, const std::function<void()>& steps) {
  if (ctx.device().kind == DeviceKind::kCpu || !has_run_) {
    steps();
    has_run_ = true;
    return;
  }
  if (recording_ == nullptr) recording_ = record(ctx, steps);
  if constexpr (kHasCuda) recording_->launch();
}

void Graph::reset() {
  recording_.reset();
  has_run_ = false;
}

}  // namespace longtake
