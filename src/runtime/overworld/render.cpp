#include "overworld/render.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <vector>

#include "overworld/lanes.h"
#include "overworld/noise.h"
#include "overworld/palette.h"
#include "overworld/sprites.h"

namespace longtake::overworld {

namespace {

// The frame is painted in whole cells, then cut to the camera.
constexpr int kColumns = kCameraWidth / kCellSize + 1;
constexpr int kPlaneWidth = kColumns * kCellSize;

struct Plane {
  alignas(64) uint8_t rows[kCameraHeight][kPlaneWidth];
};

struct Planes {
  Plane r, g, b;
};

// Smooth noise that repeats every `size` px, the same in every map; -127 to 127. Rows are a bit
// longer than `size`, so that sixteen values can be read from any place.
class Texture {
 public:
  Texture(int size, std::initializer_list<Octave> octaves, uint64_t seed)
      : size_(size), stride_(size + kCellSize), values_(static_cast<size_t>(size) * stride_) {
    const auto noise = periodic_noise(size, {octaves.begin(), octaves.size()}, seed);
    for (int y = 0; y < size; ++y) {
      for (int x = 0; x < stride_; ++x) {
        const int v = noise[y * size + x % size] / 8;
        values_[y * stride_ + x] = static_cast<int8_t>(std::clamp(v, -127, 127));
      }
    }
  }

  Lanes at(int x, int y) const {
    return load_lanes(&values_[(y & (size_ - 1)) * stride_ + (x & (size_ - 1))]);
  }

 private:
  int size_, stride_;  // size is a power of two
  std::vector<int8_t> values_;
};

struct Textures {
  Texture border{
      256, {{16, 160}, {32, 200}}, 101};  // wobble of borders and waves, features of 8 to 16 px
  Texture grain{256, {{32, 256}, {64, 110}}, 102};  // tone of the ground
  Texture cloud{512, {{4, 150}, {8, 256}, {16, 120}}, 103};
};

const Textures& textures() {
  static const Textures instance;
  return instance;
}

// Weights of colours run from 0 to kFull.
constexpr int kFull = 64;

// Full where `inside` is well above 0, half on the border, over about one pixel for a slope of 10
// units a pixel.
Lanes edge(Lanes inside, int sharpness = 6) {
  return clamp(clamp(inside, -100, 100) * static_cast<int16_t>(sharpness) + kFull / 2, 0, kFull);
}

Lanes both(Lanes a, Lanes b) {
  return min(a, b);
}

Lanes without(Lanes a, Lanes b) {
  return min(a, kFull - b);
}

struct ColorLanes {
  Lanes r, g, b;

  explicit ColorLanes(Color c) : r(broadcast(c.r)), g(broadcast(c.g)), b(broadcast(c.b)) {}

  void mix(const ColorLanes& c, Lanes weight) {
    r += ((c.r - r) * weight) >> 6;
    g += ((c.g - g) * weight) >> 6;
    b += ((c.b - b) * weight) >> 6;
  }

  void mix(Color c, Lanes weight) { mix(ColorLanes(c), weight); }

  // `light` in 1/256, within +-64.
  void shade(Lanes light) {
    r = clamp(r + ((r * light) >> 8), 0, 255);
    g = clamp(g + ((g * light) >> 8), 0, 255);
    b = clamp(b + ((b * light) >> 8), 0, 255);
  }

