#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "overworld/spec.h"

// One world, built from a seed and a spec: everything that does not depend on the time or the
// camera.
namespace longtake::overworld {

// What lies under one point. Control points of a quadratic B-spline sit at the centres of the
// cells; all terrain is read from this smooth surface.
struct Ground {
  int16_t height;    // about 10 units a pixel; below 0 is water
  int16_t forest;    // above 0 is forest, far below is meadow
  int16_t mountain;  // above 0 is rock, far above is snow
  int16_t river;     // distance to the middle of the nearest river, 1/8 px
  int16_t road;      // distance to the middle of the nearest road, 1/8 px
  int16_t light;     // shading of slopes, -64 (in shade) to 64 (in the light, which comes from the
                     // north west)
  int16_t warp_x;    // px added to x before asking which region a place belongs to
  int16_t warp_y;
};

inline constexpr int kGroundFields = sizeof(Ground) / sizeof(int16_t);

// Thresholds of the surface, shared by everyone who must agree on what a place is.
inline constexpr int kDeepHeight = -120;
inline constexpr int kBeachHeight = 0;
inline constexpr int kLandHeight = 48;
inline constexpr int kMeadowForest = -190;
inline constexpr int kSnowMountain = 190;
inline constexpr int kRiverHalfWidth = 72;  // 1/8 px
inline constexpr int kRiverBankHalfWidth = 100;
inline constexpr int kRoadHalfWidth = 44;
inline constexpr int kFarAway = 900;  // distances end here

// B-spline weights of the western and eastern neighbour at sub-position i of a cell, in 1/128; the
// centre has the rest.
inline constexpr std::array<int16_t, kCellSize> kEastWeight = [] {
  std::array<int16_t, kCellSize> w{};
  for (int i = 0; i < kCellSize; ++i) w[i] = static_cast<int16_t>((2 * i + 1) * (2 * i + 1) / 16);
  return w;
}();
inline constexpr std::array<int16_t, kCellSize> kWestWeight = [] {
  std::array<int16_t, kCellSize> w{};
  for (int i = 0; i < kCellSize; ++i) w[i] = kEastWeight[kCellSize - 1 - i];
  return w;
}();
inline constexpr int kSplineShift = 7;
inline constexpr int kMaxStep =
    500;  // between neighbouring control points, so that 16 bits hold every product

// Things that stand on a grid of 32 px. The sprite's centre is off the middle of its cell by (dx,
// dy).
enum class ObjectKind : uint8_t {
  none,
  round_tree,
  tall_tree,
  strange_tree,
  bush,
  boulder,
  flowers,
  tuft,
  reef,
  house
};

struct Object {
  ObjectKind kind = ObjectKind::none;
  Theme theme = Theme::summer;
  uint8_t variant = 0;
  int8_t dx = 0;
  int8_t dy = 0;
};

inline constexpr int kObjectGrid = 32;
inline constexpr int kObjectCells = kWorldSize / kObjectGrid;

struct LandmarkPlace {
  Landmark kind = Landmark::tower;
  LandmarkColor color = LandmarkColor::red;
  bool present = false;
  int16_t x = 0, y = 0;  // centre
};

inline constexpr int kLandmarkGrid = 256;
inline constexpr int kLandmarkCells = kWorldSize / kLandmarkGrid;

// A small animal that walks round (x, y) for ever.
struct Critter {
  bool present = false;
  Theme theme = Theme::summer;
  int16_t x = 0, y = 0;
  uint8_t radius_x = 0, radius_y = 0;
  uint8_t phase = 0;  // 1/256 of a round
  int8_t speed = 0;   // 1/256 of a round per frame; negative goes the other way
};

inline constexpr int kCritterGrid = 128;
inline constexpr int kCritterCells = kWorldSize / kCritterGrid;

struct Point {
  int32_t x, y;

  bool operator==(const Point&) const = default;
};

constexpr int wrap(int value, int size) {
  const int r = value % size;
  return r < 0 ? r + size : r;
}

class Map {
 public:
  static constexpr uint8_t kMixedRegion = 255;

  Map(uint64_t seed, const MapSpec& spec);

  // The same land under other themes: what Map(seed, spec with these themes) would be, without
  // building it again.
  Map with_themes(const std::array<Theme, kNumRegions>& themes) const;

  uint64_t seed() const { return seed_; }

  const MapSpec& spec() const { return spec_; }

  // Top-left corner of the camera in the first frame; a multiple of 8 px, in the middle region.
  Point start() const { return start_; }

  // Control point of cell (x, y), each in [0, kWorldCells).
  const Ground& cell(int x, int y) const { return cells_[y * kWorldCells + x]; }

  // The region of the whole cell, or kMixedRegion where a border may cross it.
  uint8_t cell_region(int x, int y) const { return cell_regions_[y * kWorldCells + x]; }

  // The surface at a world pixel (any integers; the world is a torus).
  Ground ground_at(int x, int y) const;
  int region_at(int x, int y) const;

  // The region of a warped place.
  static int region_of(int x, int y) {
    return wrap(y, kWorldSize) / kRegionSize * kRegionsPerSide + wrap(x, kWorldSize) / kRegionSize;
  }

  const Object& object(int x, int y) const { return objects_[y * kObjectCells + x]; }

  const LandmarkPlace& landmark(int x, int y) const { return landmarks_[y * kLandmarkCells + x]; }

  const Critter& critter(int x, int y) const { return critters_[y * kCritterCells + x]; }

 private:
  void build_ground();
  void level_regions();
  void mark_mixed_cells();
  void place_landmarks();
  void place_objects();
  void place_critters();
  void choose_start();

  uint64_t seed_;
  MapSpec spec_;
  Point start_{};
  std::vector<Ground> cells_;
  std::vector<uint8_t> cell_regions_;
  std::vector<Object> objects_;
  std::vector<LandmarkPlace> landmarks_;
  std::vector<Critter> critters_;
};

// What stands at a point of the surface, without the small irregularities that the picture adds to
// borders.
Terrain terrain_of(const Ground& ground);

// B-spline through three control points, w in 1/128: the one way in which everyone reads the
// surface.
constexpr int16_t spline(int west, int centre, int east, int west_weight, int east_weight) {
  const auto limited = [](int v) {
    return v < -kMaxStep ? -kMaxStep : v > kMaxStep ? kMaxStep : v;
  };
  const int a = limited(west - centre) * west_weight;
  const int b = limited(east - centre) * east_weight;
  return static_cast<int16_t>(centre + ((a + b) >> kSplineShift));
}

}  // namespace longtake::overworld
