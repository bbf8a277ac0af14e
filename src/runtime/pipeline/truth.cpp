#include "pipeline/truth.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <numeric>

#include "base/error.h"
#include "overworld/spec.h"

namespace longtake {
namespace {

constexpr int64_t kWidth = overworld::kCameraWidth;
constexpr int64_t kHeight = overworld::kCameraHeight;
constexpr int64_t kChannels = 3;
constexpr int64_t kNearPose = 8;
constexpr int64_t kReturnStep = 3;
constexpr double kNewShare = 0.75;

// Distance on the torus from `from` to `to`, the short way round.
int64_t apart(int64_t from, int64_t to) {
  const int64_t side = overworld::kWorldSize;
  const int64_t d = ((to - from) % side + side) % side;
  return d > side / 2 ? d - side : d;
}

}  // namespace

std::vector<uint8_t> seen_mask(const Scenario& scenario, int64_t frame) {
  std::vector<uint8_t> mask(static_cast<size_t>(kWidth * kHeight), 0);
  const CameraPosition at = scenario.cameras[static_cast<size_t>(frame)];
  for (int64_t early = 0; early < scenario.num_primed; ++early) {
    const CameraPosition other = scenario.cameras[static_cast<size_t>(early)];
    const int64_t dx = apart(at.x, other.x);
    const int64_t dy = apart(at.y, other.y);
    for (int64_t y = std::max<int64_t>(0, dy); y < std::min(kHeight, kHeight + dy); ++y) {
      const int64_t begin = std::max<int64_t>(0, dx);
      const int64_t end = std::min(kWidth, kWidth + dx);
      if (begin < end)
        std::fill(mask.begin() + y * kWidth + begin, mask.begin() + y * kWidth + end, 1);
    }
  }
  return mask;
}

std::vector<ReturnPair> return_pairs(const Scenario& scenario) {
  std::vector<ReturnPair> pairs;
  for (int64_t late = scenario.num_primed + kReturnLag + 1; late < scenario.num_frames();
       late += kReturnStep) {
    const CameraPosition at = scenario.cameras[static_cast<size_t>(late)];
    ReturnPair best{late, -1};
    int64_t nearest = std::numeric_limits<int64_t>::max();
    for (int64_t early = scenario.num_primed; early < late - kReturnLag; ++early) {
      const CameraPosition other = scenario.cameras[static_cast<size_t>(early)];
      const int64_t distance =
          std::max(std::abs(apart(at.x, other.x)), std::abs(apart(at.y, other.y)));
      if (distance < nearest) {
        nearest = distance;
        best.early = early;
      }
    }
    if (nearest > kNearPose) continue;
    const std::vector<uint8_t> seen = seen_mask(scenario, late);
    const int64_t old = std::accumulate(seen.begin(), seen.end(), int64_t{0});
    if (static_cast<double>(old) <= (1 - kNewShare) * static_cast<double>(seen.size()))
      pairs.push_back(best);
  }
  return pairs;
}

double return_psnr(const Scenario& scenario, ReturnPair pair, Pixels late, Pixels early) {
  const CameraPosition a = scenario.cameras[static_cast<size_t>(pair.late)];
  const CameraPosition b = scenario.cameras[static_cast<size_t>(pair.early)];
  const int64_t dx = apart(b.x, a.x);  // a place at column c of the late frame: c + dx of the early
  const int64_t dy = apart(b.y, a.y);
  const auto width = static_cast<size_t>((kWidth - std::abs(dx)) * kChannels);
  std::vector<uint8_t> from_late, from_early;
  for (int64_t y = std::max<int64_t>(0, -dy); y < std::min(kHeight, kHeight - dy); ++y) {
    const int64_t x = std::max<int64_t>(0, -dx);
    const auto row = late.subspan(static_cast<size_t>((y * kWidth + x) * kChannels), width);
    const auto other =
        early.subspan(static_cast<size_t>(((y + dy) * kWidth + x + dx) * kChannels), width);
    from_late.insert(from_late.end(), row.begin(), row.end());
    from_early.insert(from_early.end(), other.begin(), other.end());
  }
  return psnr(from_late, from_early);
}

}  // namespace longtake
