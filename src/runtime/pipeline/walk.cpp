#include "pipeline/walk.h"

#include <utility>

namespace longtake {
namespace {

constexpr int64_t kGrid = 8;  // pixels; the world's own start positions lie on it

int64_t centred(int64_t world, int64_t view) {
  return (world - view) / 2 / kGrid * kGrid;
}

}  // namespace

CameraPosition start_of(const world::TransformerConfig& config) {
  const int64_t side = config.torus_tokens * config.token_pixels();
  return {centred(side, config.frame_width()), centred(side, config.frame_height())};
}

std::vector<overworld::Action> gentle_tour() {
  return overworld::parse_actions("d*64 wd*16 w*32 a*64 sa*16 s*32 .*8");
}

Walk::Walk(std::vector<overworld::Action> actions, CameraPosition start, int64_t next_action)
    : actions_(std::move(actions)), camera_(start), next_action_(next_action) {
  if (!actions_.empty()) next_action_ %= static_cast<int64_t>(actions_.size());
}

void Walk::continue_from(CameraPosition camera) {
  camera_ = camera;
  started_ = true;
}

CameraPosition Walk::next() {
  if (!started_ || actions_.empty()) {
    started_ = true;
    return camera_;
  }
  const overworld::Point step = step_of(actions_[static_cast<size_t>(next_action_)]);
  next_action_ = (next_action_ + 1) % static_cast<int64_t>(actions_.size());
  camera_.x += step.x;
  camera_.y += step.y;
  return camera_;
}

}  // namespace longtake
