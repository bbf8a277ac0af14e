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
// Registers: out D/2, logits 64, terms 32 (in 8 bits 16) of 232 a thread.
//
// Of 64 channels the products are so short that the softmax of two groups cannot hide what each of
// them waits for. Where a block has one row to do, four groups do it: each has 64 queries and half
// of every page's keys; pairs put their halves together at the end.
#include <algorithm>
#include <type_traits>

#include "attention/paged_attention.cuh"
#include "device/hopper.cuh"
#include "device/launch.cuh"

namespace longtake::cuda {

namespace {

constexpr int kGroupQueries = 64;
constexpr int kHalves = kTileQueries / kGroupQueries;
// Named barriers; 0 is __syncthreads.
constexpr int kTurnBarrier = 1, kGroupBarrier = 3, kPairBarrier = 7, kAllBarrier = 9;

// Where the chunk of 16 bytes of a row of 128 goes in shared memory.
__device__ int swizzled(int row, int chunk) {
  return row * 128 + ((chunk ^ (row & 7)) << 4);
}

// A format tells sizes, how queries are loaded, and how the two products are started.

template <int kChannels>
struct Bf16Pages {
  static constexpr int D = kChannels;
  static constexpr int kStages = D == 64 ? 4 : 2;
  static constexpr int kMatrixBytes = kPageKeys * D * 2;  // of a page's keys; of its values
  static constexpr int kQueryBytes = kGroupQueries * D * 2;
  static constexpr int kFloats = kPageKeys;  // behind keys and values
  using Softmax = OnlineSoftmax<8, 0>;
  using Terms = uint32_t[kPageKeys / 16][4];

  // Queries `first` + {0 ... 63} of a head as the store lays out keys, but in 64 rows.
  static __device__ void load_queries(const PagedArguments& args, int head, int first,
                                      unsigned char* to, float*) {
    constexpr int kChunks = D / 8;
    const auto* from = static_cast<const uint4*>(args.q);
#pragma unroll
    for (int i = threadIdx.x % 128; i < kGroupQueries * kChunks; i += 128) {
      const int row = i / kChunks, chunk = i % kChunks;
      const int64_t at = static_cast<int64_t>(first + row) * args.num_heads + head;
      *reinterpret_cast<uint4*>(to + (chunk >> 3) * (kGroupQueries * 128) +
                                swizzled(row, chunk & 7)) =
          first + row < args.num_queries ? from[at * kChunks + chunk] : uint4{};
    }
  }

  // logits = Q K^T: queries and keys have their channels along the rows.
  static __device__ void start_logits(float (&logits)[kPageKeys / 2], uint32_t q, uint32_t keys) {
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
      const int half = k / 4, in_row = k % 4 * 32;
      const uint64_t a = matrix_descriptor(q + half * (kGroupQueries * 128) + in_row, 16, 1024);
      const uint64_t b = matrix_descriptor(keys + half * (kPageKeys * 128) + in_row, 16, 1024);
      wgmma_m64n128k16(logits, a, b, k > 0);
    }
  }

  // out += P V: the rows of V are keys, its channels run along them.
  static __device__ void start_out(float (&out)[D / 2], const Terms& terms, uint32_t values) {
#pragma unroll
    for (int k = 0; k < kPageKeys / 16; ++k) {
      wgmma_m64k16(out, terms[k], matrix_descriptor(values + k * 2048, kPageKeys * 128, 1024));
    }
  }

  static __device__ void round_terms(const float (&exact)[kPageKeys / 2], Terms& terms) {
#pragma unroll
    for (int i = 0; i < kPageKeys / 4; ++i) {
      terms[i / 4][i % 4] = pack_bf16(exact[2 * i], exact[2 * i + 1]);
    }
  }
};

struct Fp8Pages {
  static constexpr int D = 128;
  static constexpr int kStages = 4;
  static constexpr int kMatrixBytes = kPageKeys * D;
  static constexpr int kQueryBytes = kGroupQueries * D;
  static constexpr int kFloats = kPageKeys + 4;
  // e4m3 goes from 2^-9 to 448. Products take half the time of those in bf16, so that the special
  // function unit falls short: one term in eight comes from the multiply-add pipes.
  using Softmax = OnlineSoftmax<2, 6, 1>;
  using Terms = uint32_t[kPageKeys / 32][4];

