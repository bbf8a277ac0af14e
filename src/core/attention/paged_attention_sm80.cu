// Paged attention for compute capability 8.0 and later: mma.sync and cp.async (the organisation of
// FlashAttention-2, Dao 2023).
//
// One block of eight warps a multiprocessor; a warp has 16 of the tile's 128 queries and all of its
// keys. Pages come in halves of 64 keys, two of them in shared memory (66 KB with 128 channels), so
// that the next half is under way while one is in work.
#include <type_traits>

#include "attention/paged_attention.cuh"
#include "device/mma.cuh"

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

template <int D>
__device__ void attend_stage(const Stage<D>& stage, const uint32_t (&q)[D / 16][4], int lane,
                             float scale_log2, Softmax& softmax, float (&out)[D / 2]) {
  float logits[kKeys / 2];
  multiply_rows<D>(logits, q, stage.keys);
  softmax.update<kKeys>(logits, stage.weights, {scale_log2, scale_log2}, 0);
  if (softmax.must_rescale()) {
#pragma unroll
    for (int i = 0; i < D / 2; ++i) out[i] *= softmax.rescale[i / 2 % 2];
  }
#pragma unroll
  for (int k = 0; k < kKeys / 16; ++k) {
    uint32_t terms[4], b[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      terms[i] = pack_bf16(logits[8 * k + 2 * i], logits[8 * k + 2 * i + 1]);
    }
#pragma unroll
    for (int n = 0; n < D / 16; ++n) {
      const int key = k * 16 + ((lane >> 3) & 1) * 8 + (lane & 7);
      load_matrices_transposed(b, stage.values + offset_in_64_rows(key, 2 * n + (lane >> 4)));
      mma_m16n8k16(out + 8 * n, terms, b[0], b[1]);
      mma_m16n8k16(out + 8 * n + 4, terms, b[2], b[3]);
    }
  }
}

template <int D, typename Walk>
__global__ void __launch_bounds__(kThreads, 1)
    attend_kernel(const __grid_constant__ PagedArguments args) {
  extern __shared__ __align__(128) unsigned char raw[];
  __shared__ Plan plan;
  auto* stages = reinterpret_cast<Stage<D>*>(raw);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int tiles = args.lists.num_rows() / args.num_heads;
  if constexpr (std::is_same_v<Walk, ShareWalk>) share_out(args, plan);
  Walk walk(args, plan);
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
    const int halves = 2 * segment.count;
    if (halves > 0) bring(0);
    const int head = segment.row / tiles, tile = segment.row % tiles;
    load_left<D>(q, static_cast<const __nv_bfloat16*>(args.q) + head * D,
                 int64_t{args.num_heads} * D, tile * kTileQueries + warp * 16, args.num_queries);
    Softmax softmax;
#pragma unroll
    for (int i = 0; i < D / 2; ++i) out[i] = 0;
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
    write_rows<D, D>(args, segment, warp * 16 + lane / 4, out, softmax, args.partial_out,
                     args.partial_sum);
  }
}

template <typename Body>
void with_kernel(int head_dim, bool by_rows, const Body& body) {
  if (head_dim == 64) {
    constexpr int kBytes = 2 * static_cast<int>(sizeof(Stage<64>));
    body(by_rows ? attend_kernel<64, RowWalk> : attend_kernel<64, ShareWalk>, kBytes);
  } else {
    constexpr int kBytes = 2 * static_cast<int>(sizeof(Stage<128>));
    body(by_rows ? attend_kernel<128, RowWalk> : attend_kernel<128, ShareWalk>, kBytes);
  }
}

}  // namespace

void prepare_portable(int head_dim) {
  for (const bool by_rows : {false, true}) {
    with_kernel(head_dim, by_rows, [](const auto kernel, int bytes) {
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
            "attention kernel");
    });
  }
}

void launch_portable(int head_dim, int num_blocks, const PagedArguments& args,
                     cudaStream_t stream) {
  with_kernel(head_dim, args.blocks_per_row > 0, [&](const auto kernel, int bytes) {
    kernel<<<static_cast<unsigned>(num_blocks), kThreads, static_cast<size_t>(bytes), stream>>>(
        args);
  });
}

}  // namespace longtake::cuda
