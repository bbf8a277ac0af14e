#pragma once

#include <cstdint>

#include "overworld/map.h"

// The picture of a map: a pure function of (map, camera, time).
namespace longtake::overworld {

inline constexpr int kFrameBytes = kCameraHeight * kCameraWidth * 3;

// Writes what a camera with its top-left corner at `camera` sees in frame `time` (any integer):
// `rgb` is [128, 256, 3]; `terrain`, if not null, is [128, 256] values of Terrain, of the ground
// without what stands on it.
void render_frame(const Map& map, Point camera, int time, uint8_t* rgb, uint8_t* terrain = nullptr);

}  // namespace longtake::overworld
