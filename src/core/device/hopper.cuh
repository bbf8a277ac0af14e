// Hopper's own instructions (sm_90a): barriers in shared memory that count bytes, bulk copies,
// asynchronous matrix products of a warpgroup. Thin wrappers under PTX's names; see the PTX manual,
// sections on mbarrier, cp.async.bulk and wgmma.
#pragma once

#include <cstdint>

#include "device/mma.cuh"

namespace longtake::cuda {

// ---- mbarrier ----

__device__ inline void mbarrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

__device__ inline void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

// Arrives, and makes the phase wait for `bytes` more from bulk copies.
__device__ inline void mbarrier_arrive_expect(uint64_t* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

// Waits until the phase of that parity is complete; of a fresh barrier, that of parity 1 is.
__device__ inline void mbarrier_wait(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra ready;\n"
      "bra again;\n"
      "ready:\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

__device__ inline void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// ---- bulk copies ----

// bytes, from and to: multiples of 16.
__device__ inline void bulk_copy(void* shared, const void* global, int bytes, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

// Ordinary writes to shared memory become visible to matrix products and bulk copies.
__device__ inline void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- named barriers: some of a block's warps ----

__device__ inline void named_sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

__device__ inline void named_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// ---- clusters ----

// All threads of all blocks of the cluster; what was written to shared memory before it can be read
// after it from every block.
__device__ inline void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;\n" ::: "memory");
}

// The two halves of a cluster_sync() that orders nothing: once waited for, all blocks have begun.
__device__ inline void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
}

__device__ inline void cluster_wait() {
  asm volatile("barrier.cluster.wait;" ::: "memory");
}

// A number to where `address` is in the cluster's block `rank`.
__device__ inline void store_remote(uint32_t address, int rank, float value) {
  uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(remote), "f"(value) : "memory");
}

// Two numbers of the cluster's block `rank` that lie where `address` is in this block.
__device__ inline float2 load_remote(uint32_t address, int rank) {
  uint32_t remote;
  float2 value;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];"
               : "=f"(value.x), "=f"(value.y)
               : "r"(remote)
               : "memory");
  return value;
}

// ---- registers ----

template <int kRegisters>
__device__ void registers_up_to() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ void registers_down_to() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- wgmma ----

__device__ inline void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ inline void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int kPending>
__device__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving uses of an accumulator across this point.
template <int N>
__device__ void pin(float (&registers)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

// A matrix in shared memory in atoms of 8 rows of 128 bytes, swizzled, `address` within the first.
// stride: bytes from one group of 8 rows to the next. leading: for operands whose 128-byte rows run
// along M or N, bytes from one run of 64 such elements to the next; else unused.
__device__ inline uint64_t matrix_descriptor(uint32_t address, int leading, int stride) {
  constexpr uint64_t kSwizzle128 = 1ULL << 62;
  return kSwizzle128 | (static_cast<uint64_t>(stride >> 4) << 32) |
         (static_cast<uint64_t>(leading >> 4) << 16) | ((address & 0x3FFFF) >> 4);
}

#define LONGTAKE_R8(d, i)                                                                         \
  "+f"((d)[(i)]), "+f"((d)[(i) + 1]), "+f"((d)[(i) + 2]), "+f"((d)[(i) + 3]), "+f"((d)[(i) + 4]), \
      "+f"((d)[(i) + 5]), "+f"((d)[(i) + 6]), "+f"((d)[(i) + 7])
#define LONGTAKE_R32(d, i) \
  LONGTAKE_R8(d, i), LONGTAKE_R8(d, (i) + 8), LONGTAKE_R8(d, (i) + 16), LONGTAKE_R8(d, (i) + 24)
#define LONGTAKE_P32                                                                           \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LONGTAKE_P64                                                                             \
  LONGTAKE_P32                                                                                   \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, " \
  "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// acc = A B + (accumulate ? acc : 0), 64 x 128 x 16, A and B in shared memory, both with rows along
// the 16: acc [64] as mma lays it out, f32.
__device__ inline void wgmma_m64n128k16(float (&acc)[64], uint64_t a, uint64_t b, int accumulate) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" LONGTAKE_P64
      "}, %64, %65, p, 1, 1, 0, 0;\n"
      "}\n"
      : LONGTAKE_R32(acc, 0), LONGTAKE_R32(acc, 32)
      : "l"(a), "l"(b), "r"(accumulate));
}

// The same, 64 x 64 x 16.
__device__ inline void wgmma_m64n64k16(float (&acc)[32], uint64_t a, uint64_t b, int accumulate) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" LONGTAKE_P32
      "}, %32, %33, p, 1, 1, 0, 0;\n"
      "}\n"
      : LONGTAKE_R32(acc, 0)
      : "l"(a), "l"(b), "r"(accumulate));
}

// acc += A B, A 64 x 16 in registers, B 16 x 128 (or 64) in shared memory with rows along the N.
__device__ inline void wgmma_m64k16(float (&acc)[64], const uint32_t (&a)[4], uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" LONGTAKE_P64
               "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;\n"
               : LONGTAKE_R32(acc, 0), LONGTAKE_R32(acc, 32)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

__device__ inline void wgmma_m64k16(float (&acc)[32], const uint32_t (&a)[4], uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" LONGTAKE_P32
               "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;\n"
               : LONGTAKE_R32(acc, 0)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// The same in 8 bits (e4m3), 32 at a time; A and B with rows along the 32.
__device__ inline void wgmma_m64n128k32_e4m3(float (&acc)[64], uint64_t a, uint64_t b,
                                             int accumulate) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {" LONGTAKE_P64
      "}, %64, %65, p, 1, 1;\n"
      "}\n"
      : LONGTAKE_R32(acc, 0), LONGTAKE_R32(acc, 32)
      : "l"(a), "l"(b), "r"(accumulate));
}

__device__ inline void wgmma_m64n128k32_e4m3(float (&acc)[64], const uint32_t (&a)[4], uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {" LONGTAKE_P64
               "}, {%64, %65, %66, %67}, %68, 1, 1, 1;\n"
               : LONGTAKE_R32(acc, 0), LONGTAKE_R32(acc, 32)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

#undef LONGTAKE_P64
#undef LONGTAKE_P32
#undef LONGTAKE_R32
#undef LONGTAKE_R8

}  // namespace longtake::cuda
