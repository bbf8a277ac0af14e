// Paged attention for Hopper: bulk copies, wgmma, specialised warps (the organisation of
// FlashAttention-3, Shah et al. 2024).
//
// One block a multiprocessor, three warpgroups. One thread of the first brings pages in, kStages of
// them ahead. The other two have 64 queries each of the tile of 128, and share every page:
//
//   for page j:  logits  = Q K_j^T           on the tensor cores, while
//                out    += P_(j-1) V_(j-1)   follows on them
//                wait for the logits; P_j = softmax terms of the logits, while the tensor cores
//                work on; wait for out; rescale it where the reference moved
//
// The two take turns at starting products, so that one has its softmax while the other multiplies.
// Registers: out D/2, logits 64, terms 32 of 232 a thread.
#include "attention/paged_attention.cuh"
#include "device/hopper.cuh"

namespace longtake::cuda {

namespace {

constexpr int kGroups = 2;  // warpgroups that compute
constexpr int kGroupQueries = kTileQueries / kGroups;
constexpr int kThreads = 128 * (kGroups + 1);
constexpr int kWeightBytes = kPageKeys * 4;
// Named barriers; 0 is __syncthreads.
constexpr int kTurnBarrier = 1, kGroupBarrier = 3;

template <int D, int kStages>
struct Shared {
  // Matrix products want their atoms at multiples of 1024 bytes.
  unsigned char q[kGroups][kGroupQueries * D * 2];
  unsigned char keys[kStages][kPageKeys * D * 2];
  unsigned char values[kStages][kPageKeys * D * 2];
  // Twice as many as pages: weights are read after the release of their keys, and a slot comes
  // round again only after the release of keys that the reader asks for later.
  float weights[2 * kStages][kPageKeys];
  uint64_t keys_full[kStages], keys_free[kStages], values_full[kStages], values_free[kStages];
};

// A position in the ring of stages.
template <int kStages>
struct Ring {
  int stage = 0, parity = 0;

