// Moves of images on the CPU.
#include "ops/image.h"

#include <algorithm>
#include <cstring>

#include "device/dispatch.h"
#include "device/parallel.h"

namespace longtake::cpu {
namespace {

constexpr int64_t kGrainRows = 8;
constexpr int64_t kGrainBytes = int64_t{1}
                                << 15;  // below this a second thread costs more than it helps

int64_t pixel_bytes(View image) {
  return image.dim(2) * static_cast<int64_t>(size_of(image.dtype()));
}

// The same `bytes` of every pixel of an image of `image`'s size; pixels are `from_pixel` and
// `to_pixel` bytes apart.
void copy_parts(Context& ctx, View image, const std::byte* from, int64_t from_pixel, std::byte* to,
                int64_t to_pixel, int64_t bytes) {
  const int64_t width = image.dim(1);
  const int64_t grain = kGrainBytes / (width * bytes + 1) + 1;
  parallel_for(ctx, image.dim(0), grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * width; i < end * width; ++i)
      std::memcpy(to + i * to_pixel, from + i * from_pixel, static_cast<size_t>(bytes));
  });
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
  int64_t offset = 0;
  for (const View& part : parts) {
    const int64_t bytes = pixel_bytes(part);
    copy_parts(ctx, out, part.raw(), bytes, out.raw() + offset, pixel, bytes);
    offset += bytes;
  }
}

void slice_channels(Context& ctx, View x, int64_t begin, View out) {
  const auto offset = begin * static_cast<int64_t>(size_of(x.dtype()));
  copy_parts(ctx, out, x.raw() + offset, pixel_bytes(x), out.raw(), pixel_bytes(out),
             pixel_bytes(out));
}

// A latent frame is small, so one plain loop on one thread serves.
void to_channels_last(Context&, View z, View scale, View shift, View out) {
  const int64_t channels = z.dim(0);
  const int64_t area = z.dim(1) * z.dim(2);
  for_float_type(out.dtype(), [&]<typename Out>() {
    for (int64_t c = 0; c < channels; ++c) {
      const float factor = scale.empty() ? 1.0F : scale.data<float>()[c];
      const float more = shift.empty() ? 0.0F : shift.data<float>()[c];
      for (int64_t i = 0; i < area; ++i)
        out.data<Out>()[i * channels + c] =
            static_cast<Out>(z.data<float>()[c * area + i] * factor + more);
    }
  });
}

void to_planes(Context&, View x, View scale, View shift, View z) {
  const int64_t channels = z.dim(0);
  const int64_t area = z.dim(1) * z.dim(2);
  for (int64_t c = 0; c < channels; ++c) {
    const float factor = scale.empty() ? 1.0F : scale.data<float>()[c];
    const float less = shift.empty() ? 0.0F : shift.data<float>()[c];
    for (int64_t i = 0; i < area; ++i)
      z.data<float>()[c * area + i] = (x.data<float>()[i * channels + c] - less) / factor;
  }
}

void crop(Context& ctx, View x, int64_t row, int64_t column, View out) {
  const int64_t height = out.dim(1), width = out.dim(2);
  parallel_for(ctx, out.dim(0) * height, kGrainRows, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t from = (i / height * x.dim(1) + row + i % height) * x.dim(2) + column;
      std::copy_n(x.data<float>() + from, width, out.data<float>() + i * width);
    }
  });
}

void blend(Context& ctx, View tile, View rows, View columns, const TilePlace& place, View out) {
  const int64_t width = tile.dim(1), channels = tile.dim(2);
  parallel_for(ctx, tile.dim(0), kGrainRows, [&](int64_t begin, int64_t end) {
    for (int64_t y = begin; y < end; ++y) {
      const float* from = tile.data<float>() + y * width * channels;
      float* to = out.data<float>() + ((place.row + y) * out.dim(1) + place.column) * channels;
      for (int64_t x = 0; x < width; ++x) {
        const float weight = rows.data<float>()[y] * columns.data<float>()[x];
        const bool is_fresh = y >= place.fresh_rows && x >= place.fresh_columns;
        for (int64_t c = 0; c < channels; ++c, ++from, ++to)
          *to = (is_fresh ? 0 : *to) + weight * *from;
      }
    }
  });
}

void to_rgb(Context&, View pixels, View rgb) {
  const float* from = pixels.data<float>();
  auto* to = rgb.data<uint8_t>();
  for (int64_t i = 0; i < pixels.numel(); ++i) {
    const float value = (from[i] + 1.0F) * 127.5F;
    to[i] = value >= 255.0F ? 255 : value > 0.0F ? static_cast<uint8_t>(value + 0.5F) : 0;
  }
}

void from_rgb(Context&, View rgb, View pixels) {
  const auto* from = rgb.data<uint8_t>();
  auto* to = pixels.data<float>();
  for (int64_t i = 0; i < rgb.numel(); ++i) to[i] = static_cast<float>(from[i]) / 127.5F - 1.0F;
}

}  // namespace longtake::cpu
