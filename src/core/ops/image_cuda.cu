// Moves of images on the GPU, in the widest words that divide a pixel.
#include <algorithm>

#include "device/cuda_runtime.h"
#include "device/dispatch.h"
#include "device/vector.cuh"
#include "ops/image.h"

namespace longtake::cuda {
namespace {

constexpr int kThreads = 256;

// Calls body.template operator()<Word>() with the widest type whose size divides `bytes`.
template <typename Body>
void for_word(uint64_t bytes, const Body& body) {
  if (bytes % sizeof(uint4) == 0)
    body.template operator()<uint4>();
  else if (bytes % sizeof(uint2) == 0)
    body.template operator()<uint2>();
  else if (bytes % sizeof(uint32_t) == 0)
    body.template operator()<uint32_t>();
  else
    body.template operator()<uint16_t>();
}

uint64_t address(View view) {
  return reinterpret_cast<uintptr_t>(view.raw());
}

uint64_t pixel_bytes(View image) {
  return static_cast<uint64_t>(image.dim(2)) * size_of(image.dtype());
}

// A thread a word of the small image. `width`: words of one of its rows.
template <typename Word>
__global__ void upsample(const Word* x, Word* out, int height, int width, int pixel) {
  const int i = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  if (i >= width) return;
  const int column = i / pixel;
  for (int row = blockIdx.y; row < height; row += gridDim.y) {
    const Word word = x[int64_t{row} * width + i];
    Word* to = out + int64_t{4} * row * width + i + column * pixel;
    to[0] = to[pixel] = word;
    to += 2 * width;
    to[0] = to[pixel] = word;
  }
}

// Words of pixels, all in words.
template <typename Word>
struct Copy {
  const Word* from;
  Word* to;
  int from_pixel, to_pixel, count;
};

template <typename Word>
struct Copies {
  Copy<Word> parts[kMaxImageParts];
};

// A part a row of the grid.
template <typename Word>
__global__ void copy_parts(const __grid_constant__ Copies<Word> copies, uint32_t pixels) {
  const Copy<Word>& part = copies.parts[blockIdx.y];
  const uint32_t i = blockIdx.x * kThreads + threadIdx.x;
  const uint32_t pixel = i / static_cast<uint32_t>(part.count);
  if (pixel >= pixels) return;
  const uint32_t word = i - pixel * static_cast<uint32_t>(part.count);
  part.to[int64_t{pixel} * part.to_pixel + word] =
      part.from[int64_t{pixel} * part.from_pixel + word];
}

template <typename Word>
Copy<Word> copy_of(const std::byte* from, uint64_t from_pixel, std::byte* to, uint64_t to_pixel,
                   uint64_t bytes) {
  const auto words = [](uint64_t size) { return static_cast<int>(size / sizeof(Word)); };
  return {reinterpret_cast<const Word*>(from), reinterpret_cast<Word*>(to), words(from_pixel),
          words(to_pixel), words(bytes)};
}

template <typename Word>
void run_copies(Context& ctx, const char* op, const Copies<Word>& copies, size_t count,
                View image) {
  const int64_t pixels = image.dim(0) * image.dim(1);
  int most = 0;
  for (const Copy<Word>& part : copies.parts) most = std::max(most, part.count);
  LONGTAKE_CHECK(pixels * most < int64_t{1} << 32, "an image of ", image.shape().to_string());
  const dim3 grid(blocks_of(pixels * most, kThreads), static_cast<unsigned>(count));
  copy_parts<Word><<<grid, kThreads, 0, stream_of(ctx)>>>(copies, static_cast<uint32_t>(pixels));
  check_launch(op);
}

// Without contraction to fused operations, as the CPU computes.
template <typename Out>
__global__ void planes_to_image(const float* z, const float* scale, const float* shift, Out* out,
                                int64_t count, int64_t area, int channels) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= count) return;
  const int64_t pixel = i / channels;
  const int c = static_cast<int>(i - pixel * channels);
  float value = z[c * area + pixel];
  if (scale != nullptr) value = __fadd_rn(__fmul_rn(value, scale[c]), shift[c]);
  store(out + i, value);
}

