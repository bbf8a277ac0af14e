// split_heads on the GPU: one launch, a part a row of the grid.
#include "ops/heads.h"
#include "ops/rows.cuh"

namespace longtake::cuda {
namespace {

template <typename Out>
struct Part {
  int column;  // where it begins
  bool rotates;
  const float* norm;
  Out* out;
};

template <typename Out>
struct Parts {
  const float* x;
  const float* cos;
  const float* sin;
  uint32_t rows;
  int dim, head_dim, stride;  // of a part, of a head, of a row of x
  float eps;
  Part<Out> all[kMaxHeadParts];

  // By comparisons: an index would copy all of them to every thread's memory first.
  __device__ Part<Out> of(int part) const {
    Part<Out> own = all[0];
#pragma unroll
    for (int i = 1; i < static_cast<int>(kMaxHeadParts); ++i) {
      if (part == i) own = all[i];
    }
    return own;
  }
};

__device__ float2 rotated(float a, float b, float c, float s) {
  return {a * c - b * s, a * s + b * c};
}

// Parts of up to 16 kTeam values, heads of a multiple of four that divides 4 kTeam, so that all of
// a thread's values stand at one place of their heads; everything starts in fours.
template <int kTeam, typename Out>
__global__ void split_rows(Parts<Out> parts) {
  const Part<Out> part = parts.of(blockIdx.y);
  const int lane = threadIdx.x % kTeam;
  const uint32_t row = blockIdx.x * (blockDim.x / kTeam) + threadIdx.x / kTeam;
  const bool is_row = row < parts.rows;
  const float* x = parts.x + int64_t{row} * parts.stride + part.column;
  const float* norm = part.norm;
  float2 cos{}, sin{};
  if (part.rotates && is_row) {
    const int64_t pair = int64_t{row} * (parts.head_dim / 2) + 4 * lane % parts.head_dim / 2;
    cos = *reinterpret_cast<const float2*>(parts.cos + pair);
    sin = *reinterpret_cast<const float2*>(parts.sin + pair);
  }
  float4 v[kRowChunks];
  float sum = 0;
#pragma unroll
  for (int c = 0; c < kRowChunks; ++c) {
    const int column = 4 * (c * kTeam + lane);
    v[c] = {0, 0, 0, 0};
    if (is_row && column < parts.dim) v[c] = load4(x + column);
    sum += squares4(v[c], 0);
  }
  if (norm != nullptr) {
    sum = team_sum<kTeam>(sum) / static_cast<float>(parts.dim);
    const float inverse = 1.0F / sqrtf(sum + parts.eps);
#pragma unroll
    for (int c = 0; c < kRowChunks; ++c) {
      const int column = 4 * (c * kTeam + lane);
      if (column >= parts.dim) continue;
      const float4 weight = load4(norm + column);
      v[c] = {v[c].x * inverse * weight.x, v[c].y * inverse * weight.y, v[c].z * inverse * weight.z,
              v[c].w * inverse * weight.w};
    }
  }
  if (!is_row) return;
  Out* out = part.out + int64_t{row} * parts.dim;
#pragma unroll
  for (int c = 0; c < kRowChunks; ++c) {
    const int column = 4 * (c * kTeam + lane);
    if (column >= parts.dim) continue;
    if (part.rotates) {
      const float2 low = rotated(v[c].x, v[c].y, cos.x, sin.x);
      const float2 high = rotated(v[c].z, v[c].w, cos.y, sin.y);
      v[c] = {low.x, low.y, high.x, high.y};
    }
    store4(out + column, v[c]);
  }
}

// Parts of any width and alignment, a warp each.
template <typename Out>
__global__ void split_any_rows(Parts<Out> parts) {
  const Part<Out> part = parts.of(blockIdx.y);
  const int lane = threadIdx.x % 32;
  const uint32_t row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  if (row >= parts.rows) return;
  const float* x = parts.x + int64_t{row} * parts.stride + part.column;
  const float* norm = part.norm;
  float inverse = 1;
  if (norm != nullptr) {
    float sum = 0;
    for (int i = lane; i < parts.dim; i += 32) sum += x[i] * x[i];
    sum = team_sum<32>(sum) / static_cast<float>(parts.dim);
    inverse = 1.0F / sqrtf(sum + parts.eps);
  }
  const auto value = [&](int i) { return norm != nullptr ? x[i] * inverse * norm[i] : x[i]; };
  Out* out = part.out + int64_t{row} * parts.dim;
  if (!part.rotates) {
    for (int i = lane; i < parts.dim; i += 32) store(out + i, value(i));
    return;
  }
  for (int i = 2 * lane; i < parts.dim; i += 64) {
    const int64_t pair = int64_t{row} * (parts.head_dim / 2) + i % parts.head_dim / 2;
    const float2 turned = rotated(value(i), value(i + 1), parts.cos[pair], parts.sin[pair]);
    store(out + i, turned.x);
    store(out + i + 1, turned.y);
  }
}

template <typename Out>
void run(Context& ctx, View x, std::span<const HeadPart> all, View cos, View sin, float eps) {
  Parts<Out> parts{};
  parts.x = x.data<float>();
  parts.rows = static_cast<uint32_t>(x.dim(0));
  parts.stride = static_cast<int>(x.dim(1));
  parts.dim = parts.stride / static_cast<int>(all.size());
  parts.eps = eps;
  bool fours = parts.dim % 4 == 0 && start_in_fours({x});
  unsigned count = 0;
  for (size_t p = 0; p < all.size(); ++p) {
    const HeadPart& part = all[p];
    if (part.out.empty()) continue;
    parts.head_dim = static_cast<int>(part.out.dim(2));
    parts.all[count] = {static_cast<int>(p) * parts.dim, part.rotates,
                        part.norm.empty() ? nullptr : part.norm.data<float>(),
                        part.out.data<Out>()};
    if (part.rotates) {
      parts.cos = cos.data<float>();
      parts.sin = sin.data<float>();
      fours = fours && parts.head_dim % 4 == 0 && 128 % parts.head_dim == 0 &&
              start_in_fours({cos, sin});
    }
    fours = fours && start_in_fours({part.norm, part.out});
    ++count;
  }
  const auto launch = [&](auto kernel, int team) {
    const int threads = threads_for(parts.rows, team);
    const dim3 grid(blocks_of(parts.rows, threads / team), count);
    kernel<<<grid, threads, 0, stream_of(ctx)>>>(parts);
    check_launch("split_heads");
  };
  constexpr int kEach = 4 * kRowChunks;
  if (!fours || parts.dim > 512 * kEach) return launch(split_any_rows<Out>, 32);
  if (parts.dim <= 32 * kEach) return launch(split_rows<32, Out>, 32);
  if (parts.dim <= 128 * kEach) return launch(split_rows<128, Out>, 128);
  launch(split_rows<512, Out>, 512);
}

}  // namespace

void split_heads(Context& ctx, View x, std::span<const HeadPart> parts, View cos, View sin,
                 float eps) {
  DType out = DType::kF32;
  for (const HeadPart& part : parts) {
    if (!part.out.empty()) out = part.out.dtype();
  }
  for_float_type(out, [&]<typename Out>() { run<Out>(ctx, x, parts, cos, sin, eps); });
}

}  // namespace longtake::cuda
