// One picture in memory, the form in which frames enter and leave the library.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace longtake {

// Sides are bounded so that a size read from a file can be trusted in arithmetic and allocation.
inline constexpr int kMaxFrameSide = 16384;

// Bytes of a frame of RGB u8 samples: rows from the top, no padding.
inline size_t frame_bytes(int width, int height) {
  return static_cast<size_t>(width) * static_cast<size_t>(height) * 3;
}

struct Frame {
  int width = 0;
  int height = 0;
  std::vector<uint8_t> rgb;  // [height, width, 3]
};

// `frame` at another size: every output pixel is the mean of the area that it covers.
Frame resized(const Frame& frame, int width, int height);

}  // namespace longtake