  // Rounds each query over its own scale; scales [64].
  static __device__ void load_queries(const PagedArguments& args, int head, int first,
                                      unsigned char* to, float* scales) {
    // Eight threads a query, a chunk of 16 channels each.
    for (int i = threadIdx.x % 128; i < kGroupQueries * 8; i += 128) {
      const int row = i / 8, chunk = i % 8;
      const int64_t at = (static_cast<int64_t>(first + row) * args.num_heads + head) * D;
      uint4 raw[2] = {};
      if (first + row < args.num_queries) {
        const auto* from =
            reinterpret_cast<const uint4*>(static_cast<const __nv_bfloat16*>(args.q) + at) +
            2 * chunk;
        raw[0] = from[0];
        raw[1] = from[1];
      }
      const auto* pairs = reinterpret_cast<const __nv_bfloat162*>(raw);
      float largest = 0;
#pragma unroll
      for (int p = 0; p < 8; ++p) {
        const float2 pair = __bfloat1622float2(pairs[p]);
        largest = fmaxf(largest, fmaxf(fabsf(pair.x), fabsf(pair.y)));
      }
#pragma unroll
      for (int step = 4; step > 0; step /= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(~0U, largest, step));
      }
      const float scale = largest > 0 ? largest / 448 : 1;
      const float factor = 1 / scale;
      uint32_t rounded[4];
#pragma unroll
      for (int p = 0; p < 4; ++p) {
        const float2 low = __bfloat1622float2(pairs[2 * p]);
        const float2 high = __bfloat1622float2(pairs[2 * p + 1]);
        rounded[p] = pack_e4m3(low.x * factor, low.y * factor, high.x * factor, high.y * factor);
      }
      *reinterpret_cast<uint4*>(to + swizzled(row, chunk)) =
          make_uint4(rounded[0], rounded[1], rounded[2], rounded[3]);
      if (chunk == 0) scales[row] = scale;
    }
  }

  static __device__ void start_logits(float (&logits)[kPageKeys / 2], uint32_t q, uint32_t keys) {
#pragma unroll
    for (int k = 0; k < D / 32; ++k) {
      wgmma_m64n128k32_e4m3(logits, matrix_descriptor(q + k * 32, 16, 1024),
                            matrix_descriptor(keys + k * 32, 16, 1024), k > 0);
    }
  }

  static __device__ void start_out(float (&out)[D / 2], const Terms& terms, uint32_t values) {
#pragma unroll
    for (int k = 0; k < kPageKeys / 32; ++k) {
      wgmma_m64n128k32_e4m3(out, terms[k], matrix_descriptor(values + k * 32, 16, 1024));
    }
  }

  // Four accumulators of one row in four bytes: the columns of V follow (paged_attention.cu).
  static __device__ void round_terms(const float (&exact)[kPageKeys / 2], Terms& terms) {
#pragma unroll
    for (int i = 0; i < kPageKeys / 8; ++i) {
      const int k = i / 4, row = i % 2, at = 16 * k + i % 4 / 2 * 8 + 2 * row;
      terms[k][i % 4] = pack_e4m3(exact[at], exact[at + 1], exact[at + 4], exact[at + 5]);
    }
  }

  static __device__ uint32_t pack_e4m3(float a, float b, float c, float d) {
    uint16_t low, high;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(b), "f"(a));
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(d), "f"(c));
    return static_cast<uint32_t>(high) << 16 | low;
  }
};

// kKeyParts: of a page's keys, a warpgroup each.
template <typename Pages, int kKeyParts>
struct Shared {
  static constexpr int kStages = Pages::kStages;
  static constexpr int kGroups = kHalves * kKeyParts;  // warpgroups that compute
  // Matrix products want their atoms at multiples of 1024 bytes.
  unsigned char q[kGroups][Pages::kQueryBytes];
  unsigned char keys[kStages][Pages::kMatrixBytes];
  unsigned char values[kStages][Pages::kMatrixBytes];
  // Twice as many as pages: weights are read after the release of their keys, and a slot comes
  // round again only after the release of keys that the reader asks for later.
  float weights[2 * kStages][Pages::kFloats];
  float query_scales[kGroups][kGroupQueries];
  float2 partial_sum[kKeyParts * kTileQueries];  // of a row that a cluster or groups share
  uint64_t keys_full[kStages], keys_free[kStages], values_full[kStages], values_free[kStages];