  void choose(Lanes mask, const ColorLanes& c) {
    r = select(mask, c.r, r);
    g = select(mask, c.g, g);
    b = select(mask, c.b, b);
  }
};

// One row of one cell: the surface under sixteen pixels, borders already wobbling.
struct GroundRow {
  Lanes height, forest, mountain, river, road, light;
  Lanes grain, wave;
};

ColorLanes paint_ground(const GroundRow& g, const Palette& p, Lanes foam_reach) {
  const Lanes on_land = edge(g.height - kBeachHeight);
  const Lanes on_soil = edge(g.height - kLandHeight);
  const Lanes in_rock = both(edge(g.mountain), on_soil);
  const Lanes in_snow = edge(g.mountain - kSnowMountain);
  const Lanes river = abs(g.river), road = abs(g.road);
  const Lanes on_bank = both(without(edge(kRiverBankHalfWidth - river, 4), in_rock), on_land);
  const Lanes on_river = both(without(edge(kRiverHalfWidth - river, 4), in_rock), on_land);
  const Lanes on_road = both(without(edge(kRoadHalfWidth - road, 4), in_rock), on_land);
  const Lanes on_bridge = both(on_road, edge(kRiverBankHalfWidth - river, 4));

  ColorLanes water(p.deep);
  water.mix(p.shallow, clamp(g.height - kDeepHeight + kFull / 2, 0, kFull));
  ColorLanes stream(p.shallow);
  const Lanes foam = clamp(foam_reach - abs(g.height + 16), 0, 12) * 4;
  water.mix(p.foam, foam);
  stream.mix(p.foam, clamp(20 - abs(river - (kRiverHalfWidth - 8)), 0, 10) * 3);

  ColorLanes soil(p.grass);
  soil.mix(p.meadow, clamp(((kMeadowForest - g.forest) >> 1) + kFull / 2, 0, kFull));
  soil.mix(p.forest, edge(g.forest, 4));
  soil.mix(p.rock, in_rock);
  soil.mix(p.snow, in_snow);

  ColorLanes color = water;
  color.mix(p.beach, on_land);
  color.mix(soil, on_soil);
  color.mix(p.beach, on_bank);
  color.mix(stream, on_river);
  color.mix(p.road, on_road);
  color.mix(p.bridge, on_bridge);

  // Light: waves on water, slopes and soft grain on land, a dark rim where grass ends and rock
  // rises.
  const Lanes dry = without(on_land, without(on_river, on_bridge));
  const Lanes rim = clamp(20 - abs(g.height - kLandHeight - 14), 0, 14);
  const Lanes foot = clamp(28 - abs(g.mountain - 4), 0, 24);
  const Lanes terrace = clamp(18 - abs((g.mountain & 127) - 64), 0, 18);
  const Lanes rocky = without(in_rock, in_snow);
  const Lanes relief =
      g.light + (g.grain >> 2) - rim - ((foot * on_soil) >> 6) - ((terrace * rocky) >> 6);
  color.shade(clamp((relief * dry + g.wave * (kFull - dry)) >> 6, -64, 64));
  return color;
}

// Everything that moves comes round after this many frames, clouds last.
constexpr int kPeriod = 2048;

class FramePainter {
 public:
  FramePainter(const Map& map, Point camera, int time)
      : map_(map),
        time_(wrap(time, kPeriod)),
        camera_{wrap(camera.x, kWorldSize), wrap(camera.y, kWorldSize)} {
    left_ = camera_.x / kCellSize * kCellSize;
    for (int k = 0; k < kColumns + 2; ++k) {
      columns_[k] = wrap(left_ / kCellSize + k - 1, kWorldCells);
    }
  }

  void paint(uint8_t* rgb, uint8_t* terrain) {
    for (int row = 0; row < kCameraHeight; ++row) paint_ground_row(row, terrain);
    draw_critters();
    draw_objects();
    draw_landmarks();
    pass_clouds();
    cut(rgb);
  }

 private:
  // Blends the control points of three rows of cells into one row of them.
  void read_row(int y) {
    const int cy = y / kCellSize;
    const int west = kWestWeight[y % kCellSize], east = kEastWeight[y % kCellSize];
    const int above = wrap(cy - 1, kWorldCells), below = wrap(cy + 1, kWorldCells);
    for (int k = 0; k < kColumns + 2; ++k) {
      const int x = columns_[k];
      const auto blend = [&](int16_t Ground::*f) {
        return spline(map_.cell(x, above).*f, map_.cell(x, cy).*f, map_.cell(x, below).*f, west,
                      east);
      };
      row_[k] = {blend(&Ground::height), blend(&Ground::forest), blend(&Ground::mountain),
                 blend(&Ground::river),  blend(&Ground::road),   blend(&Ground::light),
                 blend(&Ground::warp_x), blend(&Ground::warp_y)};
    }
  }

  // The sixteen values of a field in column k of the row; the same as Map::ground_at.
  Lanes read(int k, int16_t Ground::*field) const {
    const int centre = row_[k + 1].*field;
    const auto step = [&](int side) {
      return static_cast<int16_t>(std::clamp(side - centre, -kMaxStep, kMaxStep));
    };
    const int16_t west = step(row_[k].*field), east = step(row_[k + 2].*field);
    return broadcast(centre) +
           ((load_lanes(kWestWeight.data()) * west + load_lanes(kEastWeight.data()) * east) >>
            kSplineShift);
  }

