#include "io/tokenizer.h"

#include <sentencepiece_processor.h>

#include <algorithm>
#include <charconv>
#include <utility>

#include "base/error.h"
#include "base/log.h"
#include "io/json.h"
#include "io/mapped_file.h"

namespace longtake {
namespace {

using Names = std::pair<std::string_view, std::string_view>;

constexpr Names kEntities[] = {{"amp", "&"},
                               {"lt", "<"},
                               {"gt", ">"},
                               {"quot", "\""},
                               {"apos", "'"},
                               {"nbsp", "\xc2\xa0"},
                               {"hellip", "\xe2\x80\xa6"},
                               {"mdash", "\xe2\x80\x94"},
                               {"ndash", "\xe2\x80\x93"}};

constexpr Names kQuotes[] = {
    {"\xe2\x80\x98", "'"}, {"\xe2\x80\x99", "'"}, {"\xe2\x80\x9c", "\""}, {"\xe2\x80\x9d", "\""}};

// White space outside ASCII that prompts are known to hold: no-break, en..hair, line and paragraph
// separators, narrow no-break, ideographic.
constexpr std::string_view kWideSpaces[] = {
    "\xc2\xa0",     "\xe2\x80\x82", "\xe2\x80\x83", "\xe2\x80\x84", "\xe2\x80\x85",
    "\xe2\x80\x86", "\xe2\x80\x87", "\xe2\x80\x88", "\xe2\x80\x89", "\xe2\x80\x8a",
    "\xe2\x80\xa8", "\xe2\x80\xa9", "\xe2\x80\xaf", "\xe3\x80\x80"};

std::string utf8(uint32_t point) {
  std::string out;
  const auto tail = [&](int shift) { out += static_cast<char>(0x80 | ((point >> shift) & 0x3f)); };
  if (point < 0x80) {
    out += static_cast<char>(point);
  } else if (point < 0x800) {
    out += static_cast<char>(0xc0 | (point >> 6));
    tail(0);
  } else if (point < 0x10000) {
    out += static_cast<char>(0xe0 | (point >> 12));
    tail(6);
    tail(0);
  } else {
    out += static_cast<char>(0xf0 | (point >> 18));
    tail(12);
    tail(6);
    tail(0);
  }
  return out;
}

// What "&name;" means; empty: nothing we know.
std::string entity(std::string_view name) {
  for (const auto& [known, text] : kEntities) {
    if (name == known) return std::string(text);
  }
  if (!name.starts_with('#')) return {};
  name.remove_prefix(1);
  const bool is_hex = name.starts_with('x') || name.starts_with('X');
  if (is_hex) name.remove_prefix(1);
  uint32_t point = 0;
  const auto parsed =
      std::from_chars(name.data(), name.data() + name.size(), point, is_hex ? 16 : 10);
  const bool is_character = point > 0 && point < 0x110000 && (point < 0xd800 || point > 0xdfff);
  if (name.empty() || parsed.ec != std::errc() || parsed.ptr != name.data() + name.size() ||
      !is_character)
    return {};
  return utf8(point);
}

std::string unescape(std::string_view text) {
  constexpr size_t kLongest = 10;  // "&#x10ffff;"
  std::string out;
  for (size_t i = 0; i < text.size();) {
    const size_t end = text[i] == '&' ? text.find(';', i) : std::string_view::npos;
    std::string meaning;
    if (end != std::string_view::npos && end - i < kLongest)
      meaning = entity(text.substr(i + 1, end - i - 1));
    if (meaning.empty()) {
      out += text[i++];
    } else {
      out += meaning;
      i = end + 1;
    }
  }
  return out;
}

// The length of the white space that `text` begins with; 0: none.
size_t space_at(std::string_view text) {
  if (text[0] == ' ' || (text[0] >= '\t' && text[0] <= '\r')) return 1;
  for (const std::string_view wide : kWideSpaces) {
    if (text.starts_with(wide)) return wide.size();
  }
  return 0;
}

}  // namespace

struct Tokenizer::Impl {
  std::string path;
  sentencepiece::SentencePieceProcessor processor;
};

Tokenizer::Tokenizer(const std::string& path) : impl_(std::make_unique<Impl>()) {
  impl_->path = path;
  const MappedFile file(path);
  const auto bytes = file.bytes();
  const auto status = impl_->processor.LoadFromSerializedProto(
      {reinterpret_cast<const char*>(bytes.data()), bytes.size()});
  if (!status.ok())
    throw Error(ErrorKind::kInput, str(path, ": expected a SentencePiece model, found ",
                                       printable(status.ToString())));
  if (impl_->processor.eos_id() < 0)
    throw Error(ErrorKind::kInput, str(path, ": expected an end mark </s>, found none"));
}

Tokenizer::~Tokenizer() = default;
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;

int64_t Tokenizer::vocab_size() const {
  return impl_->processor.GetPieceSize();
}

std::vector<int32_t> Tokenizer::encode(std::string_view text, int64_t max_tokens) const {
  std::vector<int> ids;
  const auto status = impl_->processor.Encode({text.data(), text.size()}, &ids);
  if (!status.ok())
    throw Error(ErrorKind::kInput, str(impl_->path, ": expected to tokenize the prompt, found ",
                                       printable(status.ToString())));
  std::vector<int32_t> out(ids.begin(), ids.end());
  const auto most = static_cast<size_t>(max_tokens);
  if (max_tokens > 0 && out.size() + 1 > most) {
    std::vector<int> left_out(ids.begin() + static_cast<std::ptrdiff_t>(most) - 1, ids.end());
    std::string tail;
    impl_->processor.Decode(left_out, &tail).IgnoreError();
    log(LogLevel::kWarning, str("prompt: expected at most ", max_tokens, " tokens, found ",
                                out.size() + 1, "; left out from: ", printable(tail)));
    out.resize(most - 1);
  }
  out.push_back(impl_->processor.eos_id());
  return out;
}

std::string clean_prompt(std::string_view text) {
  const std::string plain = unescape(unescape(text));
  std::string out;
  bool space = false;
  for (size_t i = 0; i < plain.size();) {
    const std::string_view rest = std::string_view(plain).substr(i);
    if (const size_t length = space_at(rest); length > 0) {
      space = !out.empty();
      i += length;
      continue;
    }
    if (space) out += ' ';
    space = false;
    const auto* quote =
        std::find_if(std::begin(kQuotes), std::end(kQuotes),
                     [&](const Names& names) { return rest.starts_with(names.first); });
    if (quote != std::end(kQuotes)) {
      out += quote->second;
      i += quote->first.size();
    } else {
      out += plain[i++];
    }
  }
  return out;
}

}  // namespace longtake
