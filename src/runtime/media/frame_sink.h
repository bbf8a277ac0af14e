// What a FrameWriter's thread writes to: one file format each. Private to media/.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

namespace longtake {

// Used from one thread at a time. After an Error only the destructor may follow; it leaves the
// first frames_kept() frames readable.
class FrameSink {
 public:
  virtual ~FrameSink() = default;
  virtual void encode(const uint8_t* rgb) = 0;  // [height, width, 3]
  virtual void finish() = 0;
  virtual int64_t frames_kept() const = 0;  // that a reader finds even if we are killed now
};

// Both create or replace what is at `path`, and throw Error (kUsage) if that cannot be done.
std::unique_ptr<FrameSink> open_mp4_sink(const std::string& path, int width, int height,
                                         double fps);
std::unique_ptr<FrameSink> open_png_sink(const std::string& folder, int width, int height);

}  // namespace longtake
