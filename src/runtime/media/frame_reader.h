// Frames from a video, a picture or a folder of pictures (--init).
#pragma once

#include <memory>
#include <string>

#include "media/frame.h"

namespace longtake {

// A source of frames, in order. Any damage throws Error (kInput) in one line; the frames before it
// have been given.
class FrameReader {
 public:
  virtual ~FrameReader() = default;

  // The next frame into `out`, whose memory is reused; false at the end. All have one size.
  virtual bool read(Frame& out) = 0;

  virtual int width() const = 0;
  virtual int height() const = 0;
};

// A folder is read as its *.png files, ordered by length of name, then by name; a file as a video
// (mp4, webm ...) or one picture (PNG, JPEG ...), whatever it is called.
std::unique_ptr<FrameReader> open_frame_reader(const std::string& path);

}  // namespace longtake
