// A block makes 16 x 16 pixels of up to 96 channels. Of 32 channels at a time it holds the 18 x 18
// pixels that lie under them, read once for all nine taps: tap (ky, kx) of a row of 16 outputs is
// the same pixels one further. Products are mma.sync, so it runs on every chip since 8.0.
//
// For each group of 32 channels and each tap (a step) the weights of the block's outputs pass
// through a ring in shared memory, three steps ahead; the next group's pixels have nine steps to
// come.
#include <algorithm>

#include "device/cuda_runtime.h"
#include "device/dispatch.h"
#include "device/mma.cuh"
#include "device/vector.cuh"
#include "ops/direct_conv_cuda.h"
#include "ops/image.h"

namespace longtake::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kSide = 16;                 // of a block's pixels
constexpr int kPatch = kSide + 2;         // of what lies under them
constexpr int kGroup = 32;                // channels of a step
constexpr int kChunks = kGroup * 2 / 16;  // of 16 bytes
constexpr int kTaps = 9;
constexpr int kAhead = 3, kRing = kAhead + 1;  // steps whose weights are on their way
constexpr int64_t kLeastBlocks = 64;           // fewer leave too much of a GPU idle

constexpr int kPatchBytes = kPatch * kPatch * kGroup * 2;

// Bytes to a chunk of a row of 32 channels: any eight rows in turn lie in different banks.
__device__ int offset_of(int row, int chunk) {
  return row * (kGroup * 2) + ((chunk ^ (row >> 1 & 3)) << 4);
}

struct Arguments {
  const bf16* parts[kMaxImageParts];
  int groups[kMaxImageParts];  // of channels, of each part
  const bf16* weight;          // [out, kTaps, all channels]
  const float* bias;           // or null
  int num_groups, height, width, out;
  int tiles_x;
};

// What a block computes: kWarpsN warps side by side, each 16 kPairs outputs of 16 / kWarpsM rows.
template <int kWarpsN, int kPairs>
struct Shape {
  static constexpr int kOut = 16 * kWarpsN * kPairs;
  static constexpr int kRows = kSide / (kWarps / kWarpsN);  // of pixels, of a warp
  static constexpr int kWeightBytes = kOut * kGroup * 2;    // of a step
  static constexpr int kSharedBytes = 2 * kPatchBytes + kRing * kWeightBytes;
};

// The pixels of group `index` under the block's.
__device__ void load_patch(const Arguments& args, int index, int top, int left,
                           unsigned char* patch) {
  int part = 0;
  while (index >= args.groups[part]) index -= args.groups[part++];
  const int channels = args.groups[part] * kGroup;
  const bf16* from = args.parts[part] + index * kGroup;
  for (int i = threadIdx.x; i < kPatch * kPatch * kChunks; i += kThreads) {
    const int pixel = i / kChunks, chunk = i % kChunks;
    const int y = top + pixel / kPatch, x = left + pixel % kPatch;
    const bool is_inside = y >= 0 && y < args.height && x >= 0 && x < args.width;
    const int64_t at = is_inside ? (int64_t{y} * args.width + x) * channels + chunk * 8 : 0;
    copy_16_or_zeros(patch + offset_of(pixel, chunk), from + at, is_inside);
  }
}

template <int kOut>
__device__ void load_weights(const Arguments& args, int step, int first_out,
                             unsigned char* weights) {
  const int group = step / kTaps, tap = step % kTaps;
  const int channels = args.num_groups * kGroup;
  for (int i = threadIdx.x; i < kOut * kChunks; i += kThreads) {
    const int row = i / kChunks, chunk = i % kChunks, out = first_out + row;
    const bool is_inside = out < args.out;
    const int64_t at = is_inside ? (int64_t{out} * kTaps + tap) * channels + group * kGroup : 0;
    copy_16_or_zeros(weights + offset_of(row, chunk), args.weight + at + chunk * 8, is_inside);
  }
}

// Two neighbours of which `room` are wanted; in_pairs: every pixel's channels begin at a pair.
__device__ void store_pair(float* to, float first, float second, int room, bool in_pairs) {
  if (room >= 2 && in_pairs) {
    *reinterpret_cast<float2*>(to) = {first, second};
    return;
  }
  if (room >= 1) to[0] = first;
  if (room >= 2) to[1] = second;
}

__device__ void store_pair(bf16* to, float first, float second, int room, bool in_pairs) {
  if (room >= 2 && in_pairs) {
    *reinterpret_cast<uint32_t*>(to) = bf16_pair(first, second);
    return;
  }
  if (room >= 1) store(to, first);
  if (room >= 2) store(to + 1, second);
}

