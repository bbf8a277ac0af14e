#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "overworld/map.h"

// What a person can do: move the camera. Action i leads from frame i to frame i + 1.
namespace longtake::overworld {

// The eight directions clockwise from the north, first slow (4 px a frame on each axis that moves),
// then fast (8 px).
enum class Action : uint8_t {
  stay,
  north,
  north_east,
  east,
  south_east,
  south,
  south_west,
  west,
  north_west,
  fast_north,
  fast_north_east,
  fast_east,
  fast_south_east,
  fast_south,
  fast_south_west,
  fast_west,
  fast_north_west,
};

inline constexpr int kNumDirections = 8;
inline constexpr int kNumActions = 1 + 2 * kNumDirections;
inline constexpr int kSlowStep = 4;  // px a frame
inline constexpr int kFastStep = 8;

constexpr Action move(int direction, bool fast) {
  return static_cast<Action>(1 + (direction & 7) + (fast ? kNumDirections : 0));
}

// What the camera moves by, in px.
Point step_of(Action action);

// The way back at the same speed; stay for stay.
Action opposite(Action action);

inline constexpr int64_t kMaxRepeats = 1'000'000;
inline constexpr int64_t kMaxActions = 10'000'000;

// "wd*20" in a text of actions, whoever is to act: keys and how often they are pressed.
struct ActionToken {
  std::string_view keys;
  int64_t repeats;
  std::string_view text;
  size_t position;  // of the token in the text
};

// Calls use() for every token of a text: keys, or "*N" behind them to repeat, separated by blanks
// or commas. Throws Error that names the token and its position; what keys there are is for use()
// to say.
void read_actions(std::string_view text, const std::function<void(const ActionToken&)>& use);

// Throws Error (kUsage): "actions: token "x" at character 3: expected ...".
[[noreturn]] void fail(const ActionToken& token, std::string_view expected);

// Reads "w*20 d*8 WD*40 .*5": keys w a s d (north, west, south, east), two keys for a diagonal,
// capitals for fast,
// "." to stay, "*N" to repeat; separated by blanks or commas. Throws Error that names the token and
// its position.
std::vector<Action> parse_actions(std::string_view text);

// The short form that parse_actions reads back.
std::string format_actions(std::span<const Action> actions);

}  // namespace longtake::overworld
