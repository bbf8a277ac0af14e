#include "overworld/sprites.h"

#include <algorithm>
#include <array>
#include <initializer_list>

#include "overworld/palette.h"

namespace longtake::overworld {

namespace {

// A small software painter. Shapes are given in pixels of the sprite; every pixel is sampled 4 x 4
// times, so edges are smooth. Integers only: the same sprites on every machine.
class Canvas {
 public:
  struct Corner {
    int x, y;
  };

  Canvas(int width, int height)
      : width_(width), height_(height), pixels_(static_cast<size_t>(width) * height) {}

  // `light` in 1/256 is the difference between the north western and the south eastern side.
  void ellipse(int cx, int cy, int rx, int ry, Color color, int light = 0) {
    const int64_t a = rx * kUnit, b = ry * kUnit;
    fill({cx - rx, cy - ry, cx + rx, cy + ry}, color, light, [&](int x, int y) {
      const int64_t dx = x - cx * kUnit, dy = y - cy * kUnit;
      return dx * dx * b * b + dy * dy * a * a <= a * a * b * b;
    });
  }

  void ring(int cx, int cy, int rx, int ry, int inner_rx, int inner_ry, Color color,
            int light = 0) {
    const int64_t a = rx * kUnit, b = ry * kUnit, c = inner_rx * kUnit, d = inner_ry * kUnit;
    fill({cx - rx, cy - ry, cx + rx, cy + ry}, color, light, [&](int x, int y) {
      const int64_t dx = x - cx * kUnit, dy = y - cy * kUnit;
      return dx * dx * b * b + dy * dy * a * a <= a * a * b * b &&
             dx * dx * d * d + dy * dy * c * c > c * c * d * d;
    });
  }

  void rectangle(int left, int top, int right, int bottom, Color color, int light = 0) {
    fill({left, top, right, bottom}, color, light, [&](int x, int y) {
      return x >= left * kUnit && x < right * kUnit && y >= top * kUnit && y < bottom * kUnit;
    });
  }

  // Convex, corners in clockwise order on the screen.
  void polygon(std::initializer_list<Corner> corners, Color color, int light = 0) {
    Box box{width_, height_, 0, 0};
    for (const Corner& c : corners) {
      box = {std::min(box.left, c.x), std::min(box.top, c.y), std::max(box.right, c.x),
             std::max(box.bottom, c.y)};
    }
    fill(box, color, light, [&](int x, int y) {
      const Corner* from = corners.end() - 1;
      for (const Corner& to : corners) {
        const int64_t cross = static_cast<int64_t>(to.x - from->x) * (y - from->y * kUnit) -
                              static_cast<int64_t>(to.y - from->y) * (x - from->x * kUnit);
        if (cross < 0) return false;
        from = &to;
      }
      return true;
    });
  }

  // A soft dark spot on the ground. Paint it first.
  void shadow(int cx, int cy, int rx, int ry) {
    for (int y = 0; y < height_; ++y) {
      for (int x = 0; x < width_; ++x) {
        const int dx = (2 * x + 1 - 2 * cx) * 128 / rx, dy = (2 * y + 1 - 2 * cy) * 128 / ry;
        const int distance = (dx * dx + dy * dy) >> 8;  // 256 on the rim
        over(at(x, y), {0, 0, 20}, std::clamp((256 - distance) / 2, 0, 88));
      }
    }
  }

  // Darkens the pixels around what was painted, so that it stands out from any ground.
  void outline(Color color, int strength) {
    std::vector<int> alpha(pixels_.size());
    std::transform(pixels_.begin(), pixels_.end(), alpha.begin(),
                   [](const Pixel& p) { return p.solid; });
    const auto solid = [&](int x, int y) {
      return x < 0 || y < 0 || x >= width_ || y >= height_ ? 0 : alpha[y * width_ + x];
    };
    for (int y = 0; y < height_; ++y) {
      for (int x = 0; x < width_; ++x) {
        const int near =
            std::max({solid(x - 1, y), solid(x + 1, y), solid(x, y - 1), solid(x, y + 1)});
        const int here = solid(x, y);
        if (near > here) under(at(x, y), color, (near - here) * strength / 256);
      }
    }
  }

