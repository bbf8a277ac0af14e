// Moves of images on the GPU, in the widest words that divide a pixel.
#include <algorithm>

#include "device/cuda_runtime.h"
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
__global__ void copy_parts(Copies<Word> copies, int64_t pixels) {
  const Copy<Word>& part = copies.parts[blockIdx.y];
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t pixel = i / part.count;
  if (pixel >= pixels) return;
  const int word = static_cast<int>(i - pixel * part.count);
  part.to[pixel * part.to_pixel + word] = part.from[pixel * part.from_pixel + word];
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
  const dim3 grid(blocks_of(pixels * most, kThreads), static_cast<unsigned>(count));
  copy_parts<Word><<<grid, kThreads, 0, stream_of(ctx)>>>(copies, pixels);
  check_launch(op);
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

}  // namespace longtake::cuda
