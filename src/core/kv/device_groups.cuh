// What the kernels of merging share. Private to them.
#pragma once

#include <cuda_fp16.h>

#include "kv/device_groups.h"
#include "kv/device_layout.cuh"

namespace longtake::cuda {

// Of the chunk that is committed.
__device__ inline int64_t first_frame(const Groups& g) {
  return *g.clock + g.offset;
}

// The frame that leaves the exact ones when the chunk's frame `step` comes; layers of one launch
// may have chunks of different lengths.
struct Retiring {
  bool is_due;
  int64_t index;  // among those that left so far
  int64_t frame;
  int page;  // history page
};

__device__ inline Retiring retiring(const Groups& g, int step) {
  const int64_t held = g.counters->held;
  const int64_t index = held + step - g.frames.sink - g.exact_frames;
  if (index < 0 || step >= g.chunk_frames) return {false, 0, 0, 0};
  const int64_t at = index + g.frames.sink;  // among all frames
  const int64_t frame =
      at >= held ? first_frame(g) + (at - held) : g.ring_frames[index % g.frames.ring];
  return {true, index, frame, g.frames.page_of(at)};
}

__device__ inline int64_t row_of(const Groups& g, int head, int group) {
  return int64_t{g.pages[head * g.most_pages + group / kPageKeys]} * kPageKeys + group % kPageKeys;
}

// The pair's turn by `frame`; as TimeRotation.
__device__ inline float2 turn_of(const Groups& g, int pair, int64_t frame) {
  double sine, cosine;
  sincos(static_cast<double>(frame) * g.speeds[pair], &sine, &cosine);
  return {static_cast<float>(cosine), static_cast<float>(sine)};
}

// Turns the pairs of a chunk of channels from `channel` on; turns: in shared memory, sign -1
// undoes.
template <int kCount>
__device__ inline void turn(float* x, int channel, int pairs, const float2* turns, float sign) {
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    const int pair = channel / 2 + i;
    if (pair >= pairs) return;
    const float2 by = turns[pair];
    const float a = x[2 * i], b = x[2 * i + 1];
    x[2 * i] = a * by.x - sign * b * by.y;
    x[2 * i + 1] = b * by.x + sign * a * by.y;
  }
}

// The upper 24 bits, rounded.
__device__ inline uint32_t upper_24(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits + 0x7fU + (bits >> 8 & 1U);
}

// Four neighbours of vectors beside pages of T, from a multiple of 4 on.
template <typename T>
__device__ inline float4 load_vector(const Vectors& from, int64_t at) {
  if constexpr (sizeof(T) == 4) {
    return *reinterpret_cast<const float4*>(static_cast<const float*>(from.high) + at);
  } else {
    const auto high = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(from.high) + at);
    const auto low = *reinterpret_cast<const uint32_t*>(from.low + at);
    return {__uint_as_float(high.x << 16 | (low & 0xffU) << 8),
            __uint_as_float((high.x & 0xffff0000U) | (low & 0xff00U)),
            __uint_as_float(high.y << 16 | (low >> 8 & 0xff00U)),
            __uint_as_float((high.y & 0xffff0000U) | (low >> 16 & 0xff00U))};
  }
}

// Two neighbours, from a multiple of 2 on.
template <typename T>
__device__ inline float2 load_pair(const Vectors& from, int64_t at) {
  if constexpr (sizeof(T) == 4) {
    return *reinterpret_cast<const float2*>(static_cast<const float*>(from.high) + at);
  } else {
    const auto high =
        *reinterpret_cast<const uint32_t*>(static_cast<const uint16_t*>(from.high) + at);
    const uint32_t low = *reinterpret_cast<const uint16_t*>(from.low + at);
    return {__uint_as_float(high << 16 | (low & 0xffU) << 8),
            __uint_as_float((high & 0xffff0000U) | (low & 0xff00U))};
  }
}

template <typename T>
__device__ inline void store_vector(const Vectors& to, int64_t at, float4 x) {
  if constexpr (sizeof(T) == 4) {
    *reinterpret_cast<float4*>(static_cast<float*>(to.high) + at) = x;
  } else {
    const uint32_t a = upper_24(x.x), b = upper_24(x.y), c = upper_24(x.z), d = upper_24(x.w);
    *reinterpret_cast<uint2*>(static_cast<uint16_t*>(to.high) + at) = {a >> 16 | (b & 0xffff0000U),
                                                                       c >> 16 | (d & 0xffff0000U)};
    *reinterpret_cast<uint32_t*>(to.low + at) =
        (a >> 8 & 0xffU) | (b & 0xff00U) | (c & 0xff00U) << 8 | (d & 0xff00U) << 16;
  }
}

// The same of mapped keys.
template <typename T>
__device__ inline float4 load_mapped(const void* from, int64_t at) {
  if constexpr (sizeof(T) == 4) {
    return *reinterpret_cast<const float4*>(static_cast<const float*>(from) + at);
  } else {
    const auto pairs = *reinterpret_cast<const uint2*>(static_cast<const __half*>(from) + at);
    const float2 a = __half22float2(reinterpret_cast<const __half2&>(pairs.x));
    const float2 b = __half22float2(reinterpret_cast<const __half2&>(pairs.y));
    return {a.x, a.y, b.x, b.y};
  }
}

template <typename T>
__device__ inline void store_mapped(void* to, int64_t at, float4 x) {
  if constexpr (sizeof(T) == 4) {
    *reinterpret_cast<float4*>(static_cast<float*>(to) + at) = x;
  } else {
    const __half2 a = __floats2half2_rn(x.x, x.y), b = __floats2half2_rn(x.z, x.w);
    *reinterpret_cast<uint2*>(static_cast<__half*>(to) + at) = {
        reinterpret_cast<const uint32_t&>(a), reinterpret_cast<const uint32_t&>(b)};
  }
}

