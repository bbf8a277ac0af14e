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

  // Frames that a reader finds in the file by now, even if we are killed: a video grows by a
  // fragment, about a second, at a time. After close(), or after a failure, exactly those there.
  virtual int64_t frames_written() const = 0;
};

// `*.mp4`: H.264 in fragments of a second; an odd side becomes even by repeating its edge. Any
// other path: a folder (made if missing) of frame_000000.png, frame_000001.png ... What an earlier
// run left there is replaced. Whether the place is writable is found out here, before slow work
// starts. fps: frames/s.
std::unique_ptr<FrameWriter> open_frame_writer(const std::string& path, int width, int height,
                                               double fps);

}  // namespace longtake
