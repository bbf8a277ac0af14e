// f32 and bf16 in memory as f32 in registers, one element or four neighbours at a time. For .cu
// files.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>
#include <initializer_list>

#include "base/dtype.h"
#include "device/cuda_check.h"
#include "tensor/tensor.h"

namespace longtake::cuda {

__device__ inline float load(const float* p) {
  return *p;
}

__device__ inline float load(const bf16* p) {
  return __uint_as_float(uint32_t{p->bits} << 16);
}

__device__ inline void store(float* p, float value) {
  *p = value;
}

__device__ inline void store(bf16* p, float value) {
  p->bits = __bfloat16_as_ushort(__float2bfloat16_rn(value));
}

// p is aligned to four elements.
__device__ inline float4 load4(const float* p) {
  return *reinterpret_cast<const float4*>(p);
}

__device__ inline float4 load4(const bf16* p) {
  const uint2 pairs = *reinterpret_cast<const uint2*>(p);
  return {__uint_as_float(pairs.x << 16), __uint_as_float(pairs.x & 0xffff0000U),
          __uint_as_float(pairs.y << 16), __uint_as_float(pairs.y & 0xffff0000U)};
}

__device__ inline void store4(float* p, float4 v) {
  *reinterpret_cast<float4*>(p) = v;
}

__device__ inline uint32_t bf16_pair(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

__device__ inline void store4(bf16* p, float4 v) {
  *reinterpret_cast<uint2*>(p) = {bf16_pair(v.x, v.y), bf16_pair(v.z, v.w)};
}

// Rounded to bf16 and back.
__device__ inline float round_to_bf16(float value) {
  return __bfloat162float(__float2bfloat16_rn(value));
}

// Whether load4 and store4 may start at every view's first element.
inline bool start_in_fours(std::initializer_list<View> views) {
  for (const View& view : views) {
    if (reinterpret_cast<uintptr_t>(view.raw()) % (4 * size_of(view.dtype())) != 0) return false;
  }
  return true;
}

// Number of blocks of `size` that hold `count` items.
inline unsigned blocks_of(int64_t count, int64_t size) {
  return static_cast<unsigned>((count + size - 1) / size);
}

// Behind a kernel's launch.
inline void check_launch(const char* op) {
  check(cudaGetLastError(), op);
}

}  // namespace longtake::cuda
