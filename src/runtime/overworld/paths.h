#pragma once

#include <cstdint>
#include <vector>

#include "overworld/actions.h"
#include "overworld/map.h"

// Walks for training and evaluation.
namespace longtake::overworld {

enum class PathKind {
  explore,  // runs, loops and ways back along the own trail: most late frames have been seen before
  returning,  // far out and back over exactly the same poses, more than once if there is time
  off_phase,  // back again 4 px beside the way out: old land, but no pose occurs twice
  steady,     // ever new land
};

inline constexpr int kNumPathKinds = 4;

// `num_frames` actions; action i leads into frame i, so the first is stay.
std::vector<Action> make_path(PathKind kind, int num_frames, uint64_t seed);

// A random place on the torus, a multiple of 4 px.
Point random_place(uint64_t seed);

// The pose of every frame, not wrapped to the torus.
std::vector<Point> poses_of(Point start, const std::vector<Action>& path);

}  // namespace longtake::overworld
