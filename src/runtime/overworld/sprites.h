#pragma once

#include <cstdint>
#include <vector>

#include "overworld/map.h"
#include "overworld/spec.h"

// Pictures of everything that stands on the ground, painted once from shapes.
namespace longtake::overworld {

// Planes of `width` x `height`. Colours are already multiplied by alpha: out = color + background *
// keep / 256.
struct Sprite {
  int width = 0, height = 0;
  std::vector<uint8_t> r, g, b;
  std::vector<uint8_t> keep;  // 255 - alpha
};

const Sprite& object_sprite(Theme theme, ObjectKind kind,
                            int variant);                           // 32 x 40, stands at (16, 24)
const Sprite& landmark_sprite(Landmark kind, LandmarkColor color);  // 64 x 64
const Sprite& critter_sprite(Theme theme, bool faces_east);         // 16 x 16

}  // namespace longtake::overworld
