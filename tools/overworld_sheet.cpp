// Pictures of the embedded world, to look at: a contact sheet (one row per theme, columns along a
// walk), a whole map at 1/8 scale, or one frame.
//
//   overworld_sheet themes OUT.png [SEED]     8 themes x 6 times of an exploring walk
//   overworld_sheet maps OUT.png [SEED]       8 maps of consecutive seeds x 6 times of a steady
//   walk overworld_sheet torus OUT.png [SEED]      the whole world, 384 x 384 overworld_sheet frame
//   OUT.png [SEED]      the first frame
#include <png.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <string>
#include <vector>

#include "base/error.h"
#include "overworld/paths.h"
#include "overworld/render.h"

namespace {

using namespace longtake;
using namespace longtake::overworld;

struct Picture {
  int width, height;
  std::vector<uint8_t> rgb;

  Picture(int w, int h) : width(w), height(h), rgb(static_cast<size_t>(w) * h * 3) {}

  void paste(const std::vector<uint8_t>& frame, int x, int y) {
    for (int row = 0; row < kCameraHeight; ++row) {
      std::copy_n(&frame[static_cast<size_t>(row) * kCameraWidth * 3], kCameraWidth * 3,
                  &rgb[(static_cast<size_t>(y + row) * width + x) * 3]);
    }
  }
};

void write_png(const Picture& picture, const std::string& path) {
  png_image image{};
  image.version = PNG_IMAGE_VERSION;
  image.width = static_cast<png_uint_32>(picture.width);
  image.height = static_cast<png_uint_32>(picture.height);
  image.format = PNG_FORMAT_RGB;
  if (png_image_write_to_file(&image, path.c_str(), 0, picture.rgb.data(), 0, nullptr) == 0) {
    throw Error(path + ": expected to write a PNG, found: " + image.message);
  }
}

std::vector<uint8_t> frame_of(const Map& map, Point camera, int time) {
  std::vector<uint8_t> frame(kFrameBytes);
  render_frame(map, camera, time, frame.data());
  return frame;
}

Picture contact_sheet(const std::vector<Map>& maps, PathKind kind) {
  constexpr int kTimes = 6, kInterval = 40;
  const int rows = static_cast<int>(maps.size());
  Picture sheet(kTimes * kCameraWidth, rows * kCameraHeight);
  for (int row = 0; row < rows; ++row) {
    const Map& map = maps[static_cast<size_t>(row)];
    const auto poses = poses_of(map.start(), make_path(kind, kTimes * kInterval, map.seed()));
    for (int k = 0; k < kTimes; ++k) {
      const int time = k * kInterval;
      sheet.paste(frame_of(map, poses[static_cast<size_t>(time)], time), k * kCameraWidth,
                  row * kCameraHeight);
    }
  }
  return sheet;
}

Picture theme_sheet(uint64_t seed) {
  std::vector<Map> maps;
  for (int theme = 0; theme < kNumThemes; ++theme) {
    MapSpec spec = sample_spec(seed + static_cast<uint64_t>(theme));
    for (RegionSpec& region : spec.regions) region.theme = static_cast<Theme>(theme);
    maps.emplace_back(seed + static_cast<uint64_t>(theme), spec);
  }
  return contact_sheet(maps, PathKind::explore);
}

Picture map_sheet(uint64_t seed) {
  constexpr int kMaps = 8;
  std::vector<Map> maps;
  for (uint64_t s = seed; s < seed + kMaps; ++s) maps.emplace_back(s, sample_spec(s));
  return contact_sheet(maps, PathKind::steady);
}

Picture torus(uint64_t seed) {
  constexpr int kScale = 8;
  const Map map(seed, sample_spec(seed));
  Picture whole(kWorldSize, kWorldSize);
  for (int y = 0; y < kWorldSize; y += kCameraHeight) {
    for (int x = 0; x < kWorldSize; x += kCameraWidth) whole.paste(frame_of(map, {x, y}, 0), x, y);
  }
  Picture small(kWorldSize / kScale, kWorldSize / kScale);
  for (size_t i = 0; i < small.rgb.size(); ++i) {
    const size_t channel = i % 3, x = i / 3 % static_cast<size_t>(small.width),
                 y = i / 3 / static_cast<size_t>(small.width);
    int sum = 0;
    for (size_t k = 0; k < kScale * kScale; ++k) {
      sum += whole.rgb[((y * kScale + k / kScale) * kWorldSize + x * kScale + k % kScale) * 3 +
                       channel];
    }
    small.rgb[i] = static_cast<uint8_t>(sum / (kScale * kScale));
  }
  return small;
}

Picture first_frame(uint64_t seed) {
  const Map map(seed, sample_spec(seed));
  Picture picture(kCameraWidth, kCameraHeight);
  picture.paste(frame_of(map, map.start(), 0), 0, 0);
  return picture;
}

uint64_t parse_seed(const char* text) {
  char* end = nullptr;
  const uint64_t seed = std::strtoull(text, &end, 10);
  if (end == text || *end != '\0') {
    throw Error(ErrorKind::kUsage, str("seed: expected a whole number, found \"", text, '"'));
  }
  return seed;
}

int run(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  if (argc < 3 || argc > 4)
    throw Error(ErrorKind::kUsage, "usage: overworld_sheet themes|maps|torus|frame OUT.png [SEED]");
  const uint64_t seed = argc > 3 ? parse_seed(argv[3]) : 1;
  if (what == "themes") {
    write_png(theme_sheet(seed), argv[2]);
  } else if (what == "maps") {
    write_png(map_sheet(seed), argv[2]);
  } else if (what == "torus") {
    write_png(torus(seed), argv[2]);
  } else if (what == "frame") {
    write_png(first_frame(seed), argv[2]);
  } else {
    throw Error(ErrorKind::kUsage,
                "overworld_sheet: expected themes, maps, torus or frame, found \"" + what + "\"");
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 2;
  }
}