  // A cluster's part of its row lies where its pages were, [kTileQueries][kPartialStride], and so
  // does what groups have of a part. Rows are apart by what makes a warp's writes meet all banks.
  static constexpr int kPartialStride = Pages::D + 8;

  __device__ float* partial_out() { return reinterpret_cast<float*>(keys[0]); }
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

template <typename Pages, typename Walk, int kKeyParts>
__device__ void bring_pages(const PagedArguments& args, const Plan& plan,
                            Shared<Pages, kKeyParts>& shared) {
  constexpr int kMatrix = Pages::kMatrixBytes, kFloatBytes = Pages::kFloats * 4;
  constexpr int kStages = Pages::kStages;
  Walk walk(args, plan);
  Ring<kStages> ring;
  int weights = 0;
  for (Segment segment; walk.next(segment);) {
    const int32_t* pages = args.lists.pages + segment.first;
    int page = segment.count > 0 ? pages[0] : 0;
    for (int j = 0; j < segment.count; ++j) {
      const unsigned char* from =
          args.store + static_cast<int64_t>(page) * (2 * kMatrix + kFloatBytes);
      if (j + 1 < segment.count) page = pages[j + 1];  // under way while this one waits
      uint64_t* full = &shared.keys_full[ring.stage];
      mbarrier_wait(&shared.keys_free[ring.stage], ring.parity ^ 1);
      mbarrier_arrive_expect(full, kMatrix + kFloatBytes);
      bulk_copy(shared.keys[ring.stage], from, kMatrix, full);
      bulk_copy(shared.weights[weights], from + 2 * kMatrix, kFloatBytes, full);
      full = &shared.values_full[ring.stage];
      mbarrier_wait(&shared.values_free[ring.stage], ring.parity ^ 1);
      mbarrier_arrive_expect(full, kMatrix);
      bulk_copy(shared.values[ring.stage], from + kMatrix, kMatrix, full);
      ring.advance();
      weights = weights + 1 == 2 * kStages ? 0 : weights + 1;
    }
  }
}

// What a segment without pages comes to, for a half of the queries.
template <typename Pages, int kKeyParts>
__device__ void write_nothing(const PagedArguments& args, Shared<Pages, kKeyParts>& shared,
                              const Segment& segment, int group) {
  constexpr int D = Pages::D, kChunks = D / 8;
  const int tiles = args.lists.num_rows() / args.num_heads;
  if (segment.slot >= 0) {
    if (threadIdx.x % 128 < kGroupQueries) {
      shared.partial_sum[group * kGroupQueries + threadIdx.x % 128] = {-INFINITY, 0};
    }
    return;
  }
  for (int i = threadIdx.x % 128; i < kGroupQueries * kChunks; i += 128) {
    const int query = segment.row % tiles * kTileQueries + group * kGroupQueries + i / kChunks;
    if (query >= args.num_queries) return;
    reinterpret_cast<uint4*>(out_of<D>(args, query, segment.row / tiles))[i % kChunks] = {};
  }
}

// Puts a row together from what the cluster's blocks have of it, each of them some of its queries.
// For the threads that compute.
template <int kBlocks, typename Pages, int kKeyParts>
__device__ void combine_parts(const PagedArguments& args, Shared<Pages, kKeyParts>& shared) {
  using Parts = Shared<Pages, kKeyParts>;
  constexpr int D = Pages::D, kPairs = D / 2, kStride = Parts::kPartialStride;
  constexpr int kQueries = kTileQueries / kBlocks;
  const int row = blockIdx.x / kBlocks, first = blockIdx.x % kBlocks * kQueries;
  const int tiles = args.lists.num_rows() / args.num_heads;
  const uint32_t sums = shared_address(shared.partial_sum);
  const uint32_t outs = shared_address(shared.partial_out());
#pragma unroll 1
  for (int i = threadIdx.x - 128; i < kQueries * kPairs; i += 128 * Parts::kGroups) {
    const int in_tile = first + i / kPairs, pair = i % kPairs;
    const int query = row % tiles * kTileQueries + in_tile;
    if (query >= args.num_queries) return;
    float2 part[kBlocks], out[kBlocks];  // all on their way before the first is looked at
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      part[b] = load_remote(sums + in_tile * 8, b);
      out[b] = load_remote(outs + (in_tile * kStride + 2 * pair) * 4, b);
    }
    float reference = -INFINITY;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) reference = fmaxf(reference, part[b].x);
    float2 numerator = {};
    float sum = 0;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      // A block without pages has written no more than that.
      const bool there = part[b].x != -INFINITY;
      const float factor = there ? fast_exp2(part[b].x - reference) : 0;
      numerator.x = there ? fmaf(factor, out[b].x, numerator.x) : numerator.x;
      numerator.y = there ? fmaf(factor, out[b].y, numerator.y) : numerator.y;
      sum = fmaf(factor, part[b].y, sum);
    }
    const float inverse = sum == 0 ? 0 : 1 / sum;
    reinterpret_cast<uint32_t*>(out_of<D>(args, query, row / tiles))[pair] =
        pack_bf16(numerator.x * inverse, numerator.y * inverse);
  }
}

