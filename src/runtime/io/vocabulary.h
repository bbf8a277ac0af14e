// The words a model knows: a text file, one word a line, line number = id; 0 is padding, 1 unknown.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace longtake {

class Vocabulary {
 public:
  static constexpr int32_t kPadding = 0;
  static constexpr int32_t kUnknown = 1;

  Vocabulary() = default;
  // `what` names the text in errors.
  Vocabulary(std::string_view text, const std::string& what);

  size_t size() const { return words_.size(); }

  // Lower case, "." and "," apart. A prompt without words is one unknown word.
  std::vector<int32_t> tokenize(std::string_view prompt) const;

  // The prompt's words that tokenize() turns into kUnknown, each once.
  std::vector<std::string> unknown_words(std::string_view prompt) const;

 private:
  std::vector<std::string> words_;
  std::unordered_map<std::string, int32_t> ids_;
};

}  // namespace longtake