__global__ void image_to_planes(const float* x, const float* scale, const float* shift, float* z,
                                int64_t count, int64_t area, int channels) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= count) return;
  const int64_t c = i / area;
  float value = x[(i - c * area) * channels + c];
  if (scale != nullptr) value = (value - shift[c]) / scale[c];
  z[i] = value;
}

__device__ uint8_t colour(float pixel) {
  const float value = __fmul_rn(pixel + 1.0F, 127.5F);
  return value >= 255.0F ? 255 : value > 0.0F ? static_cast<uint8_t>(value + 0.5F) : 0;
}

// Four values a thread where both start in fours.
template <bool kFours>
__global__ void pixels_to_rgb(const float* pixels, uint8_t* rgb, int64_t count) {
  constexpr int kEach = kFours ? 4 : 1;
  const int64_t i = kEach * (int64_t{blockIdx.x} * kThreads + threadIdx.x);
  if (kFours && i + kEach <= count) {
    const float4 v = load4(pixels + i);
    *reinterpret_cast<uchar4*>(rgb + i) = {colour(v.x), colour(v.y), colour(v.z), colour(v.w)};
    return;
  }
  for (int64_t j = i; j < min(i + kEach, count); ++j) rgb[j] = colour(pixels[j]);
}

__global__ void rgb_to_pixels(const uint8_t* rgb, float* pixels, int64_t count) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < count) pixels[i] = static_cast<float>(rgb[i]) / 127.5F - 1.0F;
}

struct Place {
  int row, column, fresh_rows, fresh_columns;
};

// A value a thread.
__global__ void crop_planes(const float* x, float* out, int64_t count, int height, int width,
                            int whole_height, int whole_width, int row, int column) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= count) return;
  const int64_t line = i / width;
  const int64_t from = line / height * whole_height + row + line % height;
  out[i] = x[from * whole_width + column + i % width];
}

__global__ void blend_tile(const float* tile, const float* rows, const float* columns, float* out,
                           int64_t count, int width, int channels, int whole_width, Place place) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= count) return;
  const auto y = static_cast<int>(i / (width * channels));
  const auto within = static_cast<int>(i % (width * channels));
  const int x = within / channels;
  const bool is_fresh = y >= place.fresh_rows && x >= place.fresh_columns;
  float* to = out + (int64_t{place.row + y} * whole_width + place.column) * channels + within;
  *to = (is_fresh ? 0 : *to) + rows[y] * columns[x] * tile[i];
}

const float* values_of(View vector) {
  return vector.empty() ? nullptr : vector.data<float>();
}

}  // namespace

void upsample_nearest(Context& ctx, View x, View out) {
  for_word(pixel_bytes(x) | address(x) | address(out), [&]<typename Word>() {
    const auto pixel = static_cast<int>(pixel_bytes(x) / sizeof(Word));
    const int width = static_cast<int>(x.dim(1)) * pixel;
    const int height = static_cast<int>(x.dim(0));
    const dim3 grid(blocks_of(width, kThreads), static_cast<unsigned>(std::min(height, 65535)));
    upsample<Word><<<grid, kThreads, 0, stream_of(ctx)>>>(reinterpret_cast<const Word*>(x.raw()),
                                                          reinterpret_cast<Word*>(out.raw()),
                                                          height, width, pixel);
  });
  check_launch("upsample_nearest");
}