template <typename Pages, int kKeyParts>
__device__ void combine_in_cluster(const PagedArguments& args, Shared<Pages, kKeyParts>& shared) {
  switch (args.blocks_per_row) {
    case 2:
      return combine_parts<2>(args, shared);
    case 4:
      return combine_parts<4>(args, shared);
    case 8:
      return combine_parts<8>(args, shared);
    default:
      return combine_parts<16>(args, shared);
  }
}

template <typename Pages, typename Walk>
__device__ void compute(const PagedArguments& args, const Plan& plan, Shared<Pages, 1>& shared,
                        int group) {
  constexpr int D = Pages::D, kStages = Pages::kStages;
  constexpr bool kScaled = Pages::kFloats > kPageKeys;
  const int tiles = args.lists.num_rows() / args.num_heads;
  Walk walk(args, plan);
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  Ring<kStages> keys, values;
  int weights = 0;
  const uint32_t q = shared_address(shared.q[group]);
  const auto release = [&](uint64_t* barrier) {
    if (lane == 0) mbarrier_arrive(barrier);
  };
  float logits[kPageKeys / 2], out[D / 2];
  typename Pages::Terms terms;
  typename Pages::Softmax softmax;
  float scale[2] = {args.scale_log2, args.scale_log2};
  const auto take_terms = [&] {
    const float* floats = shared.weights[weights];
    weights = weights + 1 == 2 * kStages ? 0 : weights + 1;
    if constexpr (kScaled) {
      const float by_page[2] = {scale[0] * floats[kPageKeys], scale[1] * floats[kPageKeys]};
      softmax.template update<kPageKeys>(logits, floats, by_page, floats[kPageKeys + 1]);
    } else {
      softmax.template update<kPageKeys>(logits, floats, scale, 0);
    }
  };
  // The first turn is the first group's.
  if (group == 1) named_arrive(kTurnBarrier, 2 * 128);
  for (Segment segment; walk.next(segment);) {
    if constexpr (std::is_same_v<Walk, RowWalk>) {
      if (segment.count == 0) {
        write_nothing(args, shared, segment, group);
        continue;
      }
    }
    named_sync(kGroupBarrier + group, 128);  // all have read the last queries
    Pages::load_queries(args, segment.row / tiles,
                        segment.row % tiles * kTileQueries + group * kGroupQueries, shared.q[group],
                        shared.query_scales[group]);
    fence_proxy_async();
    named_sync(kGroupBarrier + group, 128);
    if constexpr (kScaled) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        scale[r] = args.scale_log2 * shared.query_scales[group][warp * 16 + lane / 4 + 8 * r];
      }
    }
    softmax = {};
