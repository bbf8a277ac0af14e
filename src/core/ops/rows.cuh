// Ops over rows that end in a norm: one pass over the row, which stays in registers between reading
// and writing. For .cu files.
#pragma once

#include <algorithm>

#include "device/cuda_runtime.h"
#include "device/dispatch.h"
#include "device/vector.cuh"
#include "ops/residual.h"

namespace longtake::cuda {

// Vectors of frames on the device, by the row of the stream that they serve.
struct Framed {
  const float* vectors[kMaxFrames];
  uint32_t frame_rows;

  __device__ const float* of(uint32_t row) const { return vectors[row / frame_rows]; }
};

inline Framed framed(const FrameVectors& from, int64_t rows, int64_t dim) {
  Framed out{};
  const auto count = static_cast<int64_t>(from.frames.size());
  out.frame_rows = static_cast<uint32_t>(count == 0 ? rows : rows / count);
  for (int64_t f = 0; f < count; ++f)
    out.vectors[f] = vector_of(from, f, dim).template data<float>();
  return out;
}

inline bool start_in_fours(const Framed& vectors) {
  for (const float* vector : vectors.vectors) {
    if (reinterpret_cast<uintptr_t>(vector) % sizeof(float4) != 0) return false;
  }
  return true;
}

// The sum over a team of neighbouring threads, a power of two; a team of more than a warp is the
// block.
template <int kTeam>
__device__ float team_sum(float value) {
#pragma unroll
  for (int step = (kTeam < 32 ? kTeam : 32) / 2; step > 0; step /= 2)
    value += __shfl_xor_sync(0xffffffffU, value, step);
  if constexpr (kTeam > 32) {
    __shared__ float parts[kTeam / 32];
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
    __syncthreads();
    value = 0;
#pragma unroll
    for (int i = 0; i < kTeam / 32; ++i) value += parts[i];
    __syncthreads();
  }
  return value;
}

constexpr int kRowChunks = 4;  // of four neighbours that a thread of a team holds

// What norms a row. rms: v / sqrt(mean(v^2) + eps) * scale; layer: the same of v - mean(v), with
// scale_offset + scale, plus shift.
struct NormVectors {
  Framed scale, shift;
  float eps, scale_offset;
};

// What is added to the row before: y * gate, or y without a gate; the sum is rounded if wanted.
struct Gate {
  Framed vectors;
  bool is_there, rounds;
};

template <typename X, typename Y, typename Out>
struct Rows {
  X* x;
  const Y* y;
  Out* out;
  uint32_t count;
  int dim;
};

__device__ inline float4 add4(float4 x, float4 y) {
  return {x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w};
}

__device__ inline float4 fma4(float4 x, float4 y, float4 z) {
  return {fmaf(x.x, y.x, z.x), fmaf(x.y, y.y, z.y), fmaf(x.z, y.z, z.z), fmaf(x.w, y.w, z.w)};
}

__device__ inline float4 round4(float4 v) {
  return {round_to_bf16(v.x), round_to_bf16(v.y), round_to_bf16(v.z), round_to_bf16(v.w)};
}

__device__ inline float sum4(float4 v) {
  return (v.x + v.y) + (v.z + v.w);
}

__device__ inline float squares4(float4 v, float centre) {
  const float4 d = {v.x - centre, v.y - centre, v.z - centre, v.w - centre};
  return (d.x * d.x + d.y * d.y) + (d.z * d.z + d.w * d.w);
}

template <bool kCentred, bool kSilu>
__device__ float normed(float v, float centre, float inverse, float scale, float offset,
                        float shift) {
  if constexpr (kCentred) return fmaf((v - centre) * inverse, scale + offset, shift);
  const float y = v * inverse * scale;
  return kSilu ? y / (1.0F + expf(-y)) : y;
}

// Rows of up to 16 kTeam values, a multiple of four; everything starts in fours.
template <int kTeam, bool kCentred, bool kSilu, bool kAdds, typename X, typename Y, typename Out>
__global__ void norm_rows(Rows<X, Y, Out> rows, Gate gate, NormVectors norm) {
  const int lane = threadIdx.x % kTeam;
  const uint32_t row = blockIdx.x * (blockDim.x / kTeam) + threadIdx.x / kTeam;
  const bool is_row = row < rows.count;
  const int64_t start = int64_t{row} * rows.dim;
  float4 v[kRowChunks];
  float sum = 0;
#pragma unroll
  for (int c = 0; c < kRowChunks; ++c) {
    const int column = 4 * (c * kTeam + lane);
    v[c] = {0, 0, 0, 0};
    if (!is_row || column >= rows.dim) continue;
    v[c] = load4(rows.x + start + column);
    if constexpr (kAdds) {
      const float4 y = load4(rows.y + start + column);
      v[c] = gate.is_there ? fma4(y, load4(gate.vectors.of(row) + column), v[c]) : add4(v[c], y);
      if (gate.rounds) v[c] = round4(v[c]);
      store4(rows.x + start + column, v[c]);
    }
    sum += kCentred ? sum4(v[c]) : squares4(v[c], 0);
  }
  sum = team_sum<kTeam>(sum) / static_cast<float>(rows.dim);
  float centre = 0;
  if constexpr (kCentred) {
    centre = sum;
    sum = 0;
#pragma unroll
    for (int c = 0; c < kRowChunks; ++c) {
      if (4 * (c * kTeam + lane) < rows.dim) sum += squares4(v[c], centre);
    }
    sum = team_sum<kTeam>(sum) / static_cast<float>(rows.dim);
  }
  if (!is_row) return;
  const float inverse = 1.0F / sqrtf(sum + norm.eps);
  const float* scales = norm.scale.of(row);
  const float* shifts = norm.shift.of(row);
#pragma unroll
  for (int c = 0; c < kRowChunks; ++c) {
    const int column = 4 * (c * kTeam + lane);
    if (column >= rows.dim) continue;
    const float4 scale = load4(scales + column);
    float4 shift = {0, 0, 0, 0};
    if constexpr (kCentred) shift = load4(shifts + column);
    const auto value = [&](float a, float b, float d) {
      return normed<kCentred, kSilu>(a, centre, inverse, b, norm.scale_offset, d);
    };
    store4(rows.out + start + column,
           {value(v[c].x, scale.x, shift.x), value(v[c].y, scale.y, shift.y),
            value(v[c].z, scale.z, shift.z), value(v[c].w, scale.w, shift.w)});
  }
}

// Rows of any width and alignment, a warp each, read once for every sum.
template <bool kCentred, bool kSilu, bool kAdds, typename X, typename Y, typename Out>
__global__ void norm_any_rows(Rows<X, Y, Out> rows, Gate gate, NormVectors norm) {
  const int lane = threadIdx.x % 32;
  const uint32_t row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  if (row >= rows.count) return;
  X* x = rows.x + int64_t{row} * rows.dim;
  const Y* y = rows.y + int64_t{row} * rows.dim;
  Out* out = rows.out + int64_t{row} * rows.dim;
  float sum = 0;
  for (int i = lane; i < rows.dim; i += 32) {
    float v = load(x + i);
    if constexpr (kAdds) {
      v = gate.is_there ? fmaf(load(y + i), gate.vectors.of(row)[i], v) : v + load(y + i);
      if (gate.rounds) v = round_to_bf16(v);
      store(x + i, v);
    }
    sum += kCentred ? v : v * v;
  }
  sum = team_sum<32>(sum) / static_cast<float>(rows.dim);
  float centre = 0;
  if constexpr (kCentred) {
    centre = sum;
    sum = 0;
    for (int i = lane; i < rows.dim; i += 32) {
      const float v = load(x + i) - centre;
      sum += v * v;
    }
    sum = team_sum<32>(sum) / static_cast<float>(rows.dim);
  }
  const float inverse = 1.0F / sqrtf(sum + norm.eps);
  for (int i = lane; i < rows.dim; i += 32) {
    const float shift = kCentred ? norm.shift.of(row)[i] : 0;
    store(out + i, normed<kCentred, kSilu>(load(x + i), centre, inverse, norm.scale.of(row)[i],
                                           norm.scale_offset, shift));
  }
}

// Few rows are spread over as many multiprocessors as there are; many share blocks.
inline int threads_for(int64_t rows, int team) {
  constexpr int64_t kManyRows = 2048;
  return std::max(team, rows >= kManyRows ? 128 : 32);
}

template <bool kCentred, bool kSilu, bool kAdds, typename X, typename Y, typename Out>
void run_norm_rows(Context& ctx, const char* op, const Rows<X, Y, Out>& rows, bool in_fours,
                   const Gate& gate, const NormVectors& norm) {
  const auto launch = [&](auto kernel, int team) {
    const int threads = threads_for(rows.count, team);
    kernel<<<blocks_of(rows.count, threads / team), threads, 0, stream_of(ctx)>>>(rows, gate, norm);
    check_launch(op);
  };
  const bool fours = in_fours && rows.dim % 4 == 0 && start_in_fours(gate.vectors) &&
                     start_in_fours(norm.scale) && start_in_fours(norm.shift);
  constexpr int kEach = 4 * kRowChunks;
  if (!fours || rows.dim > 512 * kEach)
    return launch(norm_any_rows<kCentred, kSilu, kAdds, X, Y, Out>, 32);
  if (rows.dim <= 8 * kEach) return launch(norm_rows<8, kCentred, kSilu, kAdds, X, Y, Out>, 8);
  if (rows.dim <= 32 * kEach) return launch(norm_rows<32, kCentred, kSilu, kAdds, X, Y, Out>, 32);
  if (rows.dim <= 128 * kEach)
    return launch(norm_rows<128, kCentred, kSilu, kAdds, X, Y, Out>, 128);
  launch(norm_rows<512, kCentred, kSilu, kAdds, X, Y, Out>, 512);
}

}  // namespace longtake::cuda