  void paint_ground_row(int row, uint8_t* terrain) {
    const int y = wrap(camera_.y + row, kWorldSize);
    read_row(y);
    // The shore breathes: foam reaches further in and out every 64 frames.
    const int breath = (time_ & 63) < 32 ? time_ & 31 : 31 - (time_ & 31);
    const Lanes foam_reach = broadcast(12 + breath / 2);
    for (int k = 0; k < kColumns; ++k) {
      const int x = left_ + k * kCellSize;
      const Lanes wobble = textures().border.at(x, y);
      GroundRow g;
      g.height = read(k, &Ground::height) + (wobble >> 1);
      g.forest = read(k, &Ground::forest) + (wobble >> 1);
      g.mountain = read(k, &Ground::mountain) - (wobble >> 1);
      g.river = read(k, &Ground::river);
      g.road = read(k, &Ground::road);
      g.light = read(k, &Ground::light);
      g.grain = textures().grain.at(x, y);
      // Crests 32 px apart roll southward, half a pixel a frame; the grain breaks them into dashes.
      const Lanes phase = (broadcast(y - time_ / 2) + (wobble >> 3)) & 31;
      g.wave = min(clamp(8 - abs(phase - 16), 0, 6) * 3, clamp(g.grain + 12, 0, 18));

      const ColorLanes color = paint_cell_row(g, k, x, y, foam_reach);
      store_bytes(color.r, &planes_.r.rows[row][k * kCellSize]);
      store_bytes(color.g, &planes_.g.rows[row][k * kCellSize]);
      store_bytes(color.b, &planes_.b.rows[row][k * kCellSize]);
      if (terrain != nullptr) write_terrain(g, x - camera_.x, terrain + row * kCameraWidth);
    }
  }

  const Palette& palette(int region) const { return palette_of(map_.spec().regions[region].theme); }

  // A cell on a border between regions is painted once for each, and every pixel takes its own.
  ColorLanes paint_cell_row(const GroundRow& g, int k, int x, int y, Lanes foam_reach) const {
    const uint8_t plain = map_.cell_region(columns_[k + 1], y / kCellSize);
    if (plain != Map::kMixedRegion) return paint_ground(g, palette(plain), foam_reach);
    const Lanes warp_x = read(k, &Ground::warp_x), warp_y = read(k, &Ground::warp_y);
    Lanes regions;
    for (int i = 0; i < kCellSize; ++i) {
      regions[i] = static_cast<int16_t>(Map::region_of(x + i + warp_x[i], y + warp_y[i]));
    }
    ColorLanes color = paint_ground(g, palette(regions[0]), foam_reach);
    for (int i = 1; i < kCellSize; ++i) {
      if (regions[i] == regions[i - 1]) continue;
      color.choose(regions == broadcast(regions[i]),
                   paint_ground(g, palette(regions[i]), foam_reach));
    }
    return color;
  }

  // `left` is the column of the first value on the screen, perhaps outside of it.
  static void write_terrain(const GroundRow& g, int left, uint8_t* row) {
    for (int i = 0; i < kCellSize; ++i) {
      if (left + i < 0 || left + i >= kCameraWidth) continue;
      const Ground ground = {
          g.height[i], g.forest[i], g.mountain[i], g.river[i], g.road[i], 0, 0, 0};
      row[left + i] = static_cast<uint8_t>(terrain_of(ground));
    }
  }

  // (x, y) is the top-left corner in the world, near the camera without wrapping.
  void draw(const Sprite& s, int x, int y) {
    const int to_x = x - left_, to_y = y - camera_.y;
    const int x0 = std::max(0, -to_x), x1 = std::min(s.width, kPlaneWidth - to_x);
    const int y0 = std::max(0, -to_y), y1 = std::min(s.height, kCameraHeight - to_y);
    for (int row = y0; row < y1; ++row) {
      const size_t from = static_cast<size_t>(row) * s.width;
      draw_row(&s.r[from], &s.keep[from], planes_.r.rows[to_y + row] + to_x, x0, x1);
      draw_row(&s.g[from], &s.keep[from], planes_.g.rows[to_y + row] + to_x, x0, x1);
      draw_row(&s.b[from], &s.keep[from], planes_.b.rows[to_y + row] + to_x, x0, x1);
    }
  }

  static void draw_row(const uint8_t* color, const uint8_t* keep, uint8_t* __restrict to, int begin,
                       int end) {
    for (int i = begin; i < end; ++i)
      to[i] = static_cast<uint8_t>(color[i] + ((to[i] * keep[i] + 255) >> 8));
  }

