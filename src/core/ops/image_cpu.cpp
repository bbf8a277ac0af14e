// Moves of images on the CPU: copies of whole pixels.
#include "ops/image.h"

#include <cstring>

#include "device/dispatch.h"
#include "device/parallel.h"

namespace longtake::cpu {
namespace {

constexpr int64_t kGrainRows = 8;

int64_t pixel_bytes(View image) {
  return image.dim(2) * static_cast<int64_t>(size_of(image.dtype()));
}

}  // namespace

void upsample_nearest(Context& ctx, View x, View out) {
  const int64_t pixel = pixel_bytes(x);
  const int64_t width = x.dim(1);
  const int64_t row = 2 * width * pixel;
  parallel_for(ctx, x.dim(0), kGrainRows, [&](int64_t begin, int64_t end) {
    for (int64_t y = begin; y < end; ++y) {
      std::byte* to = out.raw() + 2 * y * row;
      const std::byte* from = x.raw() + y * width * pixel;
      for (int64_t i = 0; i < 2 * width; ++i)
        std::memcpy(to + i * pixel, from + i / 2 * pixel, static_cast<size_t>(pixel));
      std::memcpy(to + row, to, static_cast<size_t>(row));
    }
  });
}

void concat_channels(Context& ctx, std::span<const View> parts, View out) {
  const int64_t pixel = pixel_bytes(out);
  const int64_t width = out.dim(1);
  parallel_for(ctx, out.dim(0), kGrainRows, [&](int64_t begin, int64_t end) {
    int64_t offset = 0;
    for (const View& part : parts) {
      const int64_t bytes = pixel_bytes(part);
      for (int64_t i = begin * width; i < end * width; ++i)
        std::memcpy(out.raw() + i * pixel + offset, part.raw() + i * bytes,
                    static_cast<size_t>(bytes));
      offset += bytes;
    }
  });
}

}  // namespace longtake::cpu