  __device__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

template <int D, int kStages>
__device__ void bring_pages(const PagedArguments& args, Shared<D, kStages>& shared) {
  constexpr int kHalf = kPageKeys * D * 2;
  SegmentWalk walk(args, blockIdx.x, gridDim.x);
  Ring<kStages> ring;
  int weights = 0;
  for (Segment segment; walk.next(segment);) {
    const int32_t* pages = args.lists.pages + segment.first;
    int page = pages[0];
    for (int j = 0; j < segment.count; ++j) {
      const unsigned char* from = args.store + static_cast<int64_t>(page) * paged_bytes(D);
      if (j + 1 < segment.count) page = pages[j + 1];  // under way while this one waits
      uint64_t* full = &shared.keys_full[ring.stage];
      mbarrier_wait(&shared.keys_free[ring.stage], ring.parity ^ 1);
      mbarrier_arrive_expect(full, kHalf + kWeightBytes);
      bulk_copy(shared.keys[ring.stage], from, kHalf, full);
      bulk_copy(shared.weights[weights], from + 2 * kHalf, kWeightBytes, full);
      full = &shared.values_full[ring.stage];
      mbarrier_wait(&shared.values_free[ring.stage], ring.parity ^ 1);
      mbarrier_arrive_expect(full, kHalf);
      bulk_copy(shared.values[ring.stage], from + kHalf, kHalf, full);
      ring.advance();
      weights = weights + 1 == 2 * kStages ? 0 : weights + 1;
    }
  }
}

// The group's queries into shared memory, as the store lays out keys, but in 64 rows.
template <int D>
__device__ void load_queries(const PagedArguments& args, const Segment& segment, int group,
                             unsigned char* to) {
  constexpr int kChunks = D / 8;
  const int tiles = args.lists.num_rows / args.num_heads;
  const int head = segment.row / tiles;
  const int first = segment.row % tiles * kTileQueries + group * kGroupQueries;
  const auto* from = reinterpret_cast<const uint4*>(args.q);
#pragma unroll
  for (int i = threadIdx.x % 128; i < kGroupQueries * kChunks; i += 128) {
    const int row = i / kChunks, chunk = i % kChunks;
    const int64_t at = static_cast<int64_t>(first + row) * args.num_heads + head;
    const int offset =
        (chunk >> 3) * (kGroupQueries * 128) + row * 128 + (((chunk & 7) ^ (row & 7)) << 4);
    *reinterpret_cast<uint4*>(to + offset) =
        first + row < args.num_queries ? from[at * kChunks + chunk] : uint4{};
  }
}

// logits = Q K^T: queries and keys have their channels along the 128-byte rows.
template <int D>
__device__ void start_logits(float (&logits)[kPageKeys / 2], uint32_t q, uint32_t keys) {
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
    const int half = k / 4, in_row = k % 4 * 32;
    const uint64_t a = matrix_descriptor(q + half * (kGroupQueries * 128) + in_row, 16, 1024);
    const uint64_t b = matrix_descriptor(keys + half * (kPageKeys * 128) + in_row, 16, 1024);
    wgmma_m64n128k16(logits, a, b, k > 0);
  }
}

// out += P V: the rows of V are keys, its channels run along them.
template <int D>
__device__ void start_out(float (&out)[D / 2], const uint32_t (&terms)[kPageKeys / 16][4],
                          uint32_t values) {
#pragma unroll
  for (int k = 0; k < kPageKeys / 16; ++k) {
    wgmma_m64k16(out, terms[k], matrix_descriptor(values + k * 2048, kPageKeys * 128, 1024));
  }
}

template <int D, int kStages>
__device__ void compute(const PagedArguments& args, Shared<D, kStages>& shared, int group) {
  SegmentWalk walk(args, blockIdx.x, gridDim.x);
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  Ring<kStages> keys, values;
  int weights = 0;
  const uint32_t q = shared_address(shared.q[group]);
  const auto release = [&](uint64_t* barrier) {
    if (lane == 0) mbarrier_arrive(barrier);
  };
  float logits[kPageKeys / 2], out[D / 2];
  uint32_t terms[kPageKeys / 16][4];
  const auto round_terms = [&] {
#pragma unroll
    for (int i = 0; i < kPageKeys / 4; ++i) {
      terms[i / 4][i % 4] = pack_bf16(logits[2 * i], logits[2 * i + 1]);
    }
  };
  const auto next_weights = [&] {
    const float* now = shared.weights[weights];
    weights = weights + 1 == 2 * kStages ? 0 : weights + 1;
    return now;
  };
  // The first turn is the first group's.
  if (group == 1) named_arrive(kTurnBarrier, 2 * 128);
  for (Segment segment; walk.next(segment);) {
    named_sync(kGroupBarrier + group, 128);  // all have read the last queries
    load_queries<D>(args, segment, group, shared.q[group]);
    fence_proxy_async();
    named_sync(kGroupBarrier + group, 128);
    OnlineSoftmax softmax;
#pragma unroll
    for (int i = 0; i < D / 2; ++i) out[i] = 0;

    mbarrier_wait(&shared.keys_full[keys.stage], keys.parity);
    pin(logits);
    wgmma_fence();
    start_logits<D>(logits, q, shared_address(shared.keys[keys.stage]));
    wgmma_commit();
    wgmma_wait<0>();
    pin(logits);
    release(&shared.keys_free[keys.stage]);
    keys.advance();
    softmax.template update<kPageKeys>(logits, next_weights(), args.scale_log2);
    round_terms();

    for (int j = 1; j < segment.count; ++j) {
      mbarrier_wait(&shared.keys_full[keys.stage], keys.parity);
      named_sync(kTurnBarrier + group, 2 * 128);
      pin(logits);
      pin(out);
      wgmma_fence();
      start_logits<D>(logits, q, shared_address(shared.keys[keys.stage]));
      wgmma_commit();
      mbarrier_wait(&shared.values_full[values.stage], values.parity);
      start_out<D>(out, terms, shared_address(shared.values[values.stage]));
      wgmma_commit();
      named_arrive(kTurnBarrier + 1 - group, 2 * 128);
      wgmma_wait<1>();
      pin(logits);
      release(&shared.keys_free[keys.stage]);
      keys.advance();
      softmax.template update<kPageKeys>(logits, next_weights(), args.scale_log2);
      wgmma_wait<0>();
      pin(out);
      release(&shared.values_free[values.stage]);
      values.advance();
      round_terms();
      if (softmax.must_rescale()) {
#pragma unroll
        for (int i = 0; i < D / 2; ++i) out[i] *= softmax.rescale[i / 2 % 2];
      }
    }

    mbarrier_wait(&shared.values_full[values.stage], values.parity);
    pin(out);
    wgmma_fence();
    start_out<D>(out, terms, shared_address(shared.values[values.stage]));
    wgmma_commit();
    wgmma_wait<0>();
    pin(out);
    release(&shared.values_free[values.stage]);
    values.advance();
    softmax.finish();
    write_rows<D>(args, segment, group * kGroupQueries + warp * 16 + lane / 4, out, softmax);
  }
  // The other group's last turn left one arrival too many on the first group's barrier.
  if (group == 0) named_sync(kTurnBarrier, 2 * 128);
}

template <int D, int kStages>
__global__ void __launch_bounds__(kThreads, 1)
    attend_kernel(const __grid_constant__ PagedArguments args) {
  extern __shared__ unsigned char raw[];
  auto& shared =
      *reinterpret_cast<Shared<D, kStages>*>(raw + (1024 - shared_address(raw) % 1024) % 1024);
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      mbarrier_init(&shared.keys_full[s], 1);
      mbarrier_init(&shared.values_full[s], 1);
      mbarrier_init(&shared.keys_free[s], 4 * kGroups);  // one arrival a warp
      mbarrier_init(&shared.values_free[s], 4 * kGroups);
    }
    fence_mbarrier_init();
  }
  __syncthreads();
  const int group = static_cast<int>(threadIdx.x / 128) - 1;
  if (group < 0) {
    registers_down_to<40>();
    if (threadIdx.x == 0) bring_pages<D, kStages>(args, shared);
  } else {
    registers_up_to<232>();
    compute<D, kStages>(args, shared, group);
  }
}

template <int D, int kStages>
void launch(int num_blocks, const PagedArguments& args, cudaStream_t stream) {
  constexpr int kBytes = static_cast<int>(sizeof(Shared<D, kStages>)) + 1024;
  static_assert(kBytes <= 227 * 1024);
  check(cudaFuncSetAttribute(attend_kernel<D, kStages>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             kBytes),
        "attention kernel");
  attend_kernel<D, kStages><<<static_cast<unsigned>(num_blocks), kThreads, kBytes, stream>>>(args);
}

}  // namespace

void launch_hopper(int head_dim, int num_blocks, const PagedArguments& args, cudaStream_t stream) {
  head_dim == 64 ? launch<64, 4>(num_blocks, args, stream)
                 : launch<128, 2>(num_blocks, args, stream);
}

}  // namespace longtake::cuda