#pragma unroll
    for (int i = 0; i < D / 2; ++i) out[i] = 0;

    mbarrier_wait(&shared.keys_full[keys.stage], keys.parity);
    pin(logits);
    wgmma_fence();
    Pages::start_logits(logits, q, shared_address(shared.keys[keys.stage]));
    wgmma_commit();
    wgmma_wait<0>();
    pin(logits);
    release(&shared.keys_free[keys.stage]);
    keys.advance();
    take_terms();
    Pages::round_terms(logits, terms);

    for (int j = 1; j < segment.count; ++j) {
      mbarrier_wait(&shared.keys_full[keys.stage], keys.parity);
      named_sync(kTurnBarrier + group, 2 * 128);
      pin(logits);
      pin(out);
      wgmma_fence();
      Pages::start_logits(logits, q, shared_address(shared.keys[keys.stage]));
      wgmma_commit();
      mbarrier_wait(&shared.values_full[values.stage], values.parity);
      Pages::start_out(out, terms, shared_address(shared.values[values.stage]));
      wgmma_commit();
      named_arrive(kTurnBarrier + 1 - group, 2 * 128);
      wgmma_wait<1>();
      pin(logits);
      release(&shared.keys_free[keys.stage]);
      keys.advance();
      take_terms();
      wgmma_wait<0>();
      pin(out);
      release(&shared.values_free[values.stage]);
      values.advance();
      Pages::round_terms(logits, terms);
      if (softmax.must_rescale()) {
#pragma unroll
        for (int i = 0; i < D / 2; ++i) out[i] *= softmax.rescale[i / 2 % 2];
      }
    }

    mbarrier_wait(&shared.values_full[values.stage], values.parity);
    pin(out);
    wgmma_fence();
    Pages::start_out(out, terms, shared_address(shared.values[values.stage]));
    wgmma_commit();
    wgmma_wait<0>();
    pin(out);
    release(&shared.values_free[values.stage]);
    values.advance();
    softmax.finish();
    const int row = group * kGroupQueries + warp * 16 + lane / 4;
    if constexpr (std::is_same_v<Walk, RowWalk>) {
      // Where rows are shared, the other group may be reading the pages still.
      if (segment.slot >= 0) named_sync(kPairBarrier, 2 * 128);
      write_rows<D, Shared<Pages, 1>::kPartialStride>(args, segment, row, out, softmax,
                                                      shared.partial_out(), shared.partial_sum);
    } else {
      write_rows<D, D>(args, segment, row, out, softmax, args.partial_out, args.partial_sum);
    }
  }
  // The other group's last turn left one arrival too many on the first group's barrier.
  if (group == 0) named_sync(kTurnBarrier, 2 * 128);
}

