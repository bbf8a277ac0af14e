// Scenario: what a comparison plays: a prompt, a way through the world, a noise seed, and, where a
// map of the world stands behind it, the truth of every frame.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "models/world/config.h"
#include "overworld/map.h"
#include "pipeline/saved_session.h"

namespace longtake {

struct Scenario {
  std::string name;
  std::string prompt;
  uint64_t seed = 0;                          // of the noise
  std::vector<CameraPosition> cameras;        // of every frame
  int64_t num_primed = 0;                     // first frames, given and not made
  std::shared_ptr<const overworld::Map> map;  // null: nobody knows the truth

  int64_t num_frames() const { return static_cast<int64_t>(cameras.size()); }

  // Frame `frame` as the world's renderer shows it: rgb [H, W, 3]. Needs a map.
  void render_truth(int64_t frame, std::span<uint8_t> rgb) const;
};

// Ways through a map. Frames before kPrimedFrames go out over land that the renderer shows; then
// the camera comes back over it, goes far out at right angles into land that the model must invent,
// back, and out again.
enum class Route {
  kExact,     // back over the very poses of the way out
  kOffPhase,  // back 4 px beside them, on both axes
  kSteady,    // straight ahead: ever new land
};

inline constexpr int64_t kPrimedFrames = 32;

// Maps of seeds first_seed, first_seed + 1, ... with prompts that describe them.
std::vector<Scenario> map_scenarios(uint64_t first_seed, int64_t count, Route route,
                                    int64_t num_frames);

// One scenario a line: "PROMPT", or "ACTIONS | PROMPT" with actions as `generate` takes them. Empty
// lines and lines that begin with '#' count for nothing. Throws Error (kInput) naming the line.
std::vector<Scenario> read_scenarios(const std::string& path, const world::TransformerConfig& sizes,
                                     int64_t num_frames);

}  // namespace longtake