  Sprite sprite() const {
    Sprite s{width_, height_, {}, {}, {}, {}};
    for (const Pixel& p : pixels_) {
      s.r.push_back(static_cast<uint8_t>(p.r));
      s.g.push_back(static_cast<uint8_t>(p.g));
      s.b.push_back(static_cast<uint8_t>(p.b));
      s.keep.push_back(static_cast<uint8_t>(255 - p.alpha));
    }
    return s;
  }

 private:
  static constexpr int kUnit = 8;  // sample positions in 1/8 px

  struct Pixel {
    int r = 0, g = 0, b = 0;  // multiplied by alpha
    int alpha = 0;            // 0 to 255, shadows included
    int solid = 0;            // 0 to 255, without shadows
  };

  struct Box {
    int left, top, right, bottom;
  };

  Pixel& at(int x, int y) { return pixels_[static_cast<size_t>(y) * width_ + x]; }

  static void over(Pixel& p, Color c, int alpha) {
    const int keep = 255 - alpha;
    p.r = (c.r * alpha + p.r * keep) / 255;
    p.g = (c.g * alpha + p.g * keep) / 255;
    p.b = (c.b * alpha + p.b * keep) / 255;
    p.alpha = alpha + p.alpha * keep / 255;
  }

  // Paints behind what is there; shadows (which are not solid) are replaced rather than covered.
  static void under(Pixel& p, Color c, int alpha) {
    const Pixel front = p;
    if (front.solid == 0) return over(p, c, alpha);
    const int room = (255 - front.alpha) * alpha / 255;
    p.r += c.r * room / 255;
    p.g += c.g * room / 255;
    p.b += c.b * room / 255;
    p.alpha += room;
  }

  template <typename Inside>
  void fill(Box box, Color color, int light, const Inside& inside) {
    const int w = std::max(1, box.right - box.left), h = std::max(1, box.bottom - box.top);
    for (int y = std::max(0, box.top); y < std::min(height_, box.bottom); ++y) {
      for (int x = std::max(0, box.left); x < std::min(width_, box.right); ++x) {
        int hits = 0;
        for (int k = 0; k < 16; ++k)
          hits += inside(x * kUnit + 1 + k % 4 * 2, y * kUnit + 1 + k / 4 * 2);
        if (hits == 0) continue;
        const int toward = 256 - (x - box.left) * 256 / w -
                           (y - box.top) * 256 / h;  // 256 north west, -256 south east
        const int alpha = hits * 255 / 16;
        Pixel& p = at(x, y);
        over(p, shaded(color, light * toward / 512), alpha);
        p.solid = alpha + p.solid * (255 - alpha) / 255;
      }
    }
  }