// A block's one row, by four groups: queries `group` % 2, keys `group` / 2 of every page. The
// product with a page's values and that with the next one's keys are under way together.
template <typename Pages>
__device__ void compute_one_row(const PagedArguments& args, Shared<Pages, 2>& shared, int group) {
  constexpr int D = Pages::D, kStages = Pages::kStages, kStride = Shared<Pages, 2>::kPartialStride;
  constexpr int kKeys = kPageKeys / 2, kKeyBytes = kKeys * 128;
  static_assert(D == 64);
  const int half = group % 2, part = group / 2;
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const int tiles = args.lists.num_rows() / args.num_heads;
  Segment segment;
  if (!RowWalk(args, {}).next(segment)) return;
  if (segment.count == 0) {
    if (part == 0) write_nothing(args, shared, segment, half);
    return;
  }
  const auto release = [&](uint64_t* barrier) {
    if (lane == 0) mbarrier_arrive(barrier);
  };
  Pages::load_queries(args, segment.row / tiles,
                      segment.row % tiles * kTileQueries + half * kGroupQueries, shared.q[group],
                      shared.query_scales[group]);
  fence_proxy_async();
  named_sync(kGroupBarrier + group, 128);
  const uint32_t q = shared_address(shared.q[group]);
  Ring<kStages> keys, values;
  int weights = 0;
  float logits[kKeys / 2], out[D / 2];
  uint32_t terms[kKeys / 16][4];
  typename Pages::Softmax softmax;
  const float scale[2] = {args.scale_log2, args.scale_log2};
#pragma unroll
  for (int i = 0; i < D / 2; ++i) out[i] = 0;
  const auto start_logits = [&] {
    const uint32_t from = shared_address(shared.keys[keys.stage]) + part * kKeyBytes;
#pragma unroll
    for (int k = 0; k < D / 16; ++k)
      wgmma_m64n64k16(logits, matrix_descriptor(q + 32 * k, 16, 1024),
                      matrix_descriptor(from + 32 * k, 16, 1024), k > 0);
    wgmma_commit();
  };
  const auto start_out = [&] {
    const uint32_t from = shared_address(shared.values[values.stage]) + part * kKeyBytes;
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k)
      wgmma_m64k16(out, terms[k], matrix_descriptor(from + k * 2048, kPageKeys * 128, 1024));
    wgmma_commit();
  };
  const auto take_terms = [&] {
    softmax.template update<kKeys>(logits, shared.weights[weights] + part * kKeys, scale, 0);
    weights = weights + 1 == 2 * kStages ? 0 : weights + 1;
  };
  const auto round_terms = [&] {
#pragma unroll
    for (int i = 0; i < kKeys / 4; ++i)
      terms[i / 4][i % 4] = pack_bf16(logits[2 * i], logits[2 * i + 1]);
  };

  mbarrier_wait(&shared.keys_full[keys.stage], keys.parity);
  pin(logits);
  wgmma_fence();
  start_logits();
  wgmma_wait<0>();
  pin(logits);
  release(&shared.keys_free[keys.stage]);
  keys.advance();
  take_terms();
  round_terms();
  for (int j = 1; j < segment.count; ++j) {
    mbarrier_wait(&shared.keys_full[keys.stage], keys.parity);
    pin(logits);
    pin(out);
    wgmma_fence();
    start_logits();
    mbarrier_wait(&shared.values_full[values.stage], values.parity);
    start_out();
    wgmma_wait<1>();
    pin(logits);
    release(&shared.keys_free[keys.stage]);
    keys.advance();
    take_terms();
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
  start_out();
  wgmma_wait<0>();
  pin(out);
  softmax.finish();

  // All have read the pages; what the second group of a pair has goes where they were.
  named_sync(kAllBarrier, 4 * 128);
  const int row = half * kGroupQueries + warp * 16 + lane / 4;
  if (part == 1) {
    Segment other = segment;
    other.slot = 1;
    write_rows<D, kStride>(args, other, row, out, softmax, shared.partial_out(),
                           shared.partial_sum);
    named_arrive(kPairBarrier + half, 2 * 128);
    return;
  }
  named_sync(kPairBarrier + half, 2 * 128);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int at = kTileQueries + row + 8 * r;
    const float2 sum = shared.partial_sum[at];
    const float reference = fmaxf(softmax.reference[r], sum.x);
    const float own = fast_exp2(softmax.reference[r] - reference);
    const float more = fast_exp2(sum.x - reference);
    softmax.reference[r] = reference;
    softmax.sum[r] = own * softmax.sum[r] + more * sum.y;
    const auto* from =
        reinterpret_cast<const float2*>(shared.partial_out() + at * kStride) + (threadIdx.x & 3);
#pragma unroll
    for (int i = 0; i < D / 8; ++i) {
      const float2 pair = from[4 * i];
      float* to = out + 4 * i + 2 * r;
      to[0] = own * to[0] + more * pair.x;
      to[1] = own * to[1] + more * pair.y;
    }
  }
  write_rows<D, kStride>(args, segment, row, out, softmax, shared.partial_out(),
                         shared.partial_sum);
}

