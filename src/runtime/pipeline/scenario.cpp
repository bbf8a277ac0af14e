#include "pipeline/scenario.h"

#include <algorithm>
#include <array>
#include <sstream>

#include "base/error.h"
#include "io/mapped_file.h"
#include "overworld/actions.h"
#include "overworld/prompt.h"
#include "overworld/render.h"
#include "overworld/spec.h"
#include "pipeline/walk.h"

namespace longtake {
namespace {

constexpr size_t kMostFileBytes = 16 << 20;
constexpr int kStep = 8;    // px a frame, the fast step
constexpr int kBeside = 4;  // px between the ways out and back of an off-phase return

struct Leg {
  overworld::Point direction;
  int64_t steps;
};

std::vector<CameraPosition> walk_legs(overworld::Point start, const std::vector<Leg>& legs,
                                      bool off_phase, int64_t num_frames) {
  CameraPosition at{start.x, start.y};
  std::vector<CameraPosition> cameras = {at};
  for (size_t leg = 0; leg < legs.size(); ++leg) {
    const auto [x, y] = legs[leg].direction;
    for (int64_t step = 0; step < legs[leg].steps; ++step) {
      const bool turn = off_phase && leg > 0 && step == 0;
      at.x += turn ? kBeside * (x + y) : kStep * x;
      at.y += turn ? kBeside * (x + y) : kStep * y;
      cameras.push_back(at);
    }
  }
  cameras.resize(static_cast<size_t>(num_frames), cameras.back());
  return cameras;
}

// training/evaluate.py goes the same ways.
std::vector<CameraPosition> cameras_of(Route route, int64_t map, overworld::Point start,
                                       int64_t num_frames) {
  constexpr std::array<overworld::Point, 4> kTurns = {{{1, 0}, {0, 1}, {-1, 0}, {0, -1}}};
  const auto along = kTurns[static_cast<size_t>(map % 4)];
  const auto aside = kTurns[static_cast<size_t>((map + (map / 4 % 2 != 0 ? 1 : 3)) % 4)];
  if (route == Route::kSteady) return walk_legs(start, {{along, num_frames}}, false, num_frames);
  const overworld::Point back{-along.x, -along.y};
  const overworld::Point home{-aside.x, -aside.y};
  const int64_t out = kPrimedFrames - 1;
  const int64_t far = std::max<int64_t>(8, (num_frames - 2 * kPrimedFrames) * 3 / 8);
  return walk_legs(start,
                   {{along, out}, {back, out}, {aside, far}, {home, far}, {aside, num_frames}},
                   route == Route::kOffPhase, num_frames);
}

const char* name_of(Route route) {
  return route == Route::kExact ? "exact" : route == Route::kOffPhase ? "off-phase" : "steady";
}

std::string trimmed(const std::string& text) {
  const size_t begin = text.find_first_not_of(" \t\r");
  if (begin == std::string::npos) return {};
  return text.substr(begin, text.find_last_not_of(" \t\r") + 1 - begin);
}

}  // namespace

void Scenario::render_truth(int64_t frame, std::span<uint8_t> rgb) const {
  LONGTAKE_CHECK(map != nullptr && rgb.size() == overworld::kFrameBytes);
  const CameraPosition at = cameras[static_cast<size_t>(frame)];
  overworld::render_frame(*map, {static_cast<int32_t>(at.x), static_cast<int32_t>(at.y)},
                          static_cast<int>(frame), rgb.data());
}

std::vector<Scenario> map_scenarios(uint64_t first_seed, int64_t count, Route route,
                                    int64_t num_frames) {
  std::vector<Scenario> scenarios;
  for (int64_t i = 0; i < count; ++i) {
    const uint64_t seed = first_seed + static_cast<uint64_t>(i);
    auto map = std::make_shared<const overworld::Map>(seed, overworld::sample_spec(seed));
    Scenario scenario;
    scenario.name = str("map ", seed, ", ", name_of(route));
    scenario.prompt = overworld::describe(map->spec(), seed);
    scenario.seed = seed;
    scenario.cameras = cameras_of(route, i, map->start(), num_frames);
    scenario.num_primed = std::min(kPrimedFrames, num_frames);
    scenario.map = std::move(map);
    scenarios.push_back(std::move(scenario));
  }
  return scenarios;
}

std::vector<Scenario> read_scenarios(const std::string& path, const world::TransformerConfig& sizes,
                                     int64_t num_frames) {
  const MappedFile file(path);
  if (file.bytes().size() > kMostFileBytes)
    throw Error(ErrorKind::kInput, str(path, ": expected at most ", kMostFileBytes,
                                       " bytes, found ", file.bytes().size()));
  std::istringstream lines(
      std::string(reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size()));
  std::vector<Scenario> scenarios;
  int64_t number = 0;
  for (std::string line; std::getline(lines, line);) {
    ++number;
    line = trimmed(line);
    if (line.empty() || line.front() == '#') continue;
    const size_t bar = line.find('|');
    Scenario scenario;
    scenario.name = str("line ", number);
    scenario.prompt = trimmed(bar == std::string::npos ? line : line.substr(bar + 1));
    scenario.seed = static_cast<uint64_t>(number);
    std::vector<overworld::Action> actions = gentle_tour();
    try {
      if (scenario.prompt.empty()) throw Error("expected a prompt behind the bar, found none");
      if (bar != std::string::npos) actions = overworld::parse_actions(line.substr(0, bar));
    } catch (const Error& error) {
      throw Error(ErrorKind::kInput, str(path, ", line ", number, ": ", error.what()));
    }
    Walk walk(std::move(actions), start_of(sizes));
    for (int64_t frame = 0; frame < num_frames; ++frame) scenario.cameras.push_back(walk.next());
    scenarios.push_back(std::move(scenario));
  }
  if (scenarios.empty())
    throw Error(ErrorKind::kInput, str(path, ": expected at least one prompt, found none"));
  return scenarios;
}

}  // namespace longtake
