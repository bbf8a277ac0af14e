#include "overworld/spec.h"

#include "overworld/rng.h"

namespace longtake::overworld {

namespace {

constexpr uint64_t kSpecStream = 0x5350;
constexpr int kShortFormPercent = 25;
constexpr int kOneLandPercent = 45;  // of the short forms
constexpr int kLikeNeighbourPercent =
    25;  // a region takes the theme of its western or northern neighbour

template <typename Enum>
Enum pick(Rng& rng, int count) {
  return static_cast<Enum>(rng.below(count));
}

}  // namespace

MapSpec sample_spec(uint64_t seed) {
  Rng rng(hash_bits(seed, kSpecStream));
  MapSpec spec;
  for (int i = 0; i < kNumRegions; ++i) {
    RegionSpec& region = spec.regions[i];
    region.theme = pick<Theme>(rng, kNumThemes);
    if (i > 0 && rng.chance(kLikeNeighbourPercent)) {
      const bool from_west = i % kRegionsPerSide > 0 && (i < kRegionsPerSide || rng.chance(50));
      const int neighbour = from_west || i < kRegionsPerSide ? i - 1 : i - kRegionsPerSide;
      region.theme = spec.regions[neighbour].theme;
    }
    region.sea = pick<Sea>(rng, kNumSeas);
    region.forest = pick<Forest>(rng, kNumForests);
    region.landmark = pick<Landmark>(rng, kNumLandmarks);
    region.color = pick<LandmarkColor>(rng, kNumLandmarkColors);
  }
  spec.weather = pick<Weather>(rng, kNumWeathers);

  if (!rng.chance(kShortFormPercent)) return spec;
  if (rng.chance(kOneLandPercent)) {
    spec.one_land = true;
    spec.regions.fill(spec.regions[kMiddleRegion]);
    return spec;
  }
  const int keep_percent = rng.between(5, 90);
  for (RegionSpec& region : spec.regions) region.mentioned = rng.chance(keep_percent);
  spec.regions[kMiddleRegion].mentioned = true;  // where every film starts
  return spec;
}

}  // namespace longtake::overworld
