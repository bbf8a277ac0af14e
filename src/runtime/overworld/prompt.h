#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "overworld/spec.h"

// Maps in English and back: what a person says about a world, and which world they mean.
namespace longtake::overworld {

inline constexpr int kPadToken = 0;
inline constexpr int kUnknownToken = 1;
inline constexpr int kMaxPromptTokens = 380;  // described prompts are never longer

// Lower-case words, sentences closed by " .", regions in random order, sentences that do not matter
// in between.
std::string describe(const MapSpec& spec, uint64_t seed);

// The best guess at the map that `text` speaks of. Regions and properties that it leaves open are
// random by `seed`; regions that it speaks of are marked as mentioned. Never fails: text without
// any known word gives a random map.
MapSpec parse_prompt(std::string_view text, uint64_t seed);

// Word of each token id: "<pad>", "<unk>", then sorted words.
const std::vector<std::string>& vocabulary();

std::vector<int32_t> tokenize(std::string_view text);

}  // namespace longtake::overworld
