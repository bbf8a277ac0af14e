#include "pipeline/saved_session.h"

#include <charconv>
#include <limits>

#include "base/error.h"
#include "io/json.h"

namespace longtake {
namespace {

constexpr const char* kKind = "longtake-state";
constexpr const char* kVersion = "2";
constexpr const char* kNotePrefix = "note.";
constexpr int64_t kMostFrames = std::numeric_limits<int32_t>::max();  // frames count noise: 32 bits
constexpr int64_t kFarthest = int64_t{1} << 40;  // pixels; 10^7 actions reach 10^8

class Fields {
 public:
  Fields(const std::map<std::string, std::string>& fields, const std::string& what)
      : fields_(fields), what_(what) {}

  const std::string& text(const char* key) const {
    const auto found = fields_.find(key);
    if (found == fields_.end()) fail(key, "a value", "no such field");
    return found->second;
  }

  template <typename T>
  T number(const char* key, T min, T max) const {
    const std::string& value = text(key);
    T out{};
    const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), out);
    if (error != std::errc() || end != value.data() + value.size() || out < min || out > max)
      fail(key, str("a number in ", min, "..", max), '"' + printable(value) + '"');
    return out;
  }

  [[noreturn]] void fail(const char* key, const std::string& expected,
                         const std::string& found) const {
    throw Error(ErrorKind::kInput,
                str(what_, ": ", key, ": expected ", expected, ", found ", found));
  }

 private:
  const std::map<std::string, std::string>& fields_;
  const std::string& what_;
};

}  // namespace

std::map<std::string, std::string> SavedSession::to_metadata() const {
  std::map<std::string, std::string> out = {
      {"kind", kKind},
      {"version", kVersion},
      {"model", std::to_string(model_fingerprint)},
      {"dtype", dtype},
      {"prompt", options.prompt},
      {"seed", std::to_string(options.seed)},
      {"method", options.method.to_string()},
      {"next_frame", std::to_string(next_frame)},
  };
  if (camera) {
    out["camera_x"] = std::to_string(camera->x);
    out["camera_y"] = std::to_string(camera->y);
  }
  for (const auto& [key, value] : notes) out[kNotePrefix + key] = value;
  return out;
}

SavedSession SavedSession::from_metadata(const std::map<std::string, std::string>& metadata,
                                         const std::string& what) {
  const Fields fields(metadata, what);
  for (const auto& [key, value] : {std::pair("kind", kKind), std::pair("version", kVersion)}) {
    if (fields.text(key) != value)
      fields.fail(key, str('"', value, '"'), '"' + printable(fields.text(key)) + '"');
  }
  SavedSession out;
  out.model_fingerprint = fields.number<uint64_t>("model", 0, UINT64_MAX);
  out.dtype = fields.text("dtype");
  out.options.prompt = fields.text("prompt");
  out.options.seed = fields.number<uint64_t>("seed", 0, UINT64_MAX);
  try {
    out.options.method = parse_method(fields.text("method"));
  } catch (const Error& error) {
    throw Error(ErrorKind::kInput, str(what, ": ", error.what()));
  }
  out.next_frame = fields.number<int64_t>("next_frame", 0, kMostFrames);
  if (out.next_frame > 0)
    out.camera = {fields.number<int64_t>("camera_x", -kFarthest, kFarthest),
                  fields.number<int64_t>("camera_y", -kFarthest, kFarthest)};
  const std::string prefix = kNotePrefix;
  for (const auto& [key, value] : metadata) {
    if (key.rfind(prefix, 0) == 0) out.notes[key.substr(prefix.size())] = value;
  }
  return out;
}

std::string cache_tensor_name(size_t layer) {
  return str("cache.", layer);
}

bool is_saved_session(const std::map<std::string, std::string>& metadata) {
  const auto kind = metadata.find("kind");
  return kind != metadata.end() && kind->second == kKind;
}

}  // namespace longtake