// Grid: tiles of outputs of a tile of pixels, tiles of pixels.
template <int kWarpsN, int kPairs, typename Out>
__global__ void __launch_bounds__(kThreads, 1)
    convolve_3x3(const __grid_constant__ Arguments args, Out* out) {
  using S = Shape<kWarpsN, kPairs>;
  extern __shared__ __align__(128) unsigned char shared[];
  unsigned char* const ring = shared + 2 * kPatchBytes;
  const int top = blockIdx.y / args.tiles_x * kSide, left = blockIdx.y % args.tiles_x * kSide;
  const int first_out = blockIdx.x * S::kOut;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first_row = warp / kWarpsN * S::kRows, own_out = warp % kWarpsN * 16 * kPairs;
  const int num_steps = args.num_groups * kTaps;

  float acc[S::kRows][2 * kPairs][4];
#pragma unroll
  for (int n = 0; n < 2 * kPairs; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int channel = first_out + own_out + 8 * n + 2 * (lane % 4) + i;
      const float bias = args.bias && channel < args.out ? args.bias[channel] : 0;
#pragma unroll
      for (int row = 0; row < S::kRows; ++row) acc[row][n][i] = acc[row][n][i + 2] = bias;
    }
  }

  load_patch(args, 0, top - 1, left - 1, shared);
  for (int step = 0; step < kAhead; ++step) {
    load_weights<S::kOut>(args, step, first_out, ring + step * S::kWeightBytes);
    copies_commit();
  }
  for (int group = 0, step = 0; group < args.num_groups; ++group) {
    const unsigned char* patch = shared + (group & 1) * kPatchBytes;
    for (int tap = 0; tap < kTaps; ++tap, ++step) {
      copies_wait<kAhead - 1>();
      __syncthreads();  // this step's are there, and the last one's have been read
      if (step + kAhead < num_steps)
        load_weights<S::kOut>(args, step + kAhead, first_out,
                              ring + (step + kAhead) % kRing * S::kWeightBytes);
      if (tap == 0 && group + 1 < args.num_groups)
        load_patch(args, group + 1, top - 1, left - 1, shared + (group + 1 & 1) * kPatchBytes);
      copies_commit();
      const unsigned char* weights = ring + step % kRing * S::kWeightBytes;
      const int first_pixel = (first_row + tap / 3) * kPatch + tap % 3 + lane % 16;
#pragma unroll
      for (int k = 0; k < kGroup / 16; ++k) {
        uint32_t a[S::kRows][4];
#pragma unroll
        for (int row = 0; row < S::kRows; ++row)
          load_matrices(a[row], patch + offset_of(first_pixel + row * kPatch, 2 * k + lane / 16));
#pragma unroll
        for (int pair = 0; pair < kPairs; ++pair) {
          uint32_t b[4];
          const int row_of_b = own_out + 16 * pair + (lane / 16) * 8 + (lane & 7);
          load_matrices(b, weights + offset_of(row_of_b, 2 * k + (lane / 8 & 1)));
#pragma unroll
          for (int row = 0; row < S::kRows; ++row) {
            mma_m16n8k16(acc[row][2 * pair], a[row], b[0], b[1]);
            mma_m16n8k16(acc[row][2 * pair + 1], a[row], b[2], b[3]);
          }
        }
      }
    }
  }

#pragma unroll
  for (int row = 0; row < S::kRows; ++row) {
    const int y = top + first_row + row;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int x = left + lane / 4 + 8 * half;
      if (y >= args.height || x >= args.width) continue;
      Out* to = out + (int64_t{y} * args.width + x) * args.out;
#pragma unroll
      for (int n = 0; n < 2 * kPairs; ++n) {
        const int channel = first_out + own_out + 8 * n + 2 * (lane % 4);
        store_pair(to + channel, acc[row][n][2 * half], acc[row][n][2 * half + 1],
                   args.out - channel, args.out % 2 == 0);
      }
    }
  }
}

template <int kWarpsN, int kPairs>
void launch(Context& ctx, const Arguments& args, int tiles, View out) {
  using S = Shape<kWarpsN, kPairs>;
  const dim3 grid(blocks_of(args.out, S::kOut), static_cast<unsigned>(tiles));
  for_float_type(out.dtype(), [&]<typename Out>() {
    const auto kernel = convolve_3x3<kWarpsN, kPairs, Out>;
    check(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kSharedBytes),
        "conv2d");
    kernel<<<grid, kThreads, S::kSharedBytes, stream_of(ctx)>>>(args, out.data<Out>());
  });
  check_launch("conv2d");
}

int tiles_along(int64_t pixels) {
  return static_cast<int>((pixels + kSide - 1) / kSide);
}

}  // namespace

bool is_direct_conv(std::span<const View> parts, const ConvWeight::Form& form) {
  if (form.compute != DType::kBF16 || form.kernel_h != 3 || form.kernel_w != 3 ||
      form.stride != 1 || form.padding != 1)
    return false;
  for (const View& part : parts) {
    if (part.dim(2) % kGroup != 0 || reinterpret_cast<uintptr_t>(part.raw()) % 16 != 0)
      return false;
  }
  const int64_t tiles = int64_t{tiles_along(parts[0].dim(0))} * tiles_along(parts[0].dim(1));
  return tiles * ((form.out + 95) / 96) >= kLeastBlocks;
}

void direct_conv(Context& ctx, std::span<const View> parts, const PackedProduct& weight, View out) {
  Arguments args{};
  for (size_t i = 0; i < parts.size(); ++i) {
    args.parts[i] = parts[i].data<bf16>();
    args.groups[i] = static_cast<int>(parts[i].dim(2) / kGroup);
    args.num_groups += args.groups[i];
  }
  args.weight = weight.weight.data<bf16>();
  args.bias = weight.bias.empty() ? nullptr : weight.bias.data<float>();
  args.height = static_cast<int>(out.dim(0));
  args.width = static_cast<int>(out.dim(1));
  args.out = static_cast<int>(out.dim(2));
  args.tiles_x = tiles_along(out.dim(1));
  const int tiles = tiles_along(out.dim(0)) * args.tiles_x;
  // The widest whose last tile is not mostly empty.
  if (args.out <= 16) return launch<1, 1>(ctx, args, tiles, out);
  if ((args.out + 95) / 96 * 96 <= (args.out + 63) / 64 * 64)
    return launch<2, 3>(ctx, args, tiles, out);
  launch<2, 2>(ctx, args, tiles, out);
}

}  // namespace longtake::cuda
