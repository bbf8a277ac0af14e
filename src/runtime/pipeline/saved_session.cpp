#include "pipeline/saved_session.h"

#include <charconv>
#include <limits>

#include "base/error.h"
#include "io/json.h"

namespace longtake {
namespace {

constexpr const char* kKind = "longtake-state";
constexpr const char* kVersion = "1";
constexpr const char* kTempCache = "tempcache";
constexpr double kMostNats = 1e6;
constexpr const char* kNotePrefix = "note.";
constexpr int64_t kMostFrames = std::numeric_limits<int32_t>::max();  // frames count noise: 32 bits
constexpr int64_t kMostSteps = 1000;
constexpr int64_t kFarthest = int64_t{1} << 40;  // pixels; 10^7 actions reach 10^8

// The fewest digits that read back as the same number.
std::string shortest(double value) {
  char digits[32];
  return {digits, std::to_chars(digits, digits + sizeof digits, value).ptr};
}

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
      {"memory", options.memory},
      {"sink_frames", std::to_string(options.sink_frames)},
      {"window_frames", std::to_string(options.window_frames)},
      {"num_steps", std::to_string(options.num_steps)},
      {"next_frame", std::to_string(next_frame)},
  };
  if (options.memory == kTempCache) {
    const TempCacheOptions& merge = options.tempcache;
    out["exact_frames"] = std::to_string(merge.exact_frames);
    out["merge_threshold"] = shortest(merge.merge_threshold);
    out["memory_budget"] = std::to_string(merge.budget_tokens);
    out["ann"] = std::to_string(static_cast<int>(merge.ann));
    out["merge_rule"] = std::to_string(static_cast<int>(merge.rule));
    out["merge_key"] = std::to_string(static_cast<int>(merge.key));
    out["merge_bias"] = std::to_string(static_cast<int>(merge.bias));
  }
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
  out.options.memory = fields.text("memory");
  out.options.sink_frames = fields.number<int64_t>("sink_frames", 0, kMostFrames);
  out.options.window_frames = fields.number<int64_t>("window_frames", 0, kMostFrames);
  out.options.num_steps = fields.number<int64_t>("num_steps", 1, kMostSteps);
  out.next_frame = fields.number<int64_t>("next_frame", 0, kMostFrames);
  if (out.options.memory == kTempCache) {
    TempCacheOptions& merge = out.options.tempcache;
    merge.exact_frames = fields.number<int64_t>("exact_frames", 0, kMostFrames);
    merge.merge_threshold = fields.number<double>("merge_threshold", 0, kMostNats);
    merge.budget_tokens = fields.number<int64_t>("memory_budget", 0, kFarthest);
    merge.ann = static_cast<AnnEngine>(fields.number<int>("ann", 0, 1));
    merge.rule = static_cast<MergeRule>(fields.number<int>("merge_rule", 0, 1));
    merge.key = static_cast<GroupKey>(fields.number<int>("merge_key", 0, 1));
    merge.bias = static_cast<GroupBias>(fields.number<int>("merge_bias", 0, 1));
  }
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

bool is_saved_session(const SafetensorsIndex& index) {
  const auto kind = index.metadata.find("kind");
  return kind != index.metadata.end() && kind->second == kKind;
}

}  // namespace longtake
