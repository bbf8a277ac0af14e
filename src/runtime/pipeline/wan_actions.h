// What a person presses, as the inputs of Matrix-Game 2: a row of keyboard and mouse for every
// pixel frame, and the rows that a chunk's latent frames see.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "device/context.h"
#include "models/wan/action_module.h"
#include "models/wan/config.h"

namespace longtake {

// Which of the released models it is, by what its files show.
enum class ActionKind : uint8_t {
  kWalk,   // four keys and the mouse: to walk and to look around
  kDrive,  // two keys, and the mouse steers
  kRun     // one of seven things at a time, no mouse
};

// Throws Error (kInput) for inputs that none of the released models has.
ActionKind action_kind(const wan::ActionConfig& config);

// The name of options_of_family for it.
const char* family_of(ActionKind kind);

// Row i leads from pixel frame i to pixel frame i + 1.
struct ActionRows {
  std::vector<float> keyboard;  // [count, keyboard_keys]
  std::vector<float> mouse;     // [count, kMouseAxes], or empty

  int64_t count(int64_t keyboard_keys) const {
    return static_cast<int64_t>(keyboard.size()) / keyboard_keys;
  }
};

// Reads the grammar of overworld/actions.h with the keys of the model:
//   kWalk   w s a d: forward, back, left, right; i k j l: look up, down, left, right
//   kDrive  w s: forward, back; a d: steer left, right
//   kRun    w s: jump, slide; a d: to the left, right side; j l: turn left, right
// Several at once where they do not contradict each other, "." for none. Throws Error (kUsage) that
// names the token.
ActionRows parse_actions(std::string_view text, ActionKind kind);

// For someone who asked for nothing in particular.
const char* gentle_actions(ActionKind kind);

// Writes what the latent frames from first_frame on see of the rows: frame f those of pixel frames
// 4 f - 12 .. 4 f - 1, where what lies before the video is like its first row. Rows that end begin
// again.
class ActionWindows {
 public:
  // At least one row.
  ActionWindows(Context& ctx, const wan::TransformerConfig& config, ActionRows rows,
                const wan::Controls& controls);

  void fill(Context& ctx, int64_t first_frame, wan::Controls& controls);

 private:
  int64_t keyboard_keys_, count_;
  ActionRows rows_;
  Tensor keyboard_, mouse_;  // as Controls has them, on the host
};

}  // namespace longtake
