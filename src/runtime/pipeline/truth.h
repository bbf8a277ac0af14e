// How well a video of the embedded world remembers it. The definitions are those of
// training/evaluate.py, so that both print the same figures for the same pictures.
#pragma once

#include <cstdint>
#include <vector>

#include "metrics/image.h"
#include "pipeline/scenario.h"

namespace longtake {

// [H, W]: 1 where the place in the world that the pixel shows was in view in the primed frames.
std::vector<uint8_t> seen_mask(const Scenario& scenario, int64_t frame);

inline constexpr double kSeenShare = 0.25;  // of a frame: less is not judged as seen land

// Two generated frames of nearly one pose (at most 8 px apart), at least kReturnLag frames apart.
struct ReturnPair {
  int64_t late = 0;
  int64_t early = 0;
};

inline constexpr int64_t kReturnLag = 100;

// Every third late frame that shows mostly land that was not primed, with the nearest early pose.
std::vector<ReturnPair> return_pairs(const Scenario& scenario);

// PSNR between the parts of the two frames that show the same places; rgb [H, W, 3].
double return_psnr(const Scenario& scenario, ReturnPair pair, Pixels late, Pixels early);

}  // namespace longtake