  int width_, height_;
  std::vector<Pixel> pixels_;
};

constexpr Color kInk = {24, 20, 32};
constexpr Color kGold = {246, 206, 84};
constexpr Color kStone = {168, 164, 162};
constexpr Color kWood = {122, 84, 52};
constexpr Color kPlaster = {240, 228, 204};
constexpr int kOutline = 84;  // strength, 1/256
constexpr int kLandmarkOutline = 120;

constexpr int kObjectWidth = 32, kObjectHeight = 40;

void paint_round_tree(Canvas& c, const Palette& p) {
  c.shadow(17, 33, 12, 5);
  c.rectangle(14, 24, 19, 34, p.trunk, 60);
  c.ellipse(16, 16, 13, 12, shaded(p.leaf, -40), 0);
  c.ellipse(16, 15, 13, 12, p.leaf, 70);
  c.ellipse(12, 11, 7, 6, p.leaf_tip, 40);
}

void paint_tall_tree(Canvas& c, const Palette& p) {
  c.shadow(17, 34, 10, 4);
  c.rectangle(14, 28, 18, 35, p.trunk, 60);
  for (int k = 0; k < 3; ++k) {
    const int top = 15 - k * 7, half = 12 - k * 2;
    c.polygon({{16, top}, {16 + half, top + 15}, {16 - half, top + 15}}, p.needle, 90);
    c.polygon({{16, top}, {16 + half / 2, top + 7}, {16 - half / 2, top + 7}}, p.needle_tip, 60);
  }
}

void paint_strange_tree(Canvas& c, const Palette& p, Theme theme) {
  switch (theme) {
    case Theme::desert:  // a cactus
      c.shadow(17, 34, 9, 4);
      c.rectangle(6, 14, 10, 24, p.strange, 60);
      c.rectangle(6, 21, 15, 25, p.strange, 20);
      c.rectangle(22, 10, 26, 20, p.strange, 60);
      c.rectangle(17, 17, 26, 21, p.strange, 20);
      c.ellipse(16, 8, 4, 4, p.strange, 60);
      c.rectangle(12, 8, 20, 34, p.strange, 90);
      c.rectangle(14, 8, 16, 33, p.strange_tip);
      break;
    case Theme::alien:  // a mushroom
      c.shadow(17, 34, 10, 4);
      c.polygon({{13, 18}, {19, 18}, {21, 34}, {11, 34}}, {226, 230, 250}, 90);
      c.ellipse(16, 15, 14, 8, p.strange, 80);
      c.ellipse(10, 13, 3, 2, p.strange_tip);
      c.ellipse(19, 11, 3, 2, p.strange_tip);
      c.ellipse(23, 17, 2, 2, p.strange_tip);
      break;
    case Theme::candy:  // a lollipop
      c.shadow(17, 35, 9, 4);
      c.rectangle(14, 22, 18, 36, p.trunk, 40);
      c.ellipse(16, 14, 12, 12, p.strange, 40);
      c.ring(16, 14, 9, 9, 6, 6, p.strange_tip);
      c.ellipse(16, 14, 3, 3, p.strange_tip);
      break;
    case Theme::winter:
    case Theme::volcanic:  // a bare tree
      c.shadow(17, 34, 9, 4);
      c.polygon({{15, 8}, {18, 8}, {19, 35}, {13, 35}}, p.strange, 70);
      c.polygon({{5, 8}, {8, 8}, {16, 22}, {14, 25}}, p.strange);
      c.polygon({{25, 5}, {28, 6}, {19, 21}, {16, 19}}, p.strange);
      c.ellipse(7, 8, 4, 3, p.strange_tip, 40);
      c.ellipse(26, 6, 4, 3, p.strange_tip, 40);
      c.ellipse(16, 7, 5, 4, p.strange_tip, 40);
      break;
    default:  // a blossom tree of three crowns
      c.shadow(17, 34, 12, 4);
      c.rectangle(14, 24, 18, 35, p.trunk, 60);
      c.ellipse(9, 19, 8, 7, p.strange, 60);
      c.ellipse(23, 19, 8, 7, p.strange, 30);
      c.ellipse(16, 12, 9, 8, p.strange, 60);
      c.ellipse(12, 10, 3, 3, p.strange_tip);
      c.ellipse(20, 15, 3, 3, p.strange_tip);
      c.ellipse(8, 18, 3, 2, p.strange_tip);
      break;
  }
}

void paint_bush(Canvas& c, const Palette& p) {
  c.shadow(17, 31, 11, 4);
  c.ellipse(11, 27, 7, 6, p.leaf, 60);
  c.ellipse(21, 27, 8, 6, p.leaf, 40);
  c.ellipse(16, 24, 8, 7, p.leaf, 80);
  c.ellipse(13, 22, 3, 3, p.leaf_tip);
  c.ellipse(21, 25, 3, 2, p.leaf_tip);
}

void paint_boulder(Canvas& c, const Palette& p) {
  c.shadow(17, 31, 12, 4);
  c.polygon({{9, 20}, {18, 16}, {26, 22}, {28, 31}, {5, 31}}, p.stone, 110);
  c.polygon({{10, 21}, {18, 17}, {21, 21}, {13, 25}}, shaded(p.stone, 70));
}

void paint_reef(Canvas& c, const Palette& p) {
  c.ellipse(16, 26, 14, 8, blend(p.shallow, p.foam, 110));
  c.ellipse(16, 26, 11, 6, p.shallow);
  c.polygon({{9, 19}, {15, 15}, {19, 21}, {20, 29}, {6, 29}}, p.stone, 110);
  c.polygon({{20, 22}, {25, 21}, {27, 29}, {18, 29}}, p.stone, 110);
}

void paint_flowers(Canvas& c, const Palette& p) {
  constexpr Canvas::Corner kSpots[] = {{9, 18}, {20, 15}, {14, 25}, {25, 24}, {7, 29}, {19, 32}};
  int k = 0;
  for (const Canvas::Corner& spot : kSpots) {
    c.ellipse(spot.x, spot.y + 2, 4, 3, p.leaf);
    c.ellipse(spot.x, spot.y, 3, 3, k++ % 2 == 0 ? p.petal : p.petal_other);
    c.ellipse(spot.x, spot.y, 1, 1, kGold);
  }
}

// Blades in the ground's own colours: something to see in a meadow, but hardly.
void paint_tuft(Canvas& c, const Palette& p) {
  const Color dark = shaded(p.grass, -40), light = shaded(p.meadow, 50);
  for (const Canvas::Corner spot : {Canvas::Corner{9, 20}, {22, 17}, {15, 30}}) {
    c.polygon({{spot.x - 4, spot.y - 3}, {spot.x + 1, spot.y + 4}, {spot.x - 2, spot.y + 4}}, dark);
    c.polygon({{spot.x + 5, spot.y - 3}, {spot.x + 3, spot.y + 4}, {spot.x, spot.y + 4}}, dark);
    c.polygon({{spot.x + 1, spot.y - 6}, {spot.x + 3, spot.y + 4}, {spot.x - 1, spot.y + 4}},
              light);
  }
}

void paint_house(Canvas& c, const Palette& p, Color roof) {
  c.shadow(18, 33, 16, 5);
  c.rectangle(5, 19, 27, 34, p.wall, 50);
  c.rectangle(22, 3, 26, 12, p.stone, 40);
  c.polygon({{9, 6}, {23, 6}, {31, 21}, {1, 21}}, roof, 90);
  c.rectangle(2, 19, 30, 21, shaded(roof, -70));
  c.rectangle(13, 25, 19, 34, p.trunk, 30);
  c.rectangle(7, 24, 11, 29, p.window);
  c.rectangle(21, 24, 25, 29, p.window);
}

Sprite paint_object(Theme theme, ObjectKind kind, int variant) {
  const Palette& p = palette_of(theme);
  Canvas c(kObjectWidth, kObjectHeight);
  int outline = kOutline;
  switch (kind) {
    case ObjectKind::round_tree:
      paint_round_tree(c, p);
      break;
    case ObjectKind::tall_tree:
      paint_tall_tree(c, p);
      break;
    case ObjectKind::strange_tree:
      paint_strange_tree(c, p, theme);
      break;
    case ObjectKind::bush:
      paint_bush(c, p);
      break;
    case ObjectKind::boulder:
      paint_boulder(c, p);
      break;
    case ObjectKind::flowers:
      paint_flowers(c, p);
      outline = 0;
      break;
    case ObjectKind::reef:
      paint_reef(c, p);
      outline = 0;
      break;
    case ObjectKind::tuft:
      paint_tuft(c, p);
      outline = 0;
      break;
    case ObjectKind::house: {
      const Color roof = kRoofColors[static_cast<size_t>(variant) % kRoofColors.size()];
      paint_house(c, p,
                  theme == Theme::night    ? shaded(roof, -110)
                  : theme == Theme::winter ? shaded(roof, 90)
                                           : roof);
      break;
    }
    case ObjectKind::none:
      break;
  }
  c.outline(kInk, outline);
  return c.sprite();
}

void paint_tower(Canvas& c, Color color) {
  c.shadow(36, 58, 22, 6);
  c.rectangle(20, 26, 44, 60, kStone, 110);
  c.rectangle(17, 23, 47, 31, shaded(kStone, 40), 80);
  for (int x = 17; x < 47; x += 8) c.rectangle(x, 19, x + 5, 24, shaded(kStone, 40));
  c.polygon({{32, 1}, {50, 22}, {14, 22}}, color, 120);
  c.rectangle(28, 46, 36, 60, kInk);
  c.ellipse(32, 46, 4, 4, kInk);
  c.rectangle(24, 35, 28, 41, kInk);
  c.rectangle(36, 35, 40, 41, kInk);
}

void paint_well(Canvas& c, Color color) {
  c.shadow(35, 55, 26, 8);
  c.rectangle(10, 42, 54, 52, kStone, 90);
  c.ellipse(32, 52, 22, 9, kStone, 90);
  c.ellipse(32, 42, 22, 9, shaded(kStone, 60), 60);
  c.ellipse(32, 42, 16, 6, {36, 60, 96});
  c.rectangle(12, 18, 17, 44, kWood, 60);
  c.rectangle(47, 18, 52, 44, kWood, 60);
  c.rectangle(30, 20, 34, 38, {224, 208, 170});
  c.polygon({{18, 3}, {46, 3}, {60, 22}, {4, 22}}, color, 110);
}

void paint_ruin(Canvas& c, Color color) {
  const Color stone = blend(kStone, {255, 255, 255}, 70);
  c.shadow(34, 57, 31, 7);
  c.rectangle(3, 50, 61, 59, stone, 60);
  constexpr int kTops[] = {14, 26, 8, 34};
  for (int k = 0; k < 4; ++k) {
    const int x = 6 + k * 14;
    c.rectangle(x, kTops[k], x + 9, 51, color, 120);
    c.rectangle(x - 1, kTops[k], x + 10, kTops[k] + 5, stone, 40);
    c.rectangle(x - 1, 46, x + 10, 51, stone, 40);
  }
  c.ellipse(56, 54, 6, 5, stone, 80);
}

void paint_obelisk(Canvas& c, Color color) {
  c.shadow(36, 57, 24, 7);
  c.rectangle(12, 50, 52, 60, kStone, 80);
  c.rectangle(17, 43, 47, 51, shaded(kStone, 50), 80);
  c.polygon({{26, 12}, {38, 12}, {43, 44}, {21, 44}}, color, 40);
  c.polygon({{33, 12}, {38, 12}, {43, 44}, {34, 44}}, shaded(color, -60));
  c.polygon({{32, 1}, {39, 13}, {25, 13}}, kGold, 80);
  c.ellipse(32, 30, 4, 4, kGold);
}

void paint_windmill(Canvas& c, Color color) {
  c.shadow(36, 58, 22, 6);
  c.polygon({{25, 24}, {39, 24}, {46, 60}, {18, 60}}, kPlaster, 100);
  c.ellipse(32, 24, 9, 9, blend(kWood, kInk, 60), 60);
  c.rectangle(28, 48, 36, 60, kWood);
  c.polygon({{31, 20}, {35, 24}, {10, 49}, {3, 42}}, color, 20);
  c.polygon({{54, 1}, {61, 8}, {36, 30}, {32, 26}}, color, 20);
  c.polygon({{10, 1}, {35, 25}, {31, 29}, {3, 8}}, color, 20);
  c.polygon({{33, 25}, {61, 42}, {54, 49}, {29, 28}}, color, 20);
  c.ellipse(32, 25, 4, 4, kInk, 40);
}

void paint_tent(Canvas& c, Color color) {
  const Color stripe = blend(color, {255, 255, 255}, 150);
  c.shadow(34, 57, 30, 7);
  c.polygon({{32, 8}, {62, 58}, {2, 58}}, color, 60);
  c.polygon({{32, 8}, {47, 58}, {39, 58}}, stripe);
  c.polygon({{32, 8}, {25, 58}, {17, 58}}, stripe);
  c.polygon({{32, 26}, {40, 58}, {24, 58}}, kInk);
  c.rectangle(31, 2, 33, 12, kWood);
  c.polygon({{33, 2}, {44, 5}, {33, 9}}, kGold);
}

void paint_shrine(Canvas& c, Color color) {
  c.shadow(34, 57, 29, 6);
  c.rectangle(4, 54, 60, 60, kStone, 60);
  c.rectangle(12, 18, 20, 56, color, 80);
  c.rectangle(44, 18, 52, 56, color, 80);
  c.rectangle(8, 26, 56, 33, color, 40);
  c.polygon({{1, 6}, {63, 6}, {58, 18}, {6, 18}}, shaded(color, -40), 80);
  c.rectangle(1, 5, 63, 9, kGold);
  c.ellipse(32, 46, 7, 8, kGold, 60);
  c.ellipse(32, 46, 4, 5, kPlaster);
}

void paint_fountain(Canvas& c, Color color) {
  const Color water = {96, 190, 236};
  c.shadow(34, 50, 32, 12);
  c.ellipse(32, 44, 30, 17, kStone, 90);
  c.ellipse(32, 42, 30, 16, color, 90);
  c.ellipse(32, 42, 24, 11, water, -40);
  c.rectangle(28, 20, 36, 44, kStone, 90);
  c.ellipse(32, 24, 16, 7, color, 90);
  c.ellipse(32, 22, 12, 4, water);
  c.ellipse(32, 12, 5, 11, {226, 246, 255});
  c.ellipse(18, 40, 3, 2, {226, 246, 255});
  c.ellipse(46, 42, 3, 2, {226, 246, 255});
}

Sprite paint_landmark(Landmark kind, Color color) {
  constexpr int kSize = 64;
  Canvas c(kSize, kSize);
  switch (kind) {
    case Landmark::tower:
      paint_tower(c, color);
      break;
    case Landmark::well:
      paint_well(c, color);
      break;
    case Landmark::ruin:
      paint_ruin(c, color);
      break;
    case Landmark::obelisk:
      paint_obelisk(c, color);
      break;
    case Landmark::windmill:
      paint_windmill(c, color);
      break;
    case Landmark::tent:
      paint_tent(c, color);
      break;
    case Landmark::shrine:
      paint_shrine(c, color);
      break;
    case Landmark::fountain:
      paint_fountain(c, color);
      break;
  }
  c.outline(kInk, kLandmarkOutline);
  return c.sprite();
}

Sprite paint_critter(Theme theme, bool faces_east) {
  const Palette& p = palette_of(theme);
  const int side = faces_east ? 1 : -1;
  Canvas c(16, 16);
  c.shadow(8, 13, 6, 2);
  c.rectangle(4, 10, 6, 14, kInk);
  c.rectangle(10, 10, 12, 14, kInk);
  c.ellipse(8, 8, 6, 5, p.fur, 60);
  c.ellipse(8 + side * 5, 6, 3, 3, shaded(p.fur, -70));
  c.outline(kInk, kOutline);
  return c.sprite();
}

constexpr int kNumObjectKinds = 10;
constexpr int kNumRoofs = static_cast<int>(kRoofColors.size());

struct Atlas {
  // Houses of further roof colours follow the kinds.
  std::array<std::array<Sprite, kNumObjectKinds + kNumRoofs>, kNumThemes> objects;
  std::array<std::array<Sprite, kNumLandmarkColors>, kNumLandmarks> landmarks;
  std::array<std::array<Sprite, 2>, kNumThemes> critters;