  // Calls visit(column, row, world x, world y of the corner) for all cells of a grid within
  // `margin` px of the screen.
  template <typename Visit>
  void visit_grid(int size, int margin, const Visit& visit) const {
    const auto first = [&](int v) { return (v - margin + kWorldSize) / size - kWorldSize / size; };
    const int count = kWorldSize / size;
    for (int cy = first(camera_.y); cy * size < camera_.y + kCameraHeight + margin; ++cy) {
      for (int cx = first(camera_.x); cx * size < camera_.x + kCameraWidth + margin; ++cx) {
        visit(wrap(cx, count), wrap(cy, count), cx * size, cy * size);
      }
    }
  }

  void draw_objects() {
    visit_grid(kObjectGrid, 12, [&](int column, int row, int x, int y) {
      const Object& o = map_.object(column, row);
      if (o.kind == ObjectKind::none) return;
      draw(object_sprite(o.theme, o.kind, o.variant), x + o.dx, y + o.dy - 8);
    });
  }

  void draw_landmarks() {
    visit_grid(kLandmarkGrid, 0, [&](int column, int row, int x, int y) {
      const LandmarkPlace& mark = map_.landmark(column, row);
      if (!mark.present) return;
      const Sprite& sprite = landmark_sprite(mark.kind, mark.color);
      draw(sprite, x + mark.x % kLandmarkGrid - sprite.width / 2,
           y + mark.y % kLandmarkGrid - sprite.height / 2);
    });
  }

  void draw_critters() {
    visit_grid(kCritterGrid, 0, [&](int column, int row, int x, int y) {
      const Critter& c = map_.critter(column, row);
      if (!c.present) return;
      const int angle = c.phase + c.speed * time_;
      const bool faces_east = (sine(angle) < 0) == (c.speed > 0);
      draw(critter_sprite(c.theme, faces_east),
           x + c.x % kCritterGrid + ((c.radius_x * sine(angle + 64)) >> 8) - 8,
           y + c.y % kCritterGrid + ((c.radius_y * sine(angle)) >> 8) - 8);
    });
  }

  // A parabola in place of a sine: `turn` in 1/256 of a round, the result from -256 to 256.
  static int sine(int turn) {
    const int half = turn & 127;
    const int v = half * (128 - half) / 16;
    return (turn & 128) == 0 ? v : -v;
  }

  void pass_clouds() {
    const Weather weather = map_.spec().weather;
    if (weather == Weather::clear) return;
    const bool heavy = weather == Weather::heavy;
    const int reach = heavy ? 40 : 18;  // darkest shade, 1/256
    const int drift = heavy ? time_ : time_ / 2;
    for (int row = 0; row < kCameraHeight; ++row) {
      for (int k = 0; k < kColumns; ++k) {
        const Lanes cloud =
            textures().cloud.at(left_ + k * kCellSize + drift, camera_.y + row + drift / 2);
        const Lanes shade = clamp(cloud - 6, 0, reach);
        for (Plane* plane : {&planes_.r, &planes_.g, &planes_.b}) {
          uint8_t* to = &plane->rows[row][k * kCellSize];
          const Lanes color = load_lanes(to);
          store_bytes(color - ((color * shade + 128) >> 8), to);
        }
      }
    }
  }

  void cut(uint8_t* rgb) const {
    const int shift = camera_.x - left_;
    for (int row = 0; row < kCameraHeight; ++row) {
      const uint8_t* r = planes_.r.rows[row] + shift;
      const uint8_t* g = planes_.g.rows[row] + shift;
      const uint8_t* b = planes_.b.rows[row] + shift;
      uint8_t* __restrict to = rgb + row * kCameraWidth * 3;
      for (int x = 0; x < kCameraWidth; ++x) {
        to[3 * x] = r[x];
        to[3 * x + 1] = g[x];
        to[3 * x + 2] = b[x];
      }
    }
  }

  const Map& map_;
  int time_;                   // in [0, kPeriod)
  Point camera_;               // on the torus
  int left_;                   // world x of the first column of the planes
  int columns_[kColumns + 2];  // cells, one more on either side
  Ground row_[kColumns + 2];
  Planes planes_;
};

}  // namespace

// Built twice, with everything inlined: for any x86-64 and for AVX2, chosen when the library is
// loaded. (ThreadSanitizer cannot run code while the loader chooses.)
#if defined(__x86_64__) && !defined(__AVX2__) && !defined(__clang__) && \
    !defined(__SANITIZE_THREAD__)
__attribute__((target_clones("avx2", "default"), flatten))
#endif
void render_frame(const Map& map, Point camera, int time, uint8_t* rgb, uint8_t* terrain) {
  FramePainter(map, camera, time).paint(rgb, terrain);
}

}  // namespace longtake::overworld
