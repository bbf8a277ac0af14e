// Subword tokens by a SentencePiece model file, as the text encoders of the Wan family use them.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace longtake {

class Tokenizer {
 public:
  // path: a SentencePiece *.model file. Throws Error (kInput).
  explicit Tokenizer(const std::string& path);
  ~Tokenizer();
  Tokenizer(Tokenizer&&) noexcept;
  Tokenizer& operator=(Tokenizer&&) noexcept;

  int64_t vocab_size() const;

  // Ids with the end mark behind them. Of a text with more than max_tokens (0: no limit) the first
  // stay, the end mark included, and a warning is logged that says where the text was cut.
  std::vector<int32_t> encode(std::string_view text, int64_t max_tokens = 0) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// A prompt as the models were trained to see it: HTML's characters unescaped (twice, as prompts of
// the web need it), curly quotes straight, every run of white space one space, none at the ends.
// Broken encodings and other compatibility characters are left as they are.
std::string clean_prompt(std::string_view text);

}  // namespace longtake
