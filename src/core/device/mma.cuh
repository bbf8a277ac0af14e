// Warp-wide matrix products and the copies that feed them, compute capability 8.0 and later. Thin
// wrappers under PTX's names.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace longtake::cuda {

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ inline void copy_16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)),
               "l"(global)
               : "memory");
}

// Nothing is read where `is_there` is false.
__device__ inline void copy_16_or_zeros(void* shared, const void* global, bool is_there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(is_there ? 16 : 0)
               : "memory");
}

__device__ inline void copies_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int kPending>
__device__ void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four matrices of 8 x 8 16-bit elements; lane l points at row l mod 8 of matrix l / 8.
__device__ inline void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// acc += A B, 16 x 8 x 16 in bf16.
__device__ inline void mma_m16n8k16(float* acc, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Bytes from the first of 64 rows of D channels to a chunk of 8 channels: runs of 64 channels,
// their 128-byte rows swizzled.
__device__ inline int offset_in_64_rows(int row, int chunk) {
  return (chunk >> 3) * (64 * 128) + row * 128 + (((chunk & 7) ^ (row & 7)) << 4);
}

// 16 rows of bf16 [num_rows, stride] as the left operand of the products, rows `first` + {0 ...
// 15}; those from num_rows on are zeros.
template <int D>
__device__ void load_left(uint32_t (&a)[D / 16][4], const __nv_bfloat16* matrix, int64_t stride,
                          int first, int num_rows) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int part = 0; part < 4; ++part) {
    const int row = first + lane / 4 + 8 * (part & 1);
    const auto* pairs = reinterpret_cast<const uint32_t*>(matrix + row * stride);
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
      a[k][part] = row < num_rows ? pairs[8 * k + 4 * (part >> 1) + (lane & 3)] : 0;
    }
  }
}

// The same of f32, rounded.
template <int D>
__device__ void load_left(uint32_t (&a)[D / 16][4], const float* matrix, int64_t stride, int first,
                          int num_rows) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int part = 0; part < 4; ++part) {
    const int row = first + lane / 4 + 8 * (part & 1);
    const auto* pairs = reinterpret_cast<const float2*>(matrix + row * stride);
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
      const float2 pair = row < num_rows ? pairs[8 * k + 4 * (part >> 1) + (lane & 3)] : float2{};
      const __nv_bfloat162 rounded = __floats2bfloat162_rn(pair.x, pair.y);
      a[k][part] = *reinterpret_cast<const uint32_t*>(&rounded);
    }
  }
}

// logits [16 x 64] = A K^T, K 64 rows in shared memory at offset_in_64_rows.
template <int D>
__device__ void multiply_rows(float (&logits)[32], const uint32_t (&a)[D / 16][4],
                              const unsigned char* keys) {
  const int lane = threadIdx.x % 32;
  uint32_t b[4];
#pragma unroll
  for (int i = 0; i < 32; ++i) logits[i] = 0;
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const int key = n * 16 + (lane >> 4) * 8 + (lane & 7);
      load_matrices(b, keys + offset_in_64_rows(key, 2 * k + ((lane >> 3) & 1)));
      mma_m16n8k16(logits + 8 * n, a[k], b[0], b[1]);
      mma_m16n8k16(logits + 8 * n + 4, a[k], b[2], b[3]);
    }
  }
}

}  // namespace longtake::cuda