void concat_channels(Context& ctx, std::span<const View> parts, View out) {
  uint64_t divided = pixel_bytes(out) | address(out);
  for (const View& part : parts) divided |= pixel_bytes(part) | address(part);
  for_word(divided, [&]<typename Word>() {
    Copies<Word> copies{};
    uint64_t offset = 0;
    size_t count = 0;
    for (const View& part : parts) {
      if (part.empty()) continue;
      const uint64_t bytes = pixel_bytes(part);
      copies.parts[count++] =
          copy_of<Word>(part.raw(), bytes, out.raw() + offset, pixel_bytes(out), bytes);
      offset += bytes;
    }
    run_copies(ctx, "concat_channels", copies, count, out);
  });
}

void slice_channels(Context& ctx, View x, int64_t begin, View out) {
  const uint64_t offset = static_cast<uint64_t>(begin) * size_of(x.dtype());
  const uint64_t bytes = pixel_bytes(out);
  for_word(pixel_bytes(x) | bytes | offset | address(x) | address(out), [&]<typename Word>() {
    Copies<Word> copies{};
    copies.parts[0] = copy_of<Word>(x.raw() + offset, pixel_bytes(x), out.raw(), bytes, bytes);
    run_copies(ctx, "slice_channels", copies, 1, out);
  });
}

void to_channels_last(Context& ctx, View z, View scale, View shift, View out) {
  for_float_type(out.dtype(), [&]<typename Out>() {
    planes_to_image<Out><<<blocks_of(z.numel(), kThreads), kThreads, 0, stream_of(ctx)>>>(
        z.data<float>(), values_of(scale), values_of(shift), out.data<Out>(), z.numel(),
        z.dim(1) * z.dim(2), static_cast<int>(z.dim(0)));
  });
  check_launch("to_channels_last");
}

void to_planes(Context& ctx, View x, View scale, View shift, View z) {
  image_to_planes<<<blocks_of(z.numel(), kThreads), kThreads, 0, stream_of(ctx)>>>(
      x.data<float>(), values_of(scale), values_of(shift), z.data<float>(), z.numel(),
      z.dim(1) * z.dim(2), static_cast<int>(z.dim(0)));
  check_launch("to_planes");
}

void crop(Context& ctx, View x, int64_t row, int64_t column, View out) {
  crop_planes<<<blocks_of(out.numel(), kThreads), kThreads, 0, stream_of(ctx)>>>(
      x.data<float>(), out.data<float>(), out.numel(), static_cast<int>(out.dim(1)),
      static_cast<int>(out.dim(2)), static_cast<int>(x.dim(1)), static_cast<int>(x.dim(2)),
      static_cast<int>(row), static_cast<int>(column));
  check_launch("crop");
}

void blend(Context& ctx, View tile, View rows, View columns, const TilePlace& place, View out) {
  const Place at{static_cast<int>(place.row), static_cast<int>(place.column),
                 static_cast<int>(place.fresh_rows), static_cast<int>(place.fresh_columns)};
  blend_tile<<<blocks_of(tile.numel(), kThreads), kThreads, 0, stream_of(ctx)>>>(
      tile.data<float>(), rows.data<float>(), columns.data<float>(), out.data<float>(),
      tile.numel(), static_cast<int>(tile.dim(1)), static_cast<int>(tile.dim(2)),
      static_cast<int>(out.dim(1)), at);
  check_launch("blend");
}

void to_rgb(Context& ctx, View pixels, View rgb) {
  const int64_t count = pixels.numel();
  const bool fours = start_in_fours({pixels, rgb});
  const auto kernel = fours ? pixels_to_rgb<true> : pixels_to_rgb<false>;
  kernel<<<blocks_of(count, fours ? 4 * kThreads : kThreads), kThreads, 0, stream_of(ctx)>>>(
      pixels.data<float>(), rgb.data<uint8_t>(), count);
  check_launch("to_rgb");
}

void from_rgb(Context& ctx, View rgb, View pixels) {
  rgb_to_pixels<<<blocks_of(rgb.numel(), kThreads), kThreads, 0, stream_of(ctx)>>>(
      rgb.data<uint8_t>(), pixels.data<float>(), rgb.numel());
  check_launch("from_rgb");
}

}  // namespace longtake::cuda
