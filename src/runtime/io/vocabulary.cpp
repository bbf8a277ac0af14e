#include "io/vocabulary.h"

#include <algorithm>

#include "base/error.h"

namespace longtake {
namespace {

constexpr size_t kMaxWords = 1 << 20;

// ASCII only: the vocabulary's words are ASCII, other bytes belong to unknown words.
char lower(char c) {
  return c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
}

bool is_space(char c) {
  return c == ' ' || (c >= '\t' && c <= '\r');
}

std::vector<std::string> split_words(std::string_view prompt) {
  std::vector<std::string> words;
  std::string word;
  const auto finish = [&] {
    if (!word.empty()) words.push_back(std::move(word));
    word.clear();
  };
  for (const char c : prompt) {
    if (is_space(c)) {
      finish();
    } else if (c == '.' || c == ',') {
      finish();
      words.emplace_back(1, c);
    } else {
      word += lower(c);
    }
  }
  finish();
  return words;
}

}  // namespace

Vocabulary::Vocabulary(std::string_view text, const std::string& what) {
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find('\n', begin), text.size());
    std::string word(text.substr(begin, end - begin));
    if (word.empty() || words_.size() == kMaxWords)
      throw Error(ErrorKind::kInput,
                  str(what, ": line ", words_.size() + 1, ": expected one word a line and at most ",
                      kMaxWords, " lines, found ", word.empty() ? "an empty line" : "more"));
    const auto id = static_cast<int32_t>(words_.size());
    if (!ids_.emplace(word, id).second)
      throw Error(ErrorKind::kInput,
                  str(what, ": line ", id + 1, ": expected every word once, found one twice"));
    words_.push_back(std::move(word));
    begin = end + 1;
  }
  if (words_.size() <= kUnknown)
    throw Error(ErrorKind::kInput, str(what, ": expected at least 2 words, found ", words_.size()));
}

std::vector<int32_t> Vocabulary::tokenize(std::string_view prompt) const {
  std::vector<int32_t> out;
  for (const std::string& word : split_words(prompt)) {
    const auto found = ids_.find(word);
    out.push_back(found == ids_.end() ? kUnknown : found->second);
  }
  if (out.empty()) out.push_back(kUnknown);
  return out;
}

std::vector<std::string> Vocabulary::unknown_words(std::string_view prompt) const {
  std::vector<std::string> out;
  for (const std::string& word : split_words(prompt)) {
    if (ids_.count(word) == 0 && std::find(out.begin(), out.end(), word) == out.end())
      out.push_back(word);
  }
  return out;
}

}  // namespace longtake
