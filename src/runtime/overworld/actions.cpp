#include "overworld/actions.h"

#include <algorithm>
#include <array>
#include <cctype>

#include "base/error.h"

namespace longtake::overworld {

namespace {

constexpr std::array<Point, kNumDirections> kDirections = {
    {{0, -1}, {1, -1}, {1, 0}, {1, 1}, {0, 1}, {-1, 1}, {-1, 0}, {-1, -1}}};

constexpr std::array<std::string_view, kNumActions> kActionKeys = {
    ".", "w", "wd", "d", "sd", "s", "sa", "a", "wa", "W", "WD", "D", "SD", "S", "SA", "A", "WA"};

bool is_separator(char c) {
  return c == ',' || std::isspace(static_cast<unsigned char>(c)) != 0;
}

// The keys of a token in any order, such as "dw" for "wd".
Action action_of(const ActionToken& token) {
  const std::string swapped(token.keys.rbegin(), token.keys.rend());
  for (int i = 0; i < kNumActions; ++i) {
    if (token.keys == kActionKeys[i] || swapped == kActionKeys[i]) return static_cast<Action>(i);
  }
  fail(token, "keys w a s d, two of them for a diagonal, all capitals for fast, or \".\" to stay");
}

// What follows a "*".
int64_t repeats_of(std::string_view digits, const ActionToken& token) {
  constexpr std::string_view kExpected = "a whole number from 1 to 1000000 after \"*\"";
  if (digits.empty() || digits.size() > 7) fail(token, kExpected);
  int64_t n = 0;
  for (const char c : digits) {
    if (c < '0' || c > '9') fail(token, kExpected);
    n = n * 10 + (c - '0');
  }
  if (n < 1 || n > kMaxRepeats) fail(token, kExpected);
  return n;
}

}  // namespace

Point step_of(Action action) {
  if (action == Action::stay) return {0, 0};
  const int index = static_cast<int>(action) - 1;
  const int px = index < kNumDirections ? kSlowStep : kFastStep;
  const Point d = kDirections[index % kNumDirections];
  return {d.x * px, d.y * px};
}

Action opposite(Action action) {
  if (action == Action::stay) return action;
  const int index = static_cast<int>(action) - 1;
  return move(index % kNumDirections + kNumDirections / 2, index >= kNumDirections);
}

void fail(const ActionToken& token, std::string_view expected) {
  constexpr size_t kShown = 24;
  std::string shown;
  for (const char c : token.text.substr(0, kShown))
    shown += std::isprint(static_cast<unsigned char>(c)) != 0 ? c : '?';
  if (token.text.size() > kShown) shown += "...";
  throw Error(ErrorKind::kUsage, str("actions: token \"", shown, "\" at character ",
                                     token.position + 1, ": expected ", expected));
}

void read_actions(std::string_view text, const std::function<void(const ActionToken&)>& use) {
  int64_t count = 0;
  size_t i = 0;
  while (true) {
    while (i < text.size() && is_separator(text[i])) ++i;
    if (i == text.size()) return;
    const size_t begin = i;
    while (i < text.size() && !is_separator(text[i])) ++i;
    ActionToken token{text.substr(begin, i - begin), 1, text.substr(begin, i - begin), begin};
    const size_t star = token.text.find('*');
    if (star != token.text.npos) {
      token.keys = token.text.substr(0, star);
      token.repeats = repeats_of(token.text.substr(star + 1), token);
    }
    count += token.repeats;
    if (count > kMaxActions) fail(token, "at most 10000000 actions in all");
    use(token);
  }
}

std::vector<Action> parse_actions(std::string_view text) {
  std::vector<Action> actions;
  read_actions(text, [&](const ActionToken& token) {
    actions.insert(actions.end(), static_cast<size_t>(token.repeats), action_of(token));
  });
  return actions;
}

std::string format_actions(std::span<const Action> actions) {
  std::string text;
  for (size_t i = 0; i < actions.size();) {
    const size_t limit = std::min(actions.size(), i + static_cast<size_t>(kMaxRepeats));
    size_t end = i;
    while (end < limit && actions[end] == actions[i]) ++end;
    if (!text.empty()) text += ' ';
    text += kActionKeys[static_cast<size_t>(actions[i])];
    if (end - i > 1) text += '*' + std::to_string(end - i);
    i = end;
  }
  return text;
}

}  // namespace longtake::overworld
