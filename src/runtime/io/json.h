// JSON from files nobody vouches for: bounded size and depth, no duplicate keys, and getters whose
// errors name the key, what was expected and what was found.
#pragma once

#include <cstddef>
#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace longtake {

struct JsonLimits {
  size_t max_bytes;
  int max_depth;
};

// `what` names the text in errors ("models/world/config.json").
nlohmann::json parse_json(std::span<const std::byte> text, const std::string& what,
                          const JsonLimits& limits);

// One line, at most 80 bytes, control and non-ASCII bytes as \xNN: for quoting a file's own words.
std::string printable(std::string_view text);

// Reads typed members of one object. Borrows the json value.
class JsonObject {
 public:
  // `path` is what errors put before the key: "config.json: transformer".
  JsonObject(const nlohmann::json& value, std::string path);

  bool has(const char* key) const;

  JsonObject object(const char* key) const;
  int64_t integer(const char* key, int64_t min, int64_t max) const;
  double number(const char* key, double min, double max) const;
  bool boolean(const char* key) const;
  std::string string(const char* key) const;
  // Between 1 and max_count integers, each in [min, max].
  std::vector<int64_t> integers(const char* key, size_t max_count, int64_t min, int64_t max) const;
  // Between 1 and max_count numbers, each in [min, max].
  std::vector<double> numbers(const char* key, size_t max_count, double min, double max) const;
  // Exactly `count` objects.
  std::vector<JsonObject> objects(const char* key, size_t count) const;

 private:
  const nlohmann::json& member(const char* key, const char* expected) const;
  [[noreturn]] void fail(const char* key, const std::string& expected,
                         const std::string& found) const;

  const nlohmann::json& value_;
  std::string path_;
};

}  // namespace longtake
