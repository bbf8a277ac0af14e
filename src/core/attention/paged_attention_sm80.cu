// Paged attention for compute capability 8.0 and later: mma.sync and cp.async (the organisation of
// FlashAttention-2, Dao 2023).
//
// One block of eight warps a multiprocessor; a warp has 16 of the tile's 128 queries and all of its
// keys. Pages come in halves of 64 keys, two of them in shared memory (66 KB with 128 channels), so
// that the next half is under way while one is in work.
#include "attention/paged_attention.cuh"

namespace longtake::cuda {

namespace {

constexpr int kKeys = kPageKeys / 2;  // of one stage
constexpr int kThreads = 256;
using Softmax = OnlineSoftmax<8, 0>;

template <int D>
struct Stage {
  unsigned char keys[kKeys * D * 2];
  unsigned char values[kKeys * D * 2];
  float weights[kKeys];
};

__device__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ void copy_16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)),
               "l"(global)
               : "memory");
}

__device__ void copies_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int kPending>
__device__ void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// acc += A B, 16 x 8 x 16.
__device__ void mma(float* acc, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Bytes from the stage's keys or values to a chunk of 8 channels: a page's layout in 64 rows.
__device__ int stage_offset(int row, int chunk) {
  return (chunk >> 3) * (kKeys * 128) + row * 128 + (((chunk & 7) ^ (row & 7)) << 4);
}

// Half `part` of a page.
template <int D>
__device__ void bring_half(Stage<D>& stage, const unsigned char* page, int part) {
  constexpr int kMatrix = kPageKeys * D * 2;
  constexpr int kRun = kKeys * 128;  // bytes of 64 keys' 64 channels: consecutive on both sides
#pragma unroll
  for (int at = threadIdx.x * 16; at < kKeys * D * 2; at += kThreads * 16) {
    const int from = at / kRun * (2 * kRun) + part * kRun + at % kRun;
    copy_16(stage.keys + at, page + from);
    copy_16(stage.values + at, page + kMatrix + from);
  }
  if (threadIdx.x < kKeys / 4) {
    const auto* weights = page + 2 * kMatrix + part * kKeys * 4;
    copy_16(stage.weights + threadIdx.x * 4, weights + threadIdx.x * 16);
  }
}

// The warp's 16 queries as the left operand of mma, [D / 16][4].
template <int D>
__device__ void load_queries(const PagedArguments& args, const Segment& segment, int warp, int lane,
                             uint32_t (&q)[D / 16][4]) {
  const int tiles = args.lists.num_rows / args.num_heads;
  const int head = segment.row / tiles;
  const int first = segment.row % tiles * kTileQueries + warp * 16 + lane / 4;
#pragma unroll
  for (int part = 0; part < 4; ++part) {
    const int query = first + 8 * (part & 1);
    const auto* row = reinterpret_cast<const uint32_t*>(
        args.q + (static_cast<int64_t>(query) * args.num_heads + head) * D);
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
      q[k][part] = query < args.num_queries ? row[8 * k + 4 * (part >> 1) + (lane & 3)] : 0;
    }
  }
}

template <int D>
__device__ void attend_stage(const Stage<D>& stage, const uint32_t (&q)[D / 16][4], int lane,
                             float scale_log2, Softmax& softmax, float (&out)[D / 2]) {
  float logits[kKeys / 2] = {};
  uint32_t b[4];
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
#pragma unroll
    for (int n = 0; n < kKeys / 16; ++n) {
      const int key = n * 16 + (lane >> 4) * 8 + (lane & 7);
      load_matrices(b, stage.keys + stage_offset(key, 2 * k + ((lane >> 3) & 1)));
      mma(logits + 8 * n, q[k], b[0], b[1]);
      mma(logits + 8 * n + 4, q[k], b[2], b[3]);
    }
  }
  softmax.update<kKeys>(logits, stage.weights, {scale_log2, scale_log2}, 0);
  if (softmax.must_rescale()) {
#pragma unroll
    for (int i = 0; i < D / 2; ++i) out[i] *= softmax.rescale[i / 2 % 2];
  }
#pragma unroll
  for (int k = 0; k < kKeys / 16; ++k) {
    uint32_t terms[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      terms[i] = pack_bf16(logits[8 * k + 2 * i], logits[8 * k + 2 * i + 1]);
    }
#pragma unroll
    for (int n = 0; n < D / 16; ++n) {
      const int key = k * 16 + ((lane >> 3) & 1) * 8 + (lane & 7);
      load_matrices_transposed(b, stage.values + stage_offset(key, 2 * n + (lane >> 4)));
      mma(out + 8 * n, terms, b[0], b[1]);
      mma(out + 8 * n + 4, terms, b[2], b[3]);
    }
  }
}

template <int D>
__global__ void __launch_bounds__(kThreads, 1)
    attend_kernel(const __grid_constant__ PagedArguments args) {
  extern __shared__ __align__(128) unsigned char raw[];
  auto* stages = reinterpret_cast<Stage<D>*>(raw);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  SegmentWalk walk(args, blockIdx.x, gridDim.x);
  uint32_t q[D / 16][4];
  float out[D / 2];
  for (Segment segment; walk.next(segment);) {
    const int32_t* pages = args.lists.pages + segment.first;
    const auto bring = [&](int half) {
      const unsigned char* page =
          args.store + static_cast<int64_t>(pages[half / 2]) * paged_bytes(D);
      bring_half<D>(stages[half % 2], page, half % 2);
      copies_commit();
    };
    bring(0);
    load_queries<D>(args, segment, warp, lane, q);
    Softmax softmax;
#pragma unroll
    for (int i = 0; i < D / 2; ++i) out[i] = 0;
    const int halves = 2 * segment.count;
    for (int half = 0; half < halves; ++half) {
      if (half + 1 < halves) {
        bring(half + 1);
        copies_wait<1>();
      } else {
        copies_wait<0>();
      }
      __syncthreads();
      attend_stage<D>(stages[half % 2], q, lane, args.scale_log2, softmax, out);
      __syncthreads();
    }
    softmax.finish();
    write_rows<D>(args, segment, warp * 16 + lane / 4, out, softmax);
  }
}

template <int D>
void launch(int num_blocks, const PagedArguments& args, cudaStream_t stream) {
  constexpr int kBytes = 2 * static_cast<int>(sizeof(Stage<D>));
  check(cudaFuncSetAttribute(attend_kernel<D>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
        "attention kernel");
  attend_kernel<D><<<static_cast<unsigned>(num_blocks), kThreads, kBytes, stream>>>(args);
}

}  // namespace

void launch_portable(int head_dim, int num_blocks, const PagedArguments& args,
                     cudaStream_t stream) {
  head_dim == 64 ? launch<64>(num_blocks, args, stream) : launch<128>(num_blocks, args, stream);
}

}  // namespace longtake::cuda
