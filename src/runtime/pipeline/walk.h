// The camera's way through the world: where each frame of a session is seen from.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "models/world/config.h"
#include "overworld/actions.h"
#include "pipeline/saved_session.h"

namespace longtake {

// The middle of the world's middle, on the 8-pixel grid: where a session without a past begins.
CameraPosition start_of(const world::TransformerConfig& config);

// A slow figure that returns to where it began, for someone who asked for no way in particular.
std::vector<overworld::Action> gentle_tour();

class Walk {
 public:
  // actions may be empty: then the camera stays. `next_action` of them have been used already.
  Walk(std::vector<overworld::Action> actions, CameraPosition start, int64_t next_action = 0);

  // The way goes on from where a session stopped: the next frame is led to by the next action.
  void continue_from(CameraPosition camera);

  // The next frame's position. The first frame of all is at the start; action i leads from frame i
  // to frame i + 1; a way that ends starts again from its first action.
  CameraPosition next();

  const std::vector<overworld::Action>& actions() const { return actions_; }

  int64_t next_action() const { return next_action_; }

 private:
  std::vector<overworld::Action> actions_;
  CameraPosition camera_;
  bool started_ = false;
  int64_t next_action_ = 0;  // actions used so far, modulo their number
};

}  // namespace longtake
