#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <limits>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "overworld/actions.h"
#include "overworld/c_api.h"
#include "overworld/map.h"
#include "overworld/paths.h"
#include "overworld/prompt.h"
#include "overworld/render.h"
#include "overworld/rng.h"

namespace longtake::overworld {
namespace {

using Frame = std::vector<uint8_t>;

Frame frame_of(const Map& map, Point camera, int time) {
  Frame rgb(kFrameBytes);
  render_frame(map, camera, time, rgb.data());
  return rgb;
}

uint64_t checksum(const Frame& frame) {
  uint64_t sum = 0;
  for (const uint8_t byte : frame) sum = mix_bits(sum ^ byte);
  return sum;
}

Map map_of_seed(uint64_t seed) {
  return Map(seed, sample_spec(seed));
}

Map map_of_theme(uint64_t seed, Theme theme) {
  MapSpec spec = sample_spec(seed);
  for (RegionSpec& region : spec.regions) region.theme = theme;
  return Map(seed, spec);
}

// ---- pixels

// The pictures are part of what the shipped model learned: they may not change by compiler, flags
// or machine. If they are changed on purpose, train again and take the new numbers from this test's
// output.
TEST(Render, GoldenChecksums) {
  constexpr std::array<uint64_t, 4> kGolden = {0xdb71a004116f9ae8, 0x04e0ba09d9208b30,
                                               0x2a2397d79bd92dbe, 0x1ef5ef1374409cb6};
  std::array<uint64_t, 4> found{};
  for (size_t i = 0; i < found.size(); ++i) {
    const Map map = map_of_seed(100 + i);
    Frame all;
    for (int k = 0; k < 12; ++k) {
      const Frame frame = frame_of(map, {map.start().x + k * 260, map.start().y + k * 212}, k * 37);
      all.insert(all.end(), frame.begin(), frame.end());
    }
    found[i] = checksum(all);
    std::printf("golden[%zu] = 0x%016llx\n", i, static_cast<unsigned long long>(found[i]));
  }
  EXPECT_EQ(found, kGolden);
}

TEST(Render, SameSeedSamePixels) {
  const Map a = map_of_seed(5), b = map_of_seed(5), other = map_of_seed(6);
  EXPECT_EQ(frame_of(a, a.start(), 9), frame_of(b, b.start(), 9));
  EXPECT_NE(frame_of(a, a.start(), 9), frame_of(other, other.start(), 9));
}

TEST(Render, WorldIsATorus) {
  const Map map = map_of_seed(7);
  const Frame frame = frame_of(map, {3000, 2990}, 3);
  EXPECT_EQ(frame, frame_of(map, {3000 - kWorldSize, 2990 + 2 * kWorldSize}, 3));
}

TEST(Render, AnyTimeAndPlaceIsFine) {
  const Map map = map_of_seed(7);
  constexpr int kLast = std::numeric_limits<int>::max(), kFirst = std::numeric_limits<int>::min();
  EXPECT_EQ(frame_of(map, {8, 8}, 5), frame_of(map, {8, 8}, 5 + 2048));
  frame_of(map, {kLast, kFirst}, kLast);
  frame_of(map, {kFirst, kLast}, kFirst);
  EXPECT_LT(map.region_at(kLast, kFirst), kNumRegions);
}

// A pixel belongs to its place: what two cameras both see at one time is equal, byte for byte.
TEST(Render, OverlappingViewsAgree) {
  for (uint64_t seed = 0; seed < 6; ++seed) {
    const Map map = map_of_seed(seed);
    for (const Point shift : {Point{4, 0}, {0, 8}, {52, 36}, {-101, 63}}) {
      Rng rng(hash_bits(seed, 1, shift.x));
      const Point camera = {rng.below(kWorldSize), rng.below(kWorldSize)};
      const int time = rng.below(2000);
      const Frame a = frame_of(map, camera, time);
      const Frame b = frame_of(map, {camera.x + shift.x, camera.y + shift.y}, time);
      for (int y = std::max(0, shift.y); y < kCameraHeight + std::min(0, shift.y); ++y) {
        for (int x = std::max(0, shift.x); x < kCameraWidth + std::min(0, shift.x); ++x) {
          const size_t i = static_cast<size_t>(y * kCameraWidth + x) * 3;
          const size_t j = static_cast<size_t>((y - shift.y) * kCameraWidth + x - shift.x) * 3;
          ASSERT_TRUE(a[i] == b[j] && a[i + 1] == b[j + 1] && a[i + 2] == b[j + 2])
              << "seed " << seed << " camera " << camera.x << "," << camera.y << " shift "
              << shift.x << "," << shift.y << " pixel " << x << "," << y;
        }
      }
    }
  }
}

// Water, critters and clouds move gently: neighbouring frames of a camera at rest differ by little,
// but do differ.
TEST(Render, TimeMovesGently) {
  double difference = 0;
  int64_t count = 0;
  for (uint64_t seed = 0; seed < 16; ++seed) {
    const Map map = map_of_seed(seed);
    const Frame a = frame_of(map, map.start(), 40), b = frame_of(map, map.start(), 42);
    for (size_t i = 0; i < a.size(); ++i) difference += std::abs(a[i] - b[i]);
    count += static_cast<int64_t>(a.size());
  }
  EXPECT_GT(difference / static_cast<double>(count), 0.02);
  EXPECT_LT(difference / static_cast<double>(count), 3.0);
}

// Terrain classes agree with the surface that objects and prompts are made from.
TEST(Render, TerrainMatchesTheMap) {
  const Map map = map_of_seed(3);
  Frame rgb(kFrameBytes);
  std::vector<uint8_t> terrain(kCameraWidth * kCameraHeight);
  int equal = 0, all = 0;
  for (int k = 0; k < 20; ++k) {
    const Point camera = {k * 151, k * 307};
    render_frame(map, camera, 0, rgb.data(), terrain.data());
    for (int i = 0; i < kCameraWidth * kCameraHeight; i += 37, ++all) {
      const Ground ground = map.ground_at(camera.x + i % kCameraWidth, camera.y + i / kCameraWidth);
      ASSERT_LT(terrain[static_cast<size_t>(i)], kNumTerrains);
      equal += terrain[static_cast<size_t>(i)] == static_cast<uint8_t>(terrain_of(ground)) ? 1 : 0;
    }
  }
  EXPECT_GT(equal, all * 85 / 100);  // the rest are wobbling borders
}

using Histogram = std::array<double, 64>;

Histogram histogram_of(const Frame& frame) {
  Histogram h{};
  for (size_t i = 0; i < frame.size(); i += 3) {
    h[static_cast<size_t>(frame[i] >> 6) * 16 + static_cast<size_t>(frame[i + 1] >> 6) * 4 +
      (frame[i + 2] >> 6)] += 1.0 / (kCameraWidth * kCameraHeight);
  }
  return h;
}

// Colours alone tell the themes apart, anywhere in the world, over water too.
TEST(Render, ThemesAreUnmistakable) {
  constexpr int kTrain = 96, kTest = 48;
  std::vector<std::pair<Histogram, int>> known;
  constexpr int kMaps = 6;
  std::vector<Map> maps;
  for (int i = 0; i < kNumThemes * kMaps; ++i) {
    maps.push_back(map_of_theme(50 + static_cast<uint64_t>(i), static_cast<Theme>(i / kMaps)));
  }
  const auto sample = [&](int theme, int i) {
    const Map& map = maps[static_cast<size_t>(theme * kMaps + i % kMaps)];
    Rng rng(hash_bits(map.seed(), 77, i, theme));
    const int x = rng.below(kWorldSize);
    return histogram_of(frame_of(map, {x, rng.below(kWorldSize)}, i));
  };
  for (int theme = 0; theme < kNumThemes; ++theme) {
    for (int i = 0; i < kTrain; ++i) known.emplace_back(sample(theme, i), theme);
  }
  int right = 0;
  for (int theme = 0; theme < kNumThemes; ++theme) {
    for (int i = kTrain; i < kTrain + kTest; ++i) {
      const Histogram h = sample(theme, i);
      const auto distance = [&](const Histogram& other) {
        double sum = 0;
        for (size_t k = 0; k < h.size(); ++k) sum += std::abs(h[k] - other[k]);
        return sum;
      };
      const auto nearest = std::min_element(
          known.begin(), known.end(),
          [&](const auto& a, const auto& b) { return distance(a.first) < distance(b.first); });
      right += nearest->second == theme ? 1 : 0;
    }
  }
  std::printf("themes told apart: %d of %d\n", right, kNumThemes * kTest);
  EXPECT_GE(right, kNumThemes * kTest * 98 / 100);
}

// ---- maps

TEST(Map, SharesFollowTheSpec) {
  for (const Sea sea : {Sea::dry, Sea::lakes, Sea::islands}) {
    MapSpec spec = sample_spec(9);
    for (RegionSpec& region : spec.regions) {
      region.sea = sea;
      region.forest = Forest::dense;
    }
    const Map map(9, spec);
    int water = 0, forest = 0, all = 0;
    for (int y = 0; y < kWorldSize; y += 16) {
      for (int x = 0; x < kWorldSize; x += 16, ++all) {
        const Ground g = map.ground_at(x, y);
        water += g.height < kBeachHeight ? 1 : 0;
        forest += terrain_of(g) == Terrain::forest ? 1 : 0;
      }
    }
    const double share = 100.0 * water / all;
    constexpr double kLow[] = {0, 12, 33}, kHigh[] = {4, 22, 44};
    EXPECT_GE(share, kLow[static_cast<int>(sea)]);
    EXPECT_LE(share, kHigh[static_cast<int>(sea)]);
    EXPECT_GT(100 * forest / all, 18);
  }
}

TEST(Map, RegionsLieWhereTheirNamesSay) {
  for (uint64_t seed = 0; seed < 8; ++seed) {
    const Map map = map_of_seed(seed);
    for (int i = 0; i < kNumRegions; ++i) {
      const int x = i % 3 * kRegionSize + kRegionSize / 2,
                y = i / 3 * kRegionSize + kRegionSize / 2;
      EXPECT_EQ(map.region_at(x, y), i);
      EXPECT_EQ(map.region_at(x - kWorldSize, y + kWorldSize), i);
    }
  }
}

TEST(Map, OtherThemesLeaveTheLandAlone) {
  for (uint64_t seed = 40; seed < 43; ++seed) {
    const Map map = map_of_seed(seed);
    std::array<Theme, kNumRegions> themes;
    MapSpec spec = map.spec();
    for (int r = 0; r < kNumRegions; ++r) {
      themes[r] =
          static_cast<Theme>((static_cast<int>(spec.regions[r].theme) + 1 + r) % kNumThemes);
      spec.regions[r].theme = themes[r];
    }
    const Map built(seed, spec), changed = map.with_themes(themes);
    int seen_changed = 0;
    for (int k = 0; k < 12; ++k) {
      const Point camera = {k * 251, k * 397};
      EXPECT_EQ(frame_of(changed, camera, k * 9), frame_of(built, camera, k * 9))
          << seed << ' ' << k;
      seen_changed += frame_of(changed, camera, k * 9) != frame_of(map, camera, k * 9);
    }
    EXPECT_GE(seen_changed, 9) << seed;  // the open sea looks alike under every theme
  }
}

TEST(Map, StartIsInTheMiddleWithSomethingToSee) {
  int with_landmark = 0;
  constexpr int kMaps = 40;
  for (uint64_t seed = 0; seed < kMaps; ++seed) {
    const Map map = map_of_seed(seed);
    const Point start = map.start();
    EXPECT_EQ(start.x % 8, 0);
    EXPECT_EQ(start.y % 8, 0);
    EXPECT_EQ(map.region_at(start.x + kCameraWidth / 2, start.y + kCameraHeight / 2),
              kMiddleRegion);
    for (int i = 0; i < kLandmarkCells * kLandmarkCells; ++i) {
      const LandmarkPlace& mark = map.landmark(i % kLandmarkCells, i / kLandmarkCells);
      const int x = mark.x - start.x, y = mark.y - start.y;
      if (mark.present && x >= 0 && x < kCameraWidth && y >= 0 && y < kCameraHeight) {
        ++with_landmark;
        break;
      }
    }
  }
  EXPECT_GE(with_landmark, kMaps * 85 / 100);
}

TEST(Map, EveryDescribedLandmarkStandsInItsRegion) {
  int regions = 0, with_landmark = 0;
  for (uint64_t seed = 0; seed < 12; ++seed) {
    const Map map = map_of_seed(seed);
    std::set<int> found;
    for (int i = 0; i < kLandmarkCells * kLandmarkCells; ++i) {
      const LandmarkPlace& mark = map.landmark(i % kLandmarkCells, i / kLandmarkCells);
      if (!mark.present) continue;
      const int region = map.region_at(mark.x, mark.y + 24);
      EXPECT_EQ(mark.kind, map.spec().regions[static_cast<size_t>(region)].landmark);
      EXPECT_EQ(mark.color, map.spec().regions[static_cast<size_t>(region)].color);
      found.insert(region);
    }
    regions += kNumRegions;
    with_landmark += static_cast<int>(found.size());
  }
  EXPECT_GE(with_landmark, regions - 1);
}

// ---- actions

TEST(Actions, ReadsTheGrammar) {
  const auto actions = parse_actions("w*2 d,WD\n.*2  dw");
  const std::vector<Action> expected = {Action::north,           Action::north, Action::east,
                                        Action::fast_north_east, Action::stay,  Action::stay,
                                        Action::north_east};
  EXPECT_EQ(actions, expected);
  EXPECT_TRUE(parse_actions(" ,\t").empty());
}

TEST(Actions, StepsAreInPixels) {
  EXPECT_EQ(step_of(Action::stay), (Point{0, 0}));
  EXPECT_EQ(step_of(Action::north), (Point{0, -4}));
  EXPECT_EQ(step_of(Action::fast_south_west), (Point{-8, 8}));
  for (int i = 0; i < kNumActions; ++i) {
    const Action action = static_cast<Action>(i);
    const Point there = step_of(action), back = step_of(opposite(action));
    EXPECT_EQ(there.x + back.x, 0);
    EXPECT_EQ(there.y + back.y, 0);
  }
}

TEST(Actions, PrintsWhatItReads) {
  EXPECT_EQ(format_actions(parse_actions("w w w D . .")), "w*3 D .*2");
  for (int i = 0; i < kNumActions; ++i) {
    const std::vector<Action> one = {static_cast<Action>(i)};
    EXPECT_EQ(parse_actions(format_actions(one)), one);
  }
}

TEST(Actions, NamesTheBadToken) {
  const auto message = [](const std::string& text) -> std::string {
    try {
      parse_actions(text);
    } catch (const Error& e) {
      EXPECT_EQ(e.kind(), ErrorKind::kUsage);
      return e.what();
    }
    return "";
  };
  EXPECT_EQ(message("w*3 q*2"),
            "actions: token \"q*2\" at character 5: expected keys w a s d, two of them for a "
            "diagonal, all capitals "
            "for fast, or \".\" to stay");
  for (const char* bad : {"ws", "wD", "wdd", "*3", "ad", "..", "w\x01", "\xff\xfe"}) {
    EXPECT_NE(message(bad).find("expected keys"), std::string::npos) << bad;
  }
  for (const char* bad :
       {"w*", "w*0", "w*-1", "w*1000001", "w*99999999999999999999", "w*2*3", "w*x", "w*+1"}) {
    EXPECT_NE(message(bad).find("expected a whole number"), std::string::npos) << bad;
  }
  EXPECT_NE(message(std::string(5000, 'x')).find("...\""), std::string::npos);
  std::string too_many;
  for (int i = 0; i < 11; ++i) too_many += "w*1000000 ";
  EXPECT_NE(message(too_many).find("at most 10000000"), std::string::npos);
}

// ---- paths

struct Statistics {
  double revisited;  // of the late frames: within 8 px of a pose at least 40 frames ago
  double repeated;   // of all frames: at a pose that occurred before
  double diagonal, fast;
};

Statistics statistics_of(PathKind kind, int num_frames) {
  constexpr int kPaths = 24;
  int late = 0, seen = 0, again = 0, diagonal = 0, fast = 0, moving = 0;
  for (uint64_t seed = 0; seed < kPaths; ++seed) {
    const auto path = make_path(kind, num_frames, seed);
    const auto poses = poses_of({0, 0}, path);
    std::set<std::pair<int, int>> known;
    for (int i = 0; i < num_frames; ++i) {
      const Point p = poses[static_cast<size_t>(i)];
      again += known.insert({p.x, p.y}).second ? 0 : 1;
      const Point step = step_of(path[static_cast<size_t>(i)]);
      moving += path[static_cast<size_t>(i)] != Action::stay ? 1 : 0;
      diagonal += step.x != 0 && step.y != 0 ? 1 : 0;
      fast += std::max(std::abs(step.x), std::abs(step.y)) == kFastStep ? 1 : 0;
      if (i < num_frames / 2) continue;
      ++late;
      for (int k = 0; k + 40 < i; ++k) {
        const Point q = poses[static_cast<size_t>(k)];
        if (std::abs(p.x - q.x) <= 8 && std::abs(p.y - q.y) <= 8) {
          ++seen;
          break;
        }
      }
    }
  }
  return {1.0 * seen / late, 1.0 * again / (kPaths * num_frames), 1.0 * diagonal / moving,
          1.0 * fast / moving};
}

TEST(Paths, HaveTheirCharacter) {
  for (const int frames : {240, 1280}) {
    const Statistics explore = statistics_of(PathKind::explore, frames);
    EXPECT_GE(explore.revisited, 0.60);
    EXPECT_GT(explore.diagonal, 0.15);
    EXPECT_LT(explore.diagonal, 0.45);
    EXPECT_GT(explore.fast, 0.3);
    EXPECT_LT(explore.fast, 0.7);
    EXPECT_GE(statistics_of(PathKind::returning, frames).repeated, 0.45);
    const Statistics off_phase = statistics_of(PathKind::off_phase, frames);
    EXPECT_EQ(off_phase.repeated, 0);
    EXPECT_GE(off_phase.revisited, 0.3);
    EXPECT_EQ(statistics_of(PathKind::steady, frames).revisited, 0);
  }
}

TEST(Paths, HaveTheLengthAskedFor) {
  for (int kind = 0; kind < kNumPathKinds; ++kind) {
    for (const int frames : {1, 2, 3, 7, 33, 2048}) {
      const auto path = make_path(static_cast<PathKind>(kind), frames, 1);
      EXPECT_EQ(static_cast<int>(path.size()), frames);
      EXPECT_EQ(path[0], Action::stay);
      EXPECT_EQ(path, make_path(static_cast<PathKind>(kind), frames, 1));
    }
  }
}

// ---- prompts

TEST(Prompt, RoundTrip) {
  int full = 0;
  for (uint64_t seed = 0; seed < 1000; ++seed) {
    const MapSpec spec = sample_spec(seed);
    const std::string text = describe(spec, seed);
    const MapSpec read = parse_prompt(text, seed + 1'000'000);
    EXPECT_EQ(read.one_land, spec.one_land) << text;
    for (size_t i = 0; i < kNumRegions; ++i) {
      const RegionSpec &a = spec.regions[i], &b = read.regions[i];
      ASSERT_EQ(a.mentioned, b.mentioned) << kRegionNames[i] << ": " << text;
      if (!a.mentioned) continue;
      if (spec.one_land) {
        ASSERT_EQ(a.theme, b.theme) << text;  // the rest may be left out
      } else {
        ASSERT_EQ(a, b) << kRegionNames[i] << ": " << text;
        ++full;
      }
    }
  }
  EXPECT_GT(full, 6000);
}

TEST(Prompt, LengthAndVocabulary) {
  std::vector<size_t> lengths;
  for (uint64_t seed = 0; seed < 1000; ++seed) {
    const auto ids = tokenize(describe(sample_spec(seed), seed * 7));
    EXPECT_EQ(std::count(ids.begin(), ids.end(), kUnknownToken), 0);
    EXPECT_LE(ids.size(), static_cast<size_t>(kMaxPromptTokens));
    lengths.push_back(ids.size());
  }
  std::sort(lengths.begin(), lengths.end());
  std::printf("prompt tokens: min %zu, median %zu, max %zu; vocabulary %zu\n", lengths[0],
              lengths[500], lengths[999], vocabulary().size());
  EXPECT_GE(vocabulary().size(), 300u);
  EXPECT_LE(vocabulary().size(), 450u);
  EXPECT_EQ(vocabulary()[kPadToken], "<pad>");
  EXPECT_EQ(vocabulary()[kUnknownToken], "<unk>");
  EXPECT_TRUE(std::is_sorted(vocabulary().begin() + 2, vocabulary().end()));
}

TEST(Prompt, ReadsWhatAPersonTypes) {
  const MapSpec spec = parse_prompt(
      "In the North-West: a snowy forest with a red Tower! The southern part is full of LAVA, "
      "and in the east there are sand dunes with blue wells; heavy clouds.",
      4);
  EXPECT_EQ(spec.regions[0].theme, Theme::winter);
  EXPECT_EQ(spec.regions[0].forest, Forest::dense);
  EXPECT_EQ(spec.regions[0].landmark, Landmark::tower);
  EXPECT_EQ(spec.regions[0].color, LandmarkColor::red);
  EXPECT_EQ(spec.regions[7].theme, Theme::volcanic);
  EXPECT_EQ(spec.regions[5].theme, Theme::desert);
  EXPECT_EQ(spec.regions[5].landmark, Landmark::well);
  EXPECT_EQ(spec.regions[5].color, LandmarkColor::blue);
  EXPECT_EQ(spec.weather, Weather::heavy);
  EXPECT_FALSE(spec.regions[kMiddleRegion].mentioned);

  const MapSpec one = parse_prompt("a candy world", 4);
  EXPECT_TRUE(one.one_land);
  for (const RegionSpec& region : one.regions) EXPECT_EQ(region.theme, Theme::candy);

  EXPECT_FALSE(parse_prompt("", 4).one_land);
  EXPECT_FALSE(parse_prompt("\xff xyzzy ... ,,,", 4).regions[kMiddleRegion].mentioned);
}

TEST(Prompt, TokenizerSplitsPunctuation) {
  const auto ids = tokenize("A RED tower, xyzzy.");
  ASSERT_EQ(ids.size(), 6u);
  EXPECT_EQ(vocabulary()[static_cast<size_t>(ids[1])], "red");
  EXPECT_EQ(vocabulary()[static_cast<size_t>(ids[3])], ",");
  EXPECT_EQ(ids[4], kUnknownToken);
  EXPECT_EQ(vocabulary()[static_cast<size_t>(ids[5])], ".");
  EXPECT_TRUE(tokenize(" \n").empty());
}

// ---- the C ABI

TEST(CApi, AgreesWithTheLibraryOnAnyNumberOfThreads) {
  ow_pool* pool = ow_pool_create(20, 3, 2);
  ASSERT_NE(pool, nullptr) << ow_last_error();
  constexpr int kFrames = 7;
  std::vector<int32_t> maps, x, y, t;
  std::vector<uint8_t> expected;
  for (int i = 0; i < kFrames; ++i) {
    maps.push_back(i % 3);
    x.push_back(i * 300 - 500);
    y.push_back(i * 77);
    t.push_back(i * 10);
    const Frame frame =
        frame_of(map_of_seed(20 + static_cast<uint64_t>(i) % 3), {x.back(), y.back()}, t.back());
    expected.insert(expected.end(), frame.begin(), frame.end());
  }
  for (const int threads : {1, 2, 5}) {
    std::vector<uint8_t> rgb(static_cast<size_t>(kFrames) * kFrameBytes), classes(rgb.size() / 3);
    ASSERT_EQ(ow_render(pool, kFrames, maps.data(), x.data(), y.data(), t.data(), threads,
                        rgb.data(), classes.data()),
              0);
    EXPECT_EQ(rgb, expected);
  }
  std::array<int32_t, 57> info{};
  ASSERT_EQ(ow_map_info(pool, 1, info.data()), 0);
  EXPECT_EQ(info[0], static_cast<int>(sample_spec(21).regions[0].theme));
  std::vector<char> text(8192);
  EXPECT_GT(ow_prompt(pool, 1, 3, text.data(), 8192), 0);
  std::vector<int32_t> poses(3 * 50 * 2);
  std::vector<uint8_t> actions(3 * 50);
  ASSERT_EQ(ow_paths(pool, 1, 50, 0, 0, poses.data(), actions.data()), 0);
  EXPECT_EQ(poses[100], info[55]);
  EXPECT_EQ(poses[101], info[56]);
  ow_pool_destroy(pool);

  const char* prompts[] = {"a snowy land .", "a candy land ."};
  pool = ow_pool_from_prompts(prompts, 2, 1, 1);
  ASSERT_NE(pool, nullptr);
  ASSERT_EQ(ow_map_info(pool, 1, info.data()), 0);
  EXPECT_EQ(info[4], static_cast<int>(Theme::candy));
  ow_pool_destroy(pool);
}

TEST(CApi, ReportsBadCalls) {
  EXPECT_EQ(ow_pool_create(0, 0, 1), nullptr);
  EXPECT_NE(std::string(ow_last_error()).find("maps, found 0"), std::string::npos);
  ow_pool* pool = ow_pool_create(0, 1, 1);
  ASSERT_NE(pool, nullptr);
  int32_t numbers[57] = {};
  char text[4];
  EXPECT_LT(ow_map_info(pool, 1, numbers), 0);
  EXPECT_LT(ow_region_at(nullptr, 0, 0, 0), 0);
  EXPECT_LT(ow_prompt(pool, 0, 0, text, 4), 0);
  EXPECT_LT(ow_tokenize("a b c", numbers, 2), 0);
  EXPECT_LT(ow_paths(pool, 0, 0, 0, 0, numbers, nullptr), 0);
  EXPECT_EQ(ow_vocab_word(-1), nullptr);
  EXPECT_EQ(ow_vocab_word(ow_vocab_size()), nullptr);
  ow_pool_destroy(pool);
}

// ---- speed: printed; the bounds only catch a disaster

TEST(Speed, FramesAndMaps) {
  // Processor time: other programs do not disturb it.
  const auto seconds = [](std::clock_t since) {
    return static_cast<double>(std::clock() - since) / CLOCKS_PER_SEC;
  };
  constexpr int kMaps = 10, kFrames = 1000;
  std::clock_t begin = std::clock();
  for (uint64_t seed = 0; seed < kMaps; ++seed) map_of_seed(seed);
  const double map_ms = seconds(begin) * 1e3 / kMaps;
  const Map map = map_of_seed(0);
  Frame frame(kFrameBytes);
  begin = std::clock();
  for (int i = 0; i < kFrames; ++i) render_frame(map, {i * 8, i * 4}, i, frame.data());
  const double frames_per_second = kFrames / seconds(begin);
  std::printf("%.2f ms a map, %.0f frames/s on one core\n", map_ms, frames_per_second);
  EXPECT_GT(frames_per_second, 20);
}

}  // namespace
}  // namespace longtake::overworld
