#include "overworld/map.h"

#include <algorithm>
#include <cstdlib>

#include "overworld/noise.h"
#include "overworld/rng.h"

namespace longtake::overworld {

namespace {

constexpr int kCells = kWorldCells * kWorldCells;

// Purposes of random numbers.
enum Stream : uint64_t {
  kHeightNoise = 1,
  kForestNoise,
  kMountainNoise,
  kRiverNoise,
  kRoadNoise,
  kWarpXNoise,
  kWarpYNoise,
  kLandmarkStream,
  kObjectStream,
  kCritterStream,
};

// Shares of each region, in percent, by Sea and Forest of its spec.
constexpr int kWaterPercent[kNumSeas] = {2, 17, 38};
constexpr int kForestPercent[kNumForests] = {5, 32, 68};
constexpr int kRockPercent = 10;
constexpr int kBorderBlend = 96;  // px on either side of a border over which levels change

std::vector<int16_t> noise(uint64_t seed, Stream stream, std::initializer_list<Octave> octaves) {
  return periodic_noise(kWorldCells, {octaves.begin(), octaves.size()}, hash_bits(seed, stream));
}

int at(int x, int y) {
  return wrap(y, kWorldCells) * kWorldCells + wrap(x, kWorldCells);
}

// Distance in 1/8 px to the zero contour of a smooth field: value over gradient, which is exact for
// a straight line.
int16_t contour_distance(const std::vector<int16_t>& field, int x, int y) {
  const int dx = field[at(x + 1, y)] - field[at(x - 1, y)];
  const int dy = field[at(x, y + 1)] - field[at(x, y - 1)];
  const int a = std::abs(dx), b = std::abs(dy);
  const int gradient = std::max(a, b) + std::min(a, b) * 3 / 8 + 6;  // octagonal norm, never 0
  const int eighths = field[at(x, y)] * (2 * kCellSize * 8) / gradient;
  return static_cast<int16_t>(std::clamp(eighths, -kFarAway, kFarAway));
}

// How much of each of two neighbouring columns (or rows) of regions a place takes: `first` * (256 -
// weight) + `second` * weight.
struct Blend {
  int first, second, weight;
};

Blend blend_regions(int position) {
  const int p = wrap(position, kWorldSize);
  const int region = p / kRegionSize;
  const int inside = p % kRegionSize;
  if (inside < kBorderBlend) {
    return {region, wrap(region - 1, kRegionsPerSide), 128 - inside * 128 / kBorderBlend};
  }
  if (inside >= kRegionSize - kBorderBlend) {
    return {region, wrap(region + 1, kRegionsPerSide),
            128 - (kRegionSize - 1 - inside) * 128 / kBorderBlend};
  }
  return {region, region, 0};
}

int blended(const std::array<int, kNumRegions>& levels, Blend bx, Blend by) {
  const auto row = [&](int y) {
    const int first = levels[y * kRegionsPerSide + bx.first];
    const int second = levels[y * kRegionsPerSide + bx.second];
    return first * (256 - bx.weight) + second * bx.weight;
  };
  return (row(by.first) * (256 - by.weight) + row(by.second) * by.weight) >> 16;
}

int16_t narrow(int value) {
  return static_cast<int16_t>(std::clamp(value, -1500, 1500));
}

bool is_dry(const Ground& g) {
  return g.height > kLandHeight && std::abs(g.river) > kRiverBankHalfWidth;
}

constexpr int kRoadside = 84;     // 1/8 px that objects keep from a road
constexpr int kHouseReach = 130;  // beyond the roadside
constexpr int kHousePercent = 28;
constexpr int kReefPercent = 9;
constexpr int kReefHeight = -50;  // reefs keep off the shore

// What grows where, in percent of the places for objects.
struct Growth {
  int tree, bush, flowers, boulder, tuft;
};

constexpr Growth growth_on(Terrain terrain) {
  switch (terrain) {
    case Terrain::forest:
      return {68, 8, 0, 0, 8};
    case Terrain::grass:
      return {8, 9, 10, 3, 24};
    case Terrain::meadow:
      return {4, 6, 15, 2, 26};
    case Terrain::rock:
      return {0, 0, 0, 22, 0};
    case Terrain::snow:
      return {8, 0, 0, 10, 0};
    default:
      return {0, 0, 0, 0, 0};
  }
}

ObjectKind choose_object(Terrain terrain, bool by_road, Rng& rng) {
  using enum ObjectKind;
  if (terrain == Terrain::deep || terrain == Terrain::shallow) {
    return rng.chance(kReefPercent) ? reef : none;
  }
  const bool habitable = terrain == Terrain::grass || terrain == Terrain::meadow;
  if (by_road && habitable && rng.chance(kHousePercent)) return house;
  const Growth growth = growth_on(terrain);
  int roll = rng.below(100);
  const auto falls_in = [&](int share) { return (roll -= share) < 0; };
  if (falls_in(growth.tree)) {
    const int shape = rng.below(8);
    return shape < 4 ? round_tree : shape < 7 ? tall_tree : strange_tree;
  }
  if (falls_in(growth.bush)) return bush;
  if (falls_in(growth.flowers)) return flowers;
  if (falls_in(growth.boulder)) return boulder;
  if (falls_in(growth.tuft)) return tuft;
  return none;
}

bool is_free(const Ground& g) {
  return is_dry(g) && std::abs(g.road) > kRoadHalfWidth + 90;
}

}  // namespace

Terrain terrain_of(const Ground& g) {
  if (g.height < kDeepHeight) return Terrain::deep;
  if (g.height < kBeachHeight) return Terrain::shallow;
  const bool in_mountains = g.mountain > 0 && g.height > kLandHeight;
  const bool on_river = std::abs(g.river) < kRiverHalfWidth && !in_mountains;
  const bool on_road = std::abs(g.road) < kRoadHalfWidth && !in_mountains;
  if (on_road) return std::abs(g.river) < kRiverBankHalfWidth ? Terrain::bridge : Terrain::road;
  if (on_river) return Terrain::shallow;
  if (g.height < kLandHeight) return Terrain::beach;
  if (in_mountains) return g.mountain > kSnowMountain ? Terrain::snow : Terrain::rock;
  if (g.forest > 0) return Terrain::forest;
  return g.forest < kMeadowForest ? Terrain::meadow : Terrain::grass;
}

Map::Map(uint64_t seed, const MapSpec& spec)
    : seed_(seed),
      spec_(spec),
      cells_(kCells),
      cell_regions_(kCells),
      objects_(kObjectCells * kObjectCells),
      landmarks_(kLandmarkCells * kLandmarkCells),
      critters_(kCritterCells * kCritterCells) {
  build_ground();
  level_regions();
  mark_mixed_cells();
  place_landmarks();
  place_objects();
  place_critters();
  choose_start();
}

void Map::build_ground() {
  const auto height = noise(seed_, kHeightNoise, {{8, 60}, {16, 260}, {32, 150}, {64, 40}});
  const auto forest = noise(seed_, kForestNoise, {{12, 200}, {24, 200}, {48, 110}});
  const auto mountain = noise(seed_, kMountainNoise, {{12, 200}, {24, 220}, {48, 110}});
  const auto river = noise(seed_, kRiverNoise, {{8, 256}, {24, 60}});
  const auto road = noise(seed_, kRoadNoise, {{8, 200}, {16, 120}});
  const auto warp_x = noise(seed_, kWarpXNoise, {{12, 64}, {32, 40}, {64, 28}});
  const auto warp_y = noise(seed_, kWarpYNoise, {{12, 64}, {32, 40}, {64, 28}});
  for (int y = 0; y < kWorldCells; ++y) {
    for (int x = 0; x < kWorldCells; ++x) {
      const int i = y * kWorldCells + x;
      cells_[i] = {.height = height[i],
                   .forest = forest[i],
                   .mountain = mountain[i],
                   .river = contour_distance(river, x, y),
                   .road = contour_distance(road, x, y),
                   .light = 0,
                   .warp_x = warp_x[i],
                   .warp_y = warp_y[i]};
    }
  }
}

// Moves sea level, tree line and rock line so that each region has the shares that its spec asks
// for.
void Map::level_regions() {
  std::array<std::vector<int16_t>, kNumRegions> heights, forests, mountains;
  for (int i = 0; i < kCells; ++i) {
    const Ground& g = cells_[i];
    const int x = i % kWorldCells * kCellSize + kCellSize / 2;
    const int y = i / kWorldCells * kCellSize + kCellSize / 2;
    const int region = region_of(x + g.warp_x, y + g.warp_y);
    heights[region].push_back(g.height);
    forests[region].push_back(g.forest);
    mountains[region].push_back(g.mountain);
  }
  std::array<int, kNumRegions> sea_level{}, tree_line{}, rock_line{};
  for (int i = 0; i < kNumRegions; ++i) {
    const RegionSpec& region = spec_.regions[i];
    sea_level[i] = quantile(heights[i], kWaterPercent[static_cast<int>(region.sea)]);
    tree_line[i] = quantile(forests[i], 100 - kForestPercent[static_cast<int>(region.forest)]);
    rock_line[i] = quantile(mountains[i], 100 - kRockPercent);
  }
  for (int i = 0; i < kCells; ++i) {
    Ground& g = cells_[i];
    const Blend bx = blend_regions(i % kWorldCells * kCellSize + kCellSize / 2 + g.warp_x);
    const Blend by = blend_regions(i / kWorldCells * kCellSize + kCellSize / 2 + g.warp_y);
    g.height = narrow(g.height - blended(sea_level, bx, by));
    g.forest = narrow(g.forest - blended(tree_line, bx, by));
    // Mountains keep off the coast.
    g.mountain = narrow(std::min(g.mountain - blended(rock_line, bx, by), g.height - 60));
  }
  for (int y = 0; y < kWorldCells; ++y) {
    for (int x = 0; x < kWorldCells; ++x) {
      const auto relief = [&](int dx, int dy) {
        const Ground& g = cells_[at(x + dx, y + dy)];
        return std::max<int>(g.height, 0) / 4 + std::max<int>(g.mountain, -60);
      };
      const int slope = relief(1, 1) - relief(-1, -1) + relief(0, 1) - relief(0, -1);
      cells_[at(x, y)].light = static_cast<int16_t>(std::clamp(slope / 10, -40, 40));
    }
  }
}

// A surface read from control points stays inside their range, so a cell whose nine control points
// agree is plain.
void Map::mark_mixed_cells() {
  std::vector<uint8_t> corner(kCells);
  for (int i = 0; i < kCells; ++i) {
    const int x = i % kWorldCells * kCellSize + kCellSize / 2 + cells_[i].warp_x;
    const int y = i / kWorldCells * kCellSize + kCellSize / 2 + cells_[i].warp_y;
    corner[i] = static_cast<uint8_t>(region_of(x, y));
  }
  for (int y = 0; y < kWorldCells; ++y) {
    for (int x = 0; x < kWorldCells; ++x) {
      bool plain = true;
      for (int k = 0; k < 9; ++k)
        plain &= corner[at(x + k % 3 - 1, y + k / 3 - 1)] == corner[at(x, y)];
      cell_regions_[at(x, y)] = plain ? corner[at(x, y)] : kMixedRegion;
    }
  }
}

Ground Map::ground_at(int x, int y) const {
  const int px = wrap(x, kWorldSize), py = wrap(y, kWorldSize);
  const int cx = px / kCellSize, cy = py / kCellSize;
  const int wx = kWestWeight[px % kCellSize], ex = kEastWeight[px % kCellSize];
  const int wy = kWestWeight[py % kCellSize], ey = kEastWeight[py % kCellSize];
  std::array<const Ground*, 9> near;
  for (int k = 0; k < 9; ++k) near[k] = &cells_[at(cx + k % 3 - 1, cy + k / 3 - 1)];
  const auto read = [&](int16_t Ground::*field) {
    const auto column = [&](int k) {
      return spline(near[k]->*field, near[k + 3]->*field, near[k + 6]->*field, wy, ey);
    };
    return spline(column(0), column(1), column(2), wx, ex);
  };
  return {.height = read(&Ground::height),
          .forest = read(&Ground::forest),
          .mountain = read(&Ground::mountain),
          .river = read(&Ground::river),
          .road = read(&Ground::road),
          .light = read(&Ground::light),
          .warp_x = read(&Ground::warp_x),
          .warp_y = read(&Ground::warp_y)};
}

int Map::region_at(int x, int y) const {
  const int px = wrap(x, kWorldSize), py = wrap(y, kWorldSize);
  const uint8_t plain = cell_region(px / kCellSize, py / kCellSize);
  if (plain != kMixedRegion) return plain;
  const Ground g = ground_at(px, py);
  return region_of(px + g.warp_x, py + g.warp_y);
}

// About three in four cells of 256 px hold a landmark, on dry land if there is any.
void Map::place_landmarks() {
  constexpr int kTries = 24;
  for (int i = 0; i < kLandmarkCells * kLandmarkCells; ++i) {
    const int cell_x = i % kLandmarkCells, cell_y = i / kLandmarkCells;
    Rng rng(hash_bits(seed_, kLandmarkStream, cell_x, cell_y));
    if (!rng.chance(75)) continue;
    for (int k = 0; k < kTries && !landmarks_[i].present; ++k) {
      const int x = cell_x * kLandmarkGrid + rng.between(3, 12) * 16;
      const int y = cell_y * kLandmarkGrid + rng.between(3, 12) * 16;
      const Ground g = ground_at(x, y + 20), middle = ground_at(x, y);
      if (!is_free(g) || !is_free(middle) || g.mountain > -20) continue;
      const RegionSpec& region = spec_.regions[region_at(x, y + 24)];
      landmarks_[i] = {region.landmark, region.color, true, static_cast<int16_t>(x),
                       static_cast<int16_t>(y)};
    }
  }
}

void Map::place_objects() {
  for (int i = 0; i < kObjectCells * kObjectCells; ++i) {
    const int cell_x = i % kObjectCells, cell_y = i / kObjectCells;
    Rng rng(hash_bits(seed_, kObjectStream, cell_x, cell_y));
    Object object;
    object.dx = static_cast<int8_t>(rng.between(-1, 1) * 4);
    object.dy = static_cast<int8_t>(rng.between(-1, 1) * 4);
    const int x = cell_x * kObjectGrid + kObjectGrid / 2 + object.dx;
    const int y = cell_y * kObjectGrid + kObjectGrid / 2 + object.dy;
    const Ground foot = ground_at(x, y + 8);
    const int from_road = std::abs(foot.road) - kRoadHalfWidth;
    const bool at_sea = foot.height < kReefHeight;
    if (!at_sea && (!is_dry(foot) || from_road < kRoadside)) continue;
    const bool by_road = from_road < kRoadside + kHouseReach;
    object.kind = choose_object(terrain_of(foot), by_road, rng);
    if (object.kind == ObjectKind::none) continue;
    object.variant = static_cast<uint8_t>(rng.below(256));
    object.theme = spec_.regions[region_at(x, y + 8)].theme;
    objects_[i] = object;
  }
  // Nothing hides a landmark.
  for (const LandmarkPlace& landmark : landmarks_) {
    if (!landmark.present) continue;
    for (int dy = -2; dy <= 2; ++dy) {
      for (int dx = -2; dx <= 2; ++dx) {
        const int x = wrap(landmark.x / kObjectGrid + dx, kObjectCells);
        const int y = wrap(landmark.y / kObjectGrid + dy, kObjectCells);
        const int off_x =
            wrap(x * kObjectGrid + 16 - landmark.x + kWorldSize / 2, kWorldSize) - kWorldSize / 2;
        const int off_y =
            wrap(y * kObjectGrid + 16 - landmark.y + kWorldSize / 2, kWorldSize) - kWorldSize / 2;
        if (std::abs(off_x) < 48 && std::abs(off_y) < 48) objects_[y * kObjectCells + x] = {};
      }
    }
  }
}

void Map::place_critters() {
  for (int i = 0; i < kCritterCells * kCritterCells; ++i) {
    const int cell_x = i % kCritterCells, cell_y = i / kCritterCells;
    Rng rng(hash_bits(seed_, kCritterStream, cell_x, cell_y));
    if (!rng.chance(45)) continue;
    const int x = cell_x * kCritterGrid + rng.between(24, 104);
    const int y = cell_y * kCritterGrid + rng.between(24, 104);
    const Ground g = ground_at(x, y);
    if (!is_dry(g) || g.height < 150 || g.mountain > -60) continue;
    const int speed = rng.between(1, 2);
    critters_[i] = {.present = true,
                    .theme = spec_.regions[region_at(x, y)].theme,
                    .x = static_cast<int16_t>(x),
                    .y = static_cast<int16_t>(y),
                    .radius_x = static_cast<uint8_t>(rng.between(10, 22)),
                    .radius_y = static_cast<uint8_t>(rng.between(6, 14)),
                    .phase = static_cast<uint8_t>(rng.below(256)),
                    .speed = static_cast<int8_t>(rng.chance(50) ? speed : -speed)};
  }
}

Map Map::with_themes(const std::array<Theme, kNumRegions>& themes) const {
  Map other = *this;
  for (int r = 0; r < kNumRegions; ++r) other.spec_.regions[r].theme = themes[r];
  for (int i = 0; i < kObjectCells * kObjectCells; ++i) {
    Object& object = other.objects_[i];
    if (object.kind == ObjectKind::none) continue;
    const int x = i % kObjectCells * kObjectGrid + kObjectGrid / 2 + object.dx;
    const int y = i / kObjectCells * kObjectGrid + kObjectGrid / 2 + object.dy;
    object.theme = themes[region_at(x, y + 8)];
  }
  for (Critter& critter : other.critters_) {
    if (critter.present) critter.theme = themes[region_at(critter.x, critter.y)];
  }
  return other;
}

// The liveliest view near the middle of the world: many kinds of terrain, none of them everywhere,
// a landmark in sight.
void Map::choose_start() {
  constexpr int kStep = 32, kReach = 256;
  constexpr int kColumns = kCameraWidth / kCellSize, kRows = kCameraHeight / kCellSize;
  const Point centre = {(kWorldSize - kCameraWidth) / 2, (kWorldSize - kCameraHeight) / 2};
  int best = -1;
  for (int dy = -kReach; dy <= kReach; dy += kStep) {
    for (int dx = -kReach; dx <= kReach; dx += kStep) {
      const Point corner = {centre.x + dx, centre.y + dy};
      std::array<int, kNumTerrains> count{};
      for (int k = 0; k < kColumns * kRows; ++k) {
        const Terrain terrain = terrain_of(
            cell(corner.x / kCellSize + k % kColumns, corner.y / kCellSize + k / kColumns));
        ++count[static_cast<int>(terrain)];
      }
      int score = 0;
      for (const int n : count) score += std::min(n, 16);
      for (const LandmarkPlace& mark : landmarks_) {
        const int x = mark.x - corner.x, y = mark.y - corner.y;
        const bool in_view =
            mark.present && x > 36 && x < kCameraWidth - 36 && y > 36 && y < kCameraHeight - 36;
        if (in_view) score += 40;
      }
      score -= (std::abs(dx) + std::abs(dy)) / 32;
      if (score > best) {
        best = score;
        start_ = corner;
      }
    }
  }
}

}  // namespace longtake::overworld
