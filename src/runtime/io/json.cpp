#include "io/json.h"

#include <cmath>
#include <nlohmann/json.hpp>
#include <set>

#include "base/error.h"

namespace longtake {
namespace {

using nlohmann::json;

std::string describe(const json& value) {
  if (value.is_structured()) return str(value.type_name(), " of ", value.size());
  return printable(value.dump(-1, ' ', true, json::error_handler_t::replace));
}

bool in_range(const json& value, int64_t min, int64_t max) {
  if (!value.is_number_integer()) return false;
  // A number above int64's range is stored unsigned and would wrap.
  if (value.is_number_unsigned() && value.get<uint64_t>() > uint64_t{INT64_MAX}) return false;
  const auto number = value.get<int64_t>();
  return number >= min && number <= max;
}

}  // namespace

std::string printable(std::string_view text) {
  constexpr size_t kMaxLength = 80;
  constexpr const char* kHex = "0123456789abcdef";
  std::string out;
  for (const char c : text) {
    if (out.size() >= kMaxLength) return out + "...";
    const auto byte = static_cast<unsigned char>(c);
    if (byte >= 0x20 && byte < 0x7f)
      out += c;
    else
      out += {'\\', 'x', kHex[byte >> 4], kHex[byte & 15]};
  }
  return out;
}

json parse_json(std::span<const std::byte> text, const std::string& what,
                const JsonLimits& limits) {
  if (text.size() > limits.max_bytes)
    throw Error(ErrorKind::kInput, str(what, ": expected at most ", limits.max_bytes,
                                       " bytes of JSON, found ", text.size()));
  // One set of seen keys per open object. The parser keeps its own stack on the heap, so depth is
  // bounded here and nowhere else.
  std::vector<std::set<std::string>> keys;
  const auto check = [&](int depth, json::parse_event_t event, json& parsed) {
    switch (event) {
      case json::parse_event_t::object_start:
      case json::parse_event_t::array_start:
        if (depth >= limits.max_depth)
          throw Error(ErrorKind::kInput, str(what, ": expected at most ", limits.max_depth,
                                             " levels of nested JSON, found more"));
        keys.emplace_back();
        break;
      case json::parse_event_t::object_end:
      case json::parse_event_t::array_end:
        keys.pop_back();
        break;
      case json::parse_event_t::key:
        if (!keys.back().insert(parsed.get<std::string>()).second)
          throw Error(ErrorKind::kInput,
                      str(what, ": expected every key once, found \"",
                          printable(parsed.get<std::string>()), "\" twice in one object"));
        break;
      case json::parse_event_t::value:
        break;
    }
    return true;
  };
  const char* begin = reinterpret_cast<const char*>(text.data());
  try {
    return json::parse(begin, begin + text.size(), check);
  } catch (const json::parse_error& error) {
    throw Error(ErrorKind::kInput,
                str(what, ": expected valid JSON, found an error at byte ", error.byte));
  } catch (const json::exception& error) {  // a number out of range
    throw Error(ErrorKind::kInput,
                str(what, ": expected valid JSON, found ", printable(error.what())));
  }
}

JsonObject::JsonObject(const json& value, std::string path)
    : value_(value), path_(std::move(path)) {
  if (!value.is_object())
    throw Error(ErrorKind::kInput, str(path_, ": expected an object, found ", describe(value)));
}

void JsonObject::fail(const char* key, const std::string& expected,
                      const std::string& found) const {
  throw Error(ErrorKind::kInput, str(path_, ".", key, ": expected ", expected, ", found ", found));
}

const json& JsonObject::member(const char* key, const char* expected) const {
  const auto found = value_.find(key);
  if (found == value_.end()) fail(key, expected, "no such key");
  return *found;
}

bool JsonObject::has(const char* key) const {
  return value_.contains(key);
}

JsonObject JsonObject::object(const char* key) const {
  return JsonObject(member(key, "an object"), str(path_, ".", key));
}

int64_t JsonObject::integer(const char* key, int64_t min, int64_t max) const {
  const json& value = member(key, "an integer");
  if (!in_range(value, min, max)) fail(key, str("an integer in ", min, "..", max), describe(value));
  return value.get<int64_t>();
}

double JsonObject::number(const char* key, double min, double max) const {
  const json& value = member(key, "a number");
  if (!value.is_number() || !(value.get<double>() >= min && value.get<double>() <= max))
    fail(key, str("a number in ", min, "..", max), describe(value));
  return value.get<double>();
}

bool JsonObject::boolean(const char* key) const {
  const json& value = member(key, "true or false");
  if (!value.is_boolean()) fail(key, "true or false", describe(value));
  return value.get<bool>();
}

std::string JsonObject::string(const char* key) const {
  const json& value = member(key, "a string");
  if (!value.is_string()) fail(key, "a string", describe(value));
  return value.get<std::string>();
}

std::vector<int64_t> JsonObject::integers(const char* key, size_t max_count, int64_t min,
                                          int64_t max) const {
  const json& value = member(key, "a list of integers");
  if (!value.is_array() || value.empty() || value.size() > max_count)
    fail(key, str("a list of 1..", max_count, " integers"), describe(value));
  std::vector<int64_t> out;
  for (const json& item : value) {
    if (!in_range(item, min, max)) fail(key, str("integers in ", min, "..", max), describe(item));
    out.push_back(item.get<int64_t>());
  }
  return out;
}

std::vector<double> JsonObject::numbers(const char* key, size_t max_count, double min,
                                        double max) const {
  const json& value = member(key, "a list of numbers");
  if (!value.is_array() || value.empty() || value.size() > max_count)
    fail(key, str("a list of 1..", max_count, " numbers"), describe(value));
  std::vector<double> out;
  for (const json& item : value) {
    const double found = item.is_number() ? item.get<double>() : NAN;
    if (!(found >= min && found <= max))
      fail(key, str("numbers in ", min, "..", max), describe(item));
    out.push_back(found);
  }
  return out;
}

std::vector<JsonObject> JsonObject::objects(const char* key, size_t count) const {
  const std::string expected = str("a list of ", count, " objects");
  const json& value = member(key, expected.c_str());
  if (!value.is_array() || value.size() != count) fail(key, expected, describe(value));
  std::vector<JsonObject> out;
  for (size_t i = 0; i < count; ++i) out.emplace_back(value[i], str(path_, ".", key, "[", i, "]"));
  return out;
}

}  // namespace longtake
