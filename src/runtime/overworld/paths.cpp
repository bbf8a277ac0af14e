#include "overworld/paths.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "overworld/rng.h"

namespace longtake::overworld {

namespace {

constexpr uint64_t kPathStream = 0x5041;
constexpr uint64_t kPlaceStream = 0x504C;
constexpr int kDiagonalPercent = 25;

int any_direction(Rng& rng) {
  return rng.below(4) * 2 + (rng.chance(kDiagonalPercent) ? 1 : 0);
}

// Skewed towards short: a product of two uniform numbers.
int leg_length(Rng& rng, int shortest, int longest) {
  return shortest + (longest - shortest) * rng.between(1, 100) * rng.between(1, 100) / 10000;
}

// A trail under construction, at most `limit` actions long.
class Walk {
 public:
  explicit Walk(int limit) : limit_(static_cast<size_t>(limit)) {}

  bool full() const { return actions_.size() >= limit_; }

  int room() const { return static_cast<int>(limit_ - actions_.size()); }

  void add(Action action, int times = 1) {
    for (int i = 0; i < times && !full(); ++i) actions_.push_back(action);
  }

  void add(const std::vector<Action>& actions) {
    for (const Action a : actions) add(a);
  }

  std::vector<Action> take() { return std::move(actions_); }

 private:
  size_t limit_;
  std::vector<Action> actions_;
};

std::vector<Action> reversed(const std::vector<Action>& trail) {
  std::vector<Action> back;
  std::transform(trail.rbegin(), trail.rend(), std::back_inserter(back), opposite);
  return back;
}

// New land at the end of a trail: a straight run, or four runs round a rectangle.
void extend(std::vector<Action>& trail, Rng& rng) {
  const bool fast = rng.chance(50);
  const int direction = any_direction(rng);
  if (rng.chance(15)) {
    const int turn = rng.chance(50) ? 2 : -2;
    const int sides[2] = {rng.between(6, 36), rng.between(6, 36)};
    for (int side = 0; side < 4; ++side) {
      trail.insert(trail.end(), static_cast<size_t>(sides[side % 2]),
                   move(direction + side * turn, fast));
    }
    return;
  }
  trail.insert(trail.end(), static_cast<size_t>(leg_length(rng, 8, 120)), move(direction, fast));
}

// Walks up and down one growing trail, now and then standing still.
void explore(Walk& walk, Rng& rng) {
  std::vector<Action> trail;
  size_t at = 0;  // actions of the trail that lie behind
  while (!walk.full()) {
    if (rng.chance(10)) {
      walk.add(Action::stay, rng.between(1, 8));
      continue;
    }
    if (at == trail.size() && (at == 0 || rng.chance(50))) extend(trail, rng);
    const int length = leg_length(rng, 12, 240);
    const bool forward = at == 0 || (at < trail.size() && rng.chance(55));
    for (int i = 0; i < length && !walk.full() && (forward ? at < trail.size() : at > 0); ++i) {
      walk.add(forward ? trail[at++] : opposite(trail[--at]));
    }
  }
}

void go_returning(Walk& walk, Rng& rng) {
  while (!walk.full()) {
    const int half = std::max(1, walk.room() / 2);
    const int length = std::min(half, rng.between(110, std::max(110, half)));
    std::vector<Action> out;
    while (static_cast<int>(out.size()) < length) extend(out, rng);
    out.resize(static_cast<size_t>(length));
    walk.add(out);
    walk.add(reversed(out));
  }
}

// Runs that never turn by more than 45 degrees from `heading`.
std::vector<Action> stretch(Rng& rng, int heading, int length, int fast_percent) {
  std::vector<Action> trail;
  while (static_cast<int>(trail.size()) < length) {
    const int turn = rng.chance(60) ? 0 : rng.between(-1, 1);
    const Action action = move(heading + turn, rng.chance(fast_percent));
    trail.insert(trail.end(), static_cast<size_t>(rng.between(8, 40)), action);
  }
  trail.resize(static_cast<size_t>(length));
  return trail;
}

// Two trips, there and back. Fast steps keep a pose's phase on the lattice of 8 px; one slow step
// before each way back and before the second trip moves it on. The four phases differ, and a trip
// only goes forward: no pose occurs twice.
void go_off_phase(Walk& walk, Rng& rng) {
  const int sideways = rng.chance(50) ? 2 : 6;  // east or west
  const int south = 4;
  const int length = std::max(1, walk.room() / 4 - 1);
  const int heading = rng.below(kNumDirections);
  const int second_heading = heading + rng.between(2, 6);

  const std::vector<Action> first = stretch(rng, heading, length, 100);
  walk.add(first);
  walk.add(move(sideways, false));
  walk.add(reversed(first));
  walk.add(move(south, false));
  const std::vector<Action> second = stretch(rng, second_heading, length, 100);
  walk.add(second);
  walk.add(move(sideways + kNumDirections / 2, false));
  walk.add(reversed(second));
  // The few frames left over lead away from the second trip, whose way back had this phase.
  while (!walk.full()) walk.add(move(second_heading + kNumDirections / 2, true));
}

}  // namespace

std::vector<Action> make_path(PathKind kind, int num_frames, uint64_t seed) {
  Rng rng(hash_bits(seed, kPathStream, static_cast<int>(kind)));
  Walk walk(num_frames);
  walk.add(Action::stay);
  switch (kind) {
    case PathKind::explore:
      explore(walk, rng);
      break;
    case PathKind::returning:
      go_returning(walk, rng);
      break;
    case PathKind::off_phase:
      go_off_phase(walk, rng);
      break;
    case PathKind::steady:
      walk.add(stretch(rng, rng.below(kNumDirections), walk.room(), 70));
      break;
  }
  return walk.take();
}

Point random_place(uint64_t seed) {
  Rng rng(hash_bits(seed, kPlaceStream));
  const int x = rng.below(kWorldSize / kSlowStep) * kSlowStep;
  return {x, rng.below(kWorldSize / kSlowStep) * kSlowStep};
}

std::vector<Point> poses_of(Point start, const std::vector<Action>& path) {
  std::vector<Point> poses;
  poses.reserve(path.size());
  for (const Action action : path) {
    const Point step = step_of(action);
    start = {start.x + step.x, start.y + step.y};
    poses.push_back(start);
  }
  return poses;
}

}  // namespace longtake::overworld
