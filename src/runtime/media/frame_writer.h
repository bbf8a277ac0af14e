// Frames to a video file or to a folder of pictures, written while the next frame is computed.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

namespace longtake {

// A sink of frames, for one producing thread. Encoding runs in a thread of its own behind a short
// queue of reused buffers. A failure there (a full disk, say) surfaces as one Error at the next
// write() or close(); what was written before it stays playable.
class FrameWriter {
 public:
  virtual ~FrameWriter() = default;  // closes; an error that nobody asked for is lost

  // rgb [height, width, 3] u8, copied. Waits while the queue is full.
  virtual void write(const uint8_t* rgb) = 0;

  // Waits until every frame is in the file. Further calls do nothing; write() may not follow.
  virtual void close() = 0;

  // Frames handed to the file so far; after close() all of them are readable there. On a failure
  // this is an upper bound of the readable ones: a video holds back the frames of its last
  // fragment.
  virtual int64_t frames_written() const = 0;
};

// `*.mp4`: H.264, one fragment a second, so that a killed run leaves a file that plays up to its
// last full second. Any other path: a folder (made if missing) of frame_000000.png,
// frame_000001.png
// ... Whether the place is writable is checked here, before slow work starts. fps: frames/s.
std::unique_ptr<FrameWriter> open_frame_writer(const std::string& path, int width, int height,
                                               double fps);

}  // namespace longtake