// Where a code goes; scale, square and inverse (of a group) only of quantised ones.
struct Code {
  int8_t* code;
  float *scale, *square;
  float2* inverse;
};

// What search_kernel compares dot products of codes with: 1 / (2 scale), and the square over that,
// less what rounding may do. What has no scale is never refused.
__device__ inline float2 inverse_of(float scale, float square) {
  if (!(scale > 0)) return {0, -1e30F};
  const float inverse = 0.5F / scale;
  return {inverse, square * inverse * (1 - 0x1p-20F)};
}

__device__ inline Code code_of_group(const Groups& g, int64_t row) {
  int8_t* code = g.codes + row * Groups::code_bytes_of(g.ann, g.layout.head_dim);
  if (!g.scales) return {code, nullptr, nullptr, nullptr};
  return {code, g.scales + row, g.squares + row, g.inverses + row};
}

__device__ inline Code code_of_key(const Groups& g, int64_t key) {
  int8_t* code = g.new_codes + key * Groups::code_bytes_of(g.ann, g.layout.head_dim);
  if (!g.new_scales) return {code, nullptr, nullptr, nullptr};
  return {code, g.new_scales + key, g.new_squares + key, nullptr};
}

__device__ inline float warp_sum(float x) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0U, x, step);
  return x;
}

__device__ inline float warp_max(float x) {
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(~0U, x, step));
  return x;
}

// Where a sign stands in a code: 12 in each 16 bytes, which are what a thread of four reads of
// them.
__device__ inline int code_byte_of(int sign) {
  return sign / 12 * 16 + sign % 12;
}

// A block: codes of mapped vectors rows [kRows, D], all in shared memory; directions [D, kSigns]
// there, which only signs need. to(i) is where the i-th goes; those for which wants(i) is false
// stay. All threads, kThreads a multiple of 64.
template <int D, int kRows, int kThreads, typename Wants, typename To>
__device__ inline void write_codes(const Groups& g, const float (*rows)[D], const float* directions,
                                   const Wants& wants, const To& to) {
  if (g.ann == AnnEngine::kLsh) {
    constexpr int kOwn = kRows / (kThreads / 64);
    const int sign = threadIdx.x % 64, first = threadIdx.x / 64 * kOwn;
    const int byte = sign < kSigns ? code_byte_of(sign) : (sign - kSigns) / 4 * 16 + 12 + sign % 4;
    float dots[kOwn] = {};
    if (sign < kSigns) {
      for (int i = 0; i < D; i += 4) {
        float by[4];
#pragma unroll
        for (int n = 0; n < 4; ++n) by[n] = directions[(i + n) * kSigns + sign];
#pragma unroll
        for (int row = 0; row < kOwn; ++row) {
          const float4 x = *reinterpret_cast<const float4*>(&rows[first + row][i]);
          dots[row] = fmaf(x.x, by[0], dots[row]);
          dots[row] = fmaf(x.y, by[1], dots[row]);
          dots[row] = fmaf(x.z, by[2], dots[row]);
          dots[row] = fmaf(x.w, by[3], dots[row]);
        }
      }
    }
#pragma unroll
    for (int row = 0; row < kOwn; ++row) {
      if (wants(first + row))
        to(first + row).code[byte] = sign >= kSigns ? 0 : dots[row] > 0 ? 1 : -1;
    }
    return;
  }
  const int lane = threadIdx.x % 32;
  for (int row = threadIdx.x / 32; row < kRows; row += kThreads / 32) {
    if (!wants(row)) continue;
    const float* vector = rows[row];
    const Code code = to(row);
    float peak = 0;
    for (int i = lane; i < D; i += 32) peak = fmaxf(peak, fabsf(vector[i]));
    peak = warp_max(peak);
    const float inverse = peak > 0 ? __fdiv_rn(127.0F, peak) : 0.0F;
    int sum = 0;
    for (int i = lane; i < D; i += 32) {
      const int x = __float2int_rn(__fmul_rn(vector[i], inverse));
      code.code[i] = static_cast<int8_t>(x);
      sum += x * x;
    }
    sum = __reduce_add_sync(~0U, sum);
    if (lane == 0) {
      const float s = __fdiv_rn(peak, 127.0F);
      const float square = __fmul_rn(__fmul_rn(s, s), static_cast<float>(sum));
      *code.scale = s;
      *code.square = square;
      if (code.inverse) *code.inverse = inverse_of(s, square);
    }
  }
}

// Directions into shared memory, by all threads; nothing for codes that need none.
template <int D, int kThreads>
__device__ inline void load_directions(const Groups& g, float* directions) {
  if (g.ann != AnnEngine::kLsh) return;
  const auto* from = reinterpret_cast<const float4*>(g.directions);
  for (int i = threadIdx.x; i < D * kSigns / 4; i += kThreads)
    reinterpret_cast<float4*>(directions)[i] = from[i];
}

// Calls body.template operator()<D>() for the channels of a head.
template <typename Body>
void for_head_dim(int head_dim, const Body& body) {
  if (head_dim == 64)
    body.template operator()<64>();
  else
    body.template operator()<128>();
}

// Calls body.template operator()<T, D>() for the pages' type, too.
template <typename Body>
void for_pages(const GroupBatch& batch, const Body& body) {
  const PageLayout& layout = batch.host->layout;
  for_head_dim(layout.head_dim, [&]<int D>() {
    if (layout.format == PageFormat::kF32)
      body.template operator()<float, D>();
    else
      body.template operator()<__nv_bfloat16, D>();
  });
}

}  // namespace longtake::cuda