// kKeyParts 2: every block has one row, or its part of one.
template <typename Pages, typename Walk, int kKeyParts>
__global__ void __launch_bounds__(128 * (1 + kHalves * kKeyParts), 1)
    attend_kernel(const __grid_constant__ PagedArguments args) {
  using Parts = Shared<Pages, kKeyParts>;
  extern __shared__ unsigned char raw[];
  __shared__ Plan plan;
  auto& shared = *reinterpret_cast<Parts*>(raw + (1024 - shared_address(raw) % 1024) % 1024);
  static_assert(kKeyParts * kTileQueries * Parts::kPartialStride * 4 <=
                2 * Pages::kStages * Pages::kMatrixBytes);
  let_next_begin();
  if (threadIdx.x == 0) {
    for (int s = 0; s < Pages::kStages; ++s) {
      mbarrier_init(&shared.keys_full[s], 1);
      mbarrier_init(&shared.values_full[s], 1);
      mbarrier_init(&shared.keys_free[s], 4 * Parts::kGroups);  // one arrival a warp
      mbarrier_init(&shared.values_free[s], 4 * Parts::kGroups);
    }
    fence_mbarrier_init();
  }
  wait_for_previous();
  constexpr bool kByRows = std::is_same_v<Walk, RowWalk>;
  if constexpr (kByRows) {
    __syncthreads();
  } else {
    share_out(args, plan);
  }
  const bool cluster = kByRows && args.blocks_per_row > 1;
  const int group = static_cast<int>(threadIdx.x / 128) - 1;
  if (group < 0) {
    registers_down_to<kKeyParts == 2 ? 32 : 40>();
    if (threadIdx.x == 0) bring_pages<Pages, Walk>(args, plan, shared);
    if (cluster) {
      cluster_sync();
      cluster_sync();
    }
  } else {
    registers_up_to<kKeyParts == 2 ? 112 : 232>();
    if constexpr (kKeyParts == 2) {
      compute_one_row(args, shared, group);
    } else {
      compute<Pages, Walk>(args, plan, shared, group);
    }
    if (cluster) {
      cluster_sync();
      combine_in_cluster(args, shared);
      cluster_sync();  // nobody leaves while others read what it has
    }
  }
}

template <typename Pages, int kKeyParts>
constexpr int kSharedBytes = static_cast<int>(sizeof(Shared<Pages, kKeyParts>)) + 1024;

enum class Variant : uint8_t { kShares, kRows, kOneRow };

template <typename Body>
void with_kernel(int head_dim, PageFormat format, Variant variant, const Body& body) {
  const auto call = [&]<typename Pages>() {
    static_assert(kSharedBytes<Pages, 1> + sizeof(Plan) <= 227 * 1024);
    if constexpr (Pages::D == 64) {
      static_assert(kSharedBytes<Pages, 2> + sizeof(Plan) <= 227 * 1024);
      if (variant == Variant::kOneRow)
        return body(attend_kernel<Pages, RowWalk, 2>, kSharedBytes<Pages, 2>, 5 * 128);
    }
    body(variant == Variant::kShares ? attend_kernel<Pages, ShareWalk, 1>
                                     : attend_kernel<Pages, RowWalk, 1>,
         kSharedBytes<Pages, 1>, 3 * 128);
  };
  if (format == PageFormat::kFp8) {
    call.template operator()<Fp8Pages>();
  } else if (head_dim == 64) {
    call.template operator()<Bf16Pages<64>>();
  } else {
    call.template operator()<Bf16Pages<128>>();
  }
}

}  // namespace

ClusterRoom prepare_hopper(int head_dim, PageFormat format) {
  ClusterRoom room{};
  for (const Variant variant : {Variant::kShares, Variant::kRows, Variant::kOneRow}) {
    with_kernel(head_dim, format, variant, [&](const auto kernel, int bytes, unsigned threads) {
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
            "attention kernel");
      if (variant == Variant::kShares) return;
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
            "attention kernel");
      for (size_t i = 1; i < room.size(); ++i) {
        const EarlyLaunch launch(nullptr, false, 1U << i, threads, static_cast<size_t>(bytes),
                                 1U << i);
        if (cudaOccupancyMaxActiveClusters(&room[i], kernel, launch.config()) != cudaSuccess) {
          static_cast<void>(cudaGetLastError());
          room[i] = 0;
        }
      }
    });
  }
  return room;
}

void launch_hopper(int head_dim, PageFormat format, int num_blocks, const PagedArguments& args,
                   cudaStream_t stream) {
  const int of_row = args.blocks_per_row;
  const Variant variant = of_row == 0                                    ? Variant::kShares
                          : num_blocks == args.lists.num_rows() * of_row ? Variant::kOneRow
                                                                         : Variant::kRows;
  with_kernel(head_dim, format, variant, [&](const auto kernel, int bytes, unsigned threads) {
    EarlyLaunch(stream, true, static_cast<unsigned>(num_blocks), threads,
                static_cast<size_t>(bytes), static_cast<unsigned>(std::max(1, of_row)))
        .run("attention", kernel, args);
  });
}

}  // namespace longtake::cuda
