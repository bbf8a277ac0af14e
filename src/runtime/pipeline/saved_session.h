// What a saved session knows beside its caches: the head of a state file. A state file is
// safetensors: these fields as metadata, and the history of layer N as bytes in "cache.N".
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>

#include "io/safetensors.h"
#include "pipeline/method.h"

namespace longtake {

// The view's top-left corner in world pixels; the world wraps round.
struct CameraPosition {
  int64_t x = 0;
  int64_t y = 0;
};

struct SessionOptions {
  std::string prompt;
  uint64_t seed = 0;
  Method method;
  int64_t expected_frames = 0;  // memory is reserved for so many; more may follow
  int64_t watch_every = 0;      // of so many chunks one is looked into for errors; 0: none
};

// The caller's own words, kept with a state (the action list, for one).
using SessionNotes = std::map<std::string, std::string>;

struct SavedSession {
  SessionOptions options;
  std::string dtype;
  uint64_t model_fingerprint = 0;
  int64_t next_frame = 0;
  std::optional<CameraPosition> camera;  // of the latest frame
  SessionNotes notes;

  std::map<std::string, std::string> to_metadata() const;
  // Throws Error (kInput) naming the field; `what` names the file.
  static SavedSession from_metadata(const std::map<std::string, std::string>& metadata,
                                    const std::string& what);
};

// "cache.3"
std::string cache_tensor_name(size_t layer);

// True when the file says that it is a saved session.
bool is_saved_session(const std::map<std::string, std::string>& metadata);

}  // namespace longtake
