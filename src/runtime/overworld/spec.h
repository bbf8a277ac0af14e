#pragma once

#include <array>
#include <cstdint>
#include <string_view>

// What a map is made of, in words: the part of the world that a prompt can describe.
namespace longtake::overworld {

// All lengths are in world pixels. The world is a torus.
inline constexpr int kCameraWidth = 256;
inline constexpr int kCameraHeight = 128;
inline constexpr int kCellSize = 16;     // one terrain cell, one token of the model
inline constexpr int kWorldCells = 192;  // cells on a side
inline constexpr int kWorldSize = kWorldCells * kCellSize;  // 3072
inline constexpr int kRegionsPerSide = 3;
inline constexpr int kNumRegions = kRegionsPerSide * kRegionsPerSide;
inline constexpr int kRegionSize = kWorldSize / kRegionsPerSide;  // 1024
inline constexpr int kMiddleRegion = 4;

enum class Theme : uint8_t { summer, autumn, winter, desert, alien, candy, volcanic, night };
enum class Sea : uint8_t { dry, lakes, islands };
enum class Forest : uint8_t { open, woods, dense };
enum class Landmark : uint8_t { tower, well, ruin, obelisk, windmill, tent, shrine, fountain };
enum class LandmarkColor : uint8_t { red, blue, yellow, white, black, orange, green, violet };
enum class Weather : uint8_t { clear, soft, heavy };
enum class Terrain : uint8_t {
  deep,
  shallow,
  beach,
  meadow,
  grass,
  forest,
  rock,
  snow,
  road,
  bridge
};

inline constexpr int kNumThemes = 8;
inline constexpr int kNumSeas = 3;
inline constexpr int kNumForests = 3;
inline constexpr int kNumLandmarks = 8;
inline constexpr int kNumLandmarkColors = 8;
inline constexpr int kNumWeathers = 3;
inline constexpr int kNumTerrains = 10;

// Row-major from the north west; y grows southward.
inline constexpr std::array<std::string_view, kNumRegions> kRegionNames = {
    "north west", "north",      "north east", "west",      "middle",
    "east",       "south west", "south",      "south east"};
inline constexpr std::array<std::string_view, kNumThemes> kThemeNames = {
    "summer", "autumn", "winter", "desert", "alien", "candy", "volcanic", "night"};
inline constexpr std::array<std::string_view, kNumLandmarks> kLandmarkNames = {
    "tower", "well", "ruin", "obelisk", "windmill", "tent", "shrine", "fountain"};
inline constexpr std::array<std::string_view, kNumLandmarkColors> kLandmarkColorNames = {
    "red", "blue", "yellow", "white", "black", "orange", "green", "violet"};

struct RegionSpec {
  Theme theme = Theme::summer;
  Sea sea = Sea::lakes;
  Forest forest = Forest::woods;
  Landmark landmark = Landmark::tower;
  LandmarkColor color = LandmarkColor::red;
  bool mentioned = true;  // whether the prompt speaks of it

  bool operator==(const RegionSpec&) const = default;
};

struct MapSpec {
  std::array<RegionSpec, kNumRegions> regions;
  Weather weather = Weather::clear;
  bool one_land = false;  // one sentence describes the whole map; all regions are alike

  bool operator==(const MapSpec&) const = default;
};

// A random map. Three in four describe all nine regions; the others a few of them, or one land for
// the whole map.
MapSpec sample_spec(uint64_t seed);

}  // namespace longtake::overworld
