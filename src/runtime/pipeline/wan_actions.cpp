#include "pipeline/wan_actions.h"

#include <algorithm>
#include <array>
#include <span>
#include <utility>

#include "base/error.h"
#include "models/wan/decoder.h"
#include "ops/copy.h"
#include "overworld/actions.h"

namespace longtake {
namespace {

using overworld::ActionToken;

constexpr float kLook = 0.1F;  // what the mouse moves by in a frame

// One thing that a person can do.
struct Key {
  char name;
  int column;       // of the keyboard; -1: the mouse
  float up, right;  // of the mouse
};

constexpr Key kWalkKeys[] = {{'w', 0, 0, 0},       {'s', 1, 0, 0},      {'a', 2, 0, 0},
                             {'d', 3, 0, 0},       {'i', -1, kLook, 0}, {'k', -1, -kLook, 0},
                             {'j', -1, 0, -kLook}, {'l', -1, 0, kLook}};
constexpr Key kDriveKeys[] = {
    {'w', 0, 0, 0}, {'s', 1, 0, 0}, {'a', -1, 0, -kLook}, {'d', -1, 0, kLook}};
constexpr Key kRunKeys[] = {{'w', 1, 0, 0}, {'s', 2, 0, 0}, {'j', 3, 0, 0},
                            {'l', 4, 0, 0}, {'a', 5, 0, 0}, {'d', 6, 0, 0}};
constexpr int kRunNothing = 0;  // the column of "no move"

// Pairs of keys that cannot be pressed together.
constexpr const char* kOpposites[] = {"ws", "ad", "ik", "jl"};

struct Scheme {
  ActionKind kind;
  const char* family;
  std::span<const Key> keys;
  int64_t num_columns;
  bool has_mouse;
  const char* expected;
  const char* gentle;
};

constexpr Scheme kSchemes[] = {
    {ActionKind::kWalk, "matrix-game-2", kWalkKeys, 4, true,
     "keys w s a d to walk, i k j l to look up, down, left and right, several of them without "
     "opposites, or \".\" for none",
     "w*48 wl*36 w*24 wj*36"},
    {ActionKind::kDrive, "matrix-game-2-drive", kDriveKeys, 2, true,
     "keys w s for forward and back, a d to steer, two of them without opposites, or \".\" for "
     "none",
     "w*48 wd*24 w*24 wa*24"},
    {ActionKind::kRun, "matrix-game-2-run", kRunKeys, 7, false,
     "one of the keys w to jump, s to slide, a d to change sides, j l to turn, or \".\" for none",
     ".*24 w*12 .*24 a*12 .*24 s*12 .*24 d*12"}};

const Scheme& scheme_of(ActionKind kind) {
  return kSchemes[static_cast<size_t>(kind)];
}

// What a token's keys are, as one row.
ActionRows row_of(const ActionToken& token, const Scheme& scheme) {
  ActionRows row;
  row.keyboard.assign(static_cast<size_t>(scheme.num_columns), 0);
  if (scheme.has_mouse) row.mouse.assign(wan::kMouseAxes, 0);
  if (token.keys.empty()) fail(token, scheme.expected);
  const std::string_view pressed = token.keys == "." ? "" : token.keys;
  const auto times = [&](char key) { return std::count(pressed.begin(), pressed.end(), key); };
  for (const char name : pressed) {
    const auto key = std::find_if(scheme.keys.begin(), scheme.keys.end(),
                                  [&](const Key& known) { return known.name == name; });
    if (key == scheme.keys.end() || times(name) > 1) fail(token, scheme.expected);
    if (key->column >= 0) {
      row.keyboard[static_cast<size_t>(key->column)] = 1;
    } else {
      row.mouse[0] += key->up;
      row.mouse[1] += key->right;
    }
  }
  for (const char* pair : kOpposites) {
    if (times(pair[0]) + times(pair[1]) > 1) fail(token, scheme.expected);
  }
  if (scheme.kind == ActionKind::kRun) {
    if (pressed.size() > 1) fail(token, scheme.expected);
    if (pressed.empty()) row.keyboard[kRunNothing] = 1;
  }
  return row;
}

}  // namespace

ActionKind action_kind(const wan::ActionConfig& config) {
  for (const Scheme& scheme : kSchemes) {
    if (scheme.num_columns == config.keyboard_keys && scheme.has_mouse == config.has_mouse)
      return scheme.kind;
  }
  throw Error(ErrorKind::kInput,
              str("action modules: expected 4 or 2 keys with a mouse or 7 without one, found ",
                  config.keyboard_keys, config.has_mouse ? " with" : " without", " one"));
}

const char* family_of(ActionKind kind) {
  return scheme_of(kind).family;
}

ActionRows parse_actions(std::string_view text, ActionKind kind) {
  ActionRows rows;
  overworld::read_actions(text, [&](const ActionToken& token) {
    const ActionRows row = row_of(token, scheme_of(kind));
    for (int64_t n = 0; n < token.repeats; ++n) {
      rows.keyboard.insert(rows.keyboard.end(), row.keyboard.begin(), row.keyboard.end());
      rows.mouse.insert(rows.mouse.end(), row.mouse.begin(), row.mouse.end());
    }
  });
  return rows;
}

const char* gentle_actions(ActionKind kind) {
  return scheme_of(kind).gentle;
}

ActionWindows::ActionWindows(Context& ctx, const wan::TransformerConfig& config, ActionRows rows,
                             const wan::Controls& controls)
    : keyboard_keys_(config.actions.keyboard_keys),
      count_(rows.count(keyboard_keys_)),
      rows_(std::move(rows)),
      keyboard_(Tensor::staging(ctx.device(), DType::kF32, controls.keyboard.shape())) {
  LONGTAKE_CHECK(count_ > 0, "no actions");
  if (config.actions.has_mouse)
    mouse_ = Tensor::staging(ctx.device(), DType::kF32, controls.mouse.shape());
}

void ActionWindows::fill(Context& ctx, int64_t first_frame, wan::Controls& controls) {
  const int64_t num_frames = controls.num_frames();
  const int64_t window = wan::kActionWindow * wan::kMouseAxes;
  const int64_t places = mouse_.empty() ? 0 : mouse_.dim(0) / num_frames;
  auto* keyboard = keyboard_.data<float>();
  for (int64_t f = 0; f < num_frames; ++f) {
    const int64_t begin = wan::kFramesPerLatent * (first_frame + f) - wan::kActionWindow;
    std::array<float, wan::kActionWindow * wan::kMouseAxes> seen{};
    for (int64_t i = 0; i < wan::kActionWindow; ++i) {
      const int64_t row = std::max<int64_t>(begin + i, 0) % count_;
      keyboard =
          std::copy_n(rows_.keyboard.begin() + row * keyboard_keys_, keyboard_keys_, keyboard);
      if (!mouse_.empty())
        std::copy_n(rows_.mouse.begin() + row * wan::kMouseAxes, wan::kMouseAxes,
                    seen.begin() + i * wan::kMouseAxes);
    }
    for (int64_t place = 0; place < places; ++place)
      std::copy_n(seen.begin(), window, mouse_.data<float>() + (f * places + place) * window);
  }
  copy(ctx, keyboard_, controls.keyboard);
  if (!mouse_.empty()) copy(ctx, mouse_, controls.mouse);
}

}  // namespace longtake