  Atlas() {
    for (int t = 0; t < kNumThemes; ++t) {
      const Theme theme = static_cast<Theme>(t);
      for (int k = 0; k < kNumObjectKinds; ++k)
        objects[t][k] = paint_object(theme, static_cast<ObjectKind>(k), 0);
      for (int r = 0; r < kNumRoofs; ++r) {
        objects[t][kNumObjectKinds + r] = paint_object(theme, ObjectKind::house, r);
      }
      for (int east = 0; east < 2; ++east) critters[t][east] = paint_critter(theme, east == 1);
    }
    for (int k = 0; k < kNumLandmarks; ++k) {
      for (int c = 0; c < kNumLandmarkColors; ++c) {
        landmarks[k][c] = paint_landmark(static_cast<Landmark>(k), kLandmarkColors[c]);
      }
    }
  }
};

const Atlas& atlas() {
  static const Atlas instance;
  return instance;
}

}  // namespace

const Sprite& object_sprite(Theme theme, ObjectKind kind, int variant) {
  const auto& sprites = atlas().objects[static_cast<int>(theme)];
  return kind == ObjectKind::house ? sprites[kNumObjectKinds + variant % kNumRoofs]
                                   : sprites[static_cast<int>(kind)];
}

const Sprite& landmark_sprite(Landmark kind, LandmarkColor color) {
  return atlas().landmarks[static_cast<int>(kind)][static_cast<int>(color)];
}

const Sprite& critter_sprite(Theme theme, bool faces_east) {
  return atlas().critters[static_cast<int>(theme)][faces_east ? 1 : 0];
}

}  // namespace longtake::overworld
