// The tail of a layer in one launch, for the sizes of the embedded world.
//
// A cluster of 8 blocks has 16 rows of the stream from end to end. A block has 1/8 of every
// product's columns: 48 of the stream's 384, a thread one number of 16 x 48 that stays in its
// register, and 192 of the feed forward's 1536. What a product needs of all columns passes through
// the shared memory of the cluster, which costs a fraction of a launch:
//
//   x += o(mixed)                          gather x in every block
//   q = its columns of q(norm(x))          to the block that has their head
//   attention of a head to the prompt      to every block
//   x += o(read)                           gather x
//   hidden = act(up(norm(x)))              stays: a block's columns are its share of the depth of
//   parts of down(hidden), all columns     to the block that has the column, which adds them in
//   x += their sum                         the order of the blocks; gather x
//   q, k, v of norm(x)                     sums of squares to every block
//
// Weights lie in memory as a block wants them in shared memory, and come in by bulk copies as soon
// as there is room, the first before the launch before has ended.
#include <mutex>

#include "attention/layer_tail.h"
#include "attention/norm_linear_attend.h"
#include "attention/prompt_part.cuh"
#include "device/hopper.cuh"
#include "device/launch.cuh"
#include "kv/device_layout.h"
#include "ops/activation.cuh"
#include "ops/linear_cuda.h"
#include "ops/rows.cuh"

namespace longtake::cuda {
namespace {

constexpr int kDim = 384, kHidden = 1536, kHeads = kDim / kPartChannels;
constexpr int kHeadParts = static_cast<int>(kMaxHeadParts);
constexpr int kBlocks = 8;  // of a cluster
constexpr int kRows = 16;   // of a cluster
constexpr int kColumns = kDim / kBlocks, kThreads = kRows * kColumns, kWarps = kThreads / 32;
constexpr int kUpColumns = kHidden / kBlocks, kChunks = kUpColumns / kColumns;
constexpr int kGroups = kColumns / 16;     // of columns that warps share
constexpr int kOctets = kColumns / 8;      // of a row's numbers in a block
constexpr int kShares = kWarps / kGroups;  // of the depth
static_assert(kPartQueries == kRows && kHeads <= kBlocks && kColumns % 16 == 0);
static_assert(kDim / 16 % kShares == 0 && kWarps >= kRows && kChunks == 4);
static_assert(kWarps == 2 * kChunks * kGroups && kWarps * 16 == kDim);

// Rows in shared memory are apart by what spreads them over all banks.
constexpr int kStride = kDim + 8, kHiddenStride = kUpColumns + 8;          // bf16
constexpr int kGatherStride = kDim + 4, kQueryStride = kPartChannels + 4;  // f32

// Shared memory, in bytes: four regions of weights, which hold one after the other
//   o of self attention    q              the prompt's page   o of cross attention
//   up, by columns         up             up                  up
//   down, by columns       down           down                down
//   q of the layer behind  k              v
constexpr int kMatrixBytes = kColumns * kStride * 2;
constexpr int kDownBytes = kDim / kChunks * kHiddenStride * 2;
constexpr int kRegion = kDownBytes;
static_assert(kMatrixBytes <= kRegion && kPartPageBytes <= kRegion && kRegion % 16 == 0);
constexpr int kInput = kChunks * kRegion;  // bf16 [kRows][kStride] of a product
// bf16 [kRows][kHiddenStride]; earlier a head's queries, f32 [kRows][kQueryStride]; later sums of
// squares of keys.
constexpr int kHiddenAt = kInput + kRows * kStride * 2;
constexpr int kHiddenBytes = kRows * kHiddenStride * 2;
constexpr int kGather = kHiddenAt + kHiddenBytes;  // f32 [kRows][kGatherStride]: all of x
// What warps or blocks have of a product, f32 [8][kRows][kColumns].
constexpr int kParts = kGather + kRows * kGatherStride * 4;
static_assert(kShares == 8 && kBlocks == 8);
constexpr int kSquares = kParts + 8 * kThreads * 4;  // sums of squares of queries
constexpr int kSquareBytes = kRows * kBlocks * kOctets * 4;
constexpr int kRoundedQueries = kSquares + kSquareBytes;  // bf16 [kRows][kPartStride] of a head
constexpr int kBarriers = kRoundedQueries + kRows * kPartStride * 2;

enum Weights { kSelfO, kQ, kPrompt, kCrossO, kUp, kDown, kNext, kNumWeights };

constexpr int kSharedBytes = kBarriers + kNumWeights * 8;
// A head's warps put together what they have read of the prompt over kGather and kParts.
constexpr int kPromptOuts = kGather;
constexpr int kPromptSums = kPromptOuts + kPartWarps * kRows * kPartStride * 4;
static_assert(kHiddenBytes >= kRows * kQueryStride * 4 && kHiddenBytes >= kSquareBytes);
static_assert(kPromptSums + kPartWarps * kRows * 8 <= kSquares && kSharedBytes <= 227 * 1024);

struct Layer {
  const unsigned char* weight = nullptr;  // of all blocks, as they want it
  const float* bias = nullptr;

  __device__ float bias_of(int column) const { return bias == nullptr ? 0 : bias[column]; }
};

struct TailArguments {
  const bf16* mixed;  // null: nothing of self attention is added
  bool only_next;     // nothing else either
  bf16* queries;      // [rows, dim]: where the work ends; null: it does not
  float* x;
  int rows;
  Layer self_o, q, cross_o, up, down, next;
  Gate self_gate, ffn_gate;
  NormVectors cross_norm, ffn_norm, next_norm;
  const float* q_norm;
  const unsigned char* store;
  HeadPages prompt;
  float scale_log2, eps;
  Activation activation;
  bool has_next;
  const float* next_norms[kMaxHeadParts];
  bool rotates[kMaxHeadParts];
  bf16* next_out[kMaxHeadParts];  // null: not wanted
  const float* cos;
  const float* sin;
  PageLayout pages;  // store null: keys and values go nowhere else
};

// ---- a block among those of its cluster ----

__device__ int rank() {
  return blockIdx.x;
}

__device__ void arrive() {
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
}

template <typename T>
__device__ void send(uint32_t address, int to, const T& value) {
  uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(to));
  if constexpr (sizeof(T) == 16) {
    const auto& v = reinterpret_cast<const uint4&>(value);
    asm volatile("st.shared::cluster.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(remote), "r"(v.x),
                 "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
  } else if constexpr (sizeof(T) == 8) {
    const auto& v = reinterpret_cast<const uint2&>(value);
    asm volatile("st.shared::cluster.v2.b32 [%0], {%1, %2};" ::"r"(remote), "r"(v.x), "r"(v.y)
                 : "memory");
  } else {
    asm volatile("st.shared::cluster.b32 [%0], %1;" ::"r"(remote),
                 "r"(reinterpret_cast<const uint32_t&>(value))
                 : "memory");
  }
}

// The four numbers of the thread's quad.
__device__ float4 of_quad(float value) {
  return {__shfl_sync(~0U, value, 0, 4), __shfl_sync(~0U, value, 1, 4),
          __shfl_sync(~0U, value, 2, 4), __shfl_sync(~0U, value, 3, 4)};
}

__device__ float octet_sum(float value) {
#pragma unroll
  for (int step = 4; step > 0; step /= 2) value += __shfl_xor_sync(~0U, value, step);
  return value;
}

// ---- the kernel's state ----

struct Tail {
  const TailArguments& a;
  unsigned char* const shared;
  const int thread = threadIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  // The thread's number of the stream.
  const int in_row = thread % kColumns, in_tile = thread / kColumns;
  const int column = kColumns * rank() + in_row;
  const int first_row = blockIdx.y * kRows;
  const int row = min(first_row + in_tile, a.rows - 1);
  const bool is_there = first_row + in_tile < a.rows;

  __device__ float* floats(int at) const { return reinterpret_cast<float*>(shared + at); }

  __device__ bf16* halves(int at) const { return reinterpret_cast<bf16*>(shared + at); }

  __device__ uint64_t* barrier(Weights weights) const {
    return reinterpret_cast<uint64_t*>(shared + kBarriers) + weights;
  }

  __device__ void expect(Weights weights, int bytes) const {
    mbarrier_arrive_expect(barrier(weights), bytes);
  }

  // Part `part` of the block's `parts` of a layer's weights into a region.
  __device__ void bring(const Layer& layer, int parts, int part, int bytes, int region,
                        Weights weights) const {
    bulk_copy(shared + region * kRegion, layer.weight + (int64_t{rank()} * parts + part) * bytes,
              bytes, barrier(weights));
  }

  __device__ void bring_matrix(const Layer& layer, int region, Weights weights) const {
    expect(weights, kMatrixBytes);
    bring(layer, 1, 0, kMatrixBytes, region, weights);
  }

  __device__ int num_pages() const {
    return rank() < kHeads ? a.prompt.begin[rank() + 1] - a.prompt.begin[rank()] : 0;
  }

  // All that follows is for one thread.

  __device__ void bring_first() const {
    if (a.only_next) return bring_next();
    if (a.mixed != nullptr) bring_matrix(a.self_o, 0, kSelfO);
    bring_matrix(a.q, 1, kQ);
    if (a.queries != nullptr) return;
    bring_matrix(a.cross_o, 3, kCrossO);
    expect(kUp, kChunks * kMatrixBytes);
    if (a.mixed == nullptr) bring_up(0);
  }

  __device__ void bring_prompt() const {
    expect(kPrompt, kPartPageBytes);
    const int page = a.prompt.pages[a.prompt.begin[rank()]];
    bulk_copy(shared + 2 * kRegion, a.store + int64_t{page} * kPartPageBytes, kPartPageBytes,
              barrier(kPrompt));
  }

  __device__ void bring_up(int chunk) const {
    bring(a.up, kChunks, chunk, kMatrixBytes, chunk, kUp);
  }

  // All of its columns, of the depth that the block has of its input.
  __device__ void bring_down() const {
    expect(kDown, kChunks * kDownBytes);
    for (int i = 0; i < kChunks; ++i) bring(a.down, kChunks, i, kDownBytes, i, kDown);
  }

  __device__ void bring_next() const {
    expect(kNext, kHeadParts * kMatrixBytes);
    for (int part = 0; part < kHeadParts; ++part)
      bring(a.next, kHeadParts, part, kMatrixBytes, part, kNext);
  }

  // ---- products ----

  // The input by group `group` of a region's columns: `kCount` steps of 16 of the depth from
  // `first` on; what comes of it belongs to part `part` of kParts.
  template <int kCount>
  __device__ void multiply(int region, int group, int first, int part) const {
    const bf16* const x = halves(kInput) + lane % 16 * kStride + lane / 16 * 8 + 16 * first;
    const bf16* const w = halves(region * kRegion) +
                          (16 * group + lane / 16 * 8 + lane % 8) * kStride + lane / 8 % 2 * 8 +
                          16 * first;
    float acc[2][2][4] = {};
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      uint32_t input[4], b[4];
      load_matrices(input, x + 16 * k);
      load_matrices(b, w + 16 * k);
      mma_m16n8k16(acc[k % 2][0], input, b[0], b[1]);
      mma_m16n8k16(acc[k % 2][1], input, b[2], b[3]);
    }
    float* const to =
        floats(kParts) + part * kThreads + lane / 4 * kColumns + 16 * group + 2 * (lane % 4);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int r = 0; r < 2; ++r)
        *reinterpret_cast<float2*>(to + 8 * r * kColumns + 8 * n) = {
            acc[0][n][2 * r] + acc[1][n][2 * r], acc[0][n][2 * r + 1] + acc[1][n][2 * r + 1]};
    }
  }

  // The thread's number of parts first, first + step, ...
  __device__ float sum_parts(int first, int step, int end) const {
    const float* from = floats(kParts) + thread;
    float sum = 0;
#pragma unroll
    for (int part = first; part < end; part += step) sum += from[part * kThreads];
    return sum;
  }

  // The thread's number of a product of kColumns columns. Behind it all have read the weights.
  __device__ float product(Weights which, int region) const {
    constexpr int kSteps = kDim / 16 / kShares;
    mbarrier_wait(barrier(which), 0);
    const int share = warp / kGroups;
    multiply<kSteps>(region, warp % kGroups, kSteps * share, share);
    __syncthreads();
    return sum_parts(0, 1, kShares);
  }

  // ---- the stream ----

  // Blocks send to others in turns of their own, so that not all send to one.
  __device__ int turned(int to) const {
    return (to + rank()) % kBlocks;
  }

  __device__ void send_stream(float x) const {
    const uint32_t at = shared_address(floats(kGather) + in_tile * kGatherStride +
                                       kColumns * rank() + in_row / 4 * 4);
    const float4 quad = of_quad(x);
#pragma unroll
    for (int i = 0; i < kBlocks / 4; ++i) send(at, turned(lane % 4 + 4 * i), quad);
  }

  // A warp has a row to norm.
  static constexpr int kFours = kDim / 128;

  struct Vectors {
    float4 scale[kFours], shift[kFours];
  };

  __device__ void load(const NormVectors& norm, Vectors& vectors) const {
    if (warp >= kRows) return;
    const int of = min(first_row + warp, a.rows - 1);
    const float *scale = norm.scale.of(of), *shift = norm.shift.of(of);
#pragma unroll
    for (int c = 0; c < kFours; ++c) {
      vectors.scale[c] = load4(scale + 4 * (32 * c + lane));
      vectors.shift[c] = load4(shift + 4 * (32 * c + lane));
    }
  }

  // The gathered stream, normed, becomes the input of the next product.
  __device__ void norm_stream(const NormVectors& norm, const Vectors& vectors) const {
    if (warp < kRows) {
      const float* from = floats(kGather) + warp * kGatherStride + 4 * lane;
      bf16* to = halves(kInput) + warp * kStride + 4 * lane;
      float4 v[kFours];
      float mean = 0, squares = 0;
#pragma unroll
      for (int c = 0; c < kFours; ++c) {
        v[c] = load4(from + 128 * c);
        mean += sum4(v[c]);
      }
      mean = team_sum<32>(mean) / kDim;
#pragma unroll
      for (int c = 0; c < kFours; ++c) squares += squares4(v[c], mean);
      const float inverse = 1.0F / sqrtf(team_sum<32>(squares) / kDim + norm.eps);
#pragma unroll
      for (int c = 0; c < kFours; ++c) {
        const auto value = [&](float x, float by, float plus) {
          return normed<true, false>(x, mean, inverse, by, norm.scale_offset, plus);
        };
        const float4 by = vectors.scale[c], plus = vectors.shift[c];
        store4(to + 128 * c, {value(v[c].x, by.x, plus.x), value(v[c].y, by.y, plus.y),
                              value(v[c].z, by.z, plus.z), value(v[c].w, by.w, plus.w)});
      }
    }
    __syncthreads();
  }

  // Sends x to all and norms it there.
  __device__ void pass_on(float x, const NormVectors& norm, const Vectors& vectors) const {
    send_stream(x);
    cluster_sync();
    norm_stream(norm, vectors);
  }

  // A row's sum of squares is in kBlocks * kOctets numbers; the same in all threads of an octet.
  __device__ float row_squares(int at) const {
    constexpr int kEach = kBlocks * kOctets / 8;
    const float* from = floats(at) + in_tile * kBlocks * kOctets + thread % 8 * kEach;
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) sum += from[i];
    return octet_sum(sum);
  }

  __device__ uint32_t squares_address(int at) const {
    return shared_address(floats(at) + (in_tile * kBlocks + rank()) * kOctets + in_row / 8);
  }

  // ---- cross attention ----

  // Queries and their squares go to the blocks of the heads.
  __device__ void send_query(float q, float norm) const {
    if (a.q_norm != nullptr) {
      const float squares = octet_sum(q * q);
      if (lane % 8 < kHeads) send(squares_address(kSquares), lane % 8, squares);
      q *= norm;
    }
    const float4 quad = of_quad(q);
    const int first = column / 4 * 4;
    if (lane % 4 == 0)
      send(shared_address(floats(kHiddenAt) + in_tile * kQueryStride + first % kPartChannels),
           first / kPartChannels, quad);
  }

  // Or to memory.
  __device__ void write_query(float q, float norm) const {
    if (a.q_norm != nullptr) {
      send(squares_address(kSquares), lane % 8, octet_sum(q * q));
      cluster_sync();
      q *= norm / sqrtf(row_squares(kSquares) / kDim + a.eps);
    }
    const float other = __shfl_xor_sync(~0U, q, 1);
    if (column % 2 == 0 && is_there)
      *reinterpret_cast<uint32_t*>(a.queries + int64_t{row} * kDim + column) = bf16_pair(q, other);
  }

  // The block's head; what it reads goes to all blocks as the input of the next product.
  __device__ void attend(bool has_prompt) const {
    constexpr int kEach = 4, kSharing = kPartChannels / kEach;  // channels of a thread; threads
    const bool shares = thread < kRows * kSharing;
    const int query = thread / kSharing, first = thread % kSharing * kEach;
    if (shares) {
      float inverse = 1;
      if (a.q_norm != nullptr) {
        constexpr int kNumbers = kBlocks * kOctets / kSharing;
        const float* from =
            floats(kSquares) + query * kBlocks * kOctets + thread % kSharing * kNumbers;
        float sum = 0;
#pragma unroll
        for (int i = 0; i < kNumbers; ++i) sum += from[i];
        inverse = 1.0F / sqrtf(team_sum<kSharing>(sum) / kDim + a.eps);
      }
      const float4 q = load4(floats(kHiddenAt) + query * kQueryStride + first);
      store4(halves(kRoundedQueries) + query * kPartStride + first,
             {q.x * inverse, q.y * inverse, q.z * inverse, q.w * inverse});
    }
    __syncthreads();
    if (warp < kPartWarps) {
      uint32_t q[kPartChannels / 16][4];
#pragma unroll
      for (int k = 0; k < kPartChannels / 16; ++k)
        load_matrices(q[k],
                      halves(kRoundedQueries) + lane % 16 * kPartStride + 16 * k + lane / 16 * 8);
      PromptPart part;
      if (has_prompt) {
        mbarrier_wait(barrier(kPrompt), 0);
        part.read(shared + 2 * kRegion, q, a.scale_log2);
      }
      part.write(floats(kPromptOuts), reinterpret_cast<float2*>(shared + kPromptSums));
    }
    __syncthreads();
    if (!shares) return;
    float mixed[kEach];
    combine_prompt_parts<kEach>(floats(kPromptOuts),
                                reinterpret_cast<const float2*>(shared + kPromptSums), query, first,
                                mixed);
    // A pair of threads has a chunk of 16 bytes, and each half of the blocks to send it to.
    const uint2 own = {bf16_pair(mixed[0], mixed[1]), bf16_pair(mixed[2], mixed[3])};
    const uint2 other = {__shfl_xor_sync(~0U, own.x, 1), __shfl_xor_sync(~0U, own.y, 1)};
    const bool is_second = lane % 2 == 1;
    const uint4 chunk =
        is_second ? uint4{other.x, other.y, own.x, own.y} : uint4{own.x, own.y, other.x, other.y};
    const uint32_t at =
        shared_address(halves(kInput) + query * kStride + kPartChannels * rank() + first / 8 * 8);
#pragma unroll
    for (int i = 0; i < kBlocks / 2; ++i) send(at, turned(is_second * (kBlocks / 2) + i), chunk);
  }

  // ---- feed forward ----

  __device__ void make_hidden(const float (&bias)[kChunks]) const {
    mbarrier_wait(barrier(kUp), 0);
    const int group = warp % (kChunks * kGroups), share = warp / (kChunks * kGroups);
    multiply<kDim / 32>(group / kGroups, group % kGroups, kDim / 32 * share,
                        share * kChunks + group / kGroups);
    __syncthreads();
    bf16* to = halves(kHiddenAt) + in_tile * kHiddenStride + in_row;
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
      store(to + kColumns * c,
            activated(sum_parts(c, kChunks, 2 * kChunks) + bias[c], a.activation));
  }

  // The block's part of all columns, to the blocks that have them. All of these are done with
  // kParts by then: `arrive()` said so.
  __device__ void send_down() const {
    constexpr int kOfChunk = kDim / kChunks;
    const int first = 16 * warp;  // of the warp's columns
    const bf16* const x = halves(kHiddenAt) + lane % 16 * kHiddenStride + lane / 16 * 8;
    const bf16* const w = halves(first / kOfChunk * kRegion) +
                          (first % kOfChunk + lane / 16 * 8 + lane % 8) * kHiddenStride +
                          lane / 8 % 2 * 8;
    float acc[2][2][4] = {};
    mbarrier_wait(barrier(kDown), 0);
#pragma unroll
    for (int k = 0; k < kUpColumns / 16; ++k) {
      uint32_t input[4], b[4];
      load_matrices(input, x + 16 * k);
      load_matrices(b, w + 16 * k);
      mma_m16n8k16(acc[k % 2][0], input, b[0], b[1]);
      mma_m16n8k16(acc[k % 2][1], input, b[2], b[3]);
    }
    __syncthreads();
    if (thread == 0 && a.has_next) bring_next();
    cluster_wait();
    const uint32_t at = shared_address(floats(kParts) + rank() * kThreads + lane / 4 * kColumns +
                                       first % kColumns + 2 * (lane % 4));
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int r = 0; r < 2; ++r)
        send(at + (8 * r * kColumns + 8 * n) * 4, first / kColumns,
             float2{acc[0][n][2 * r] + acc[1][n][2 * r],
                    acc[0][n][2 * r + 1] + acc[1][n][2 * r + 1]});
    }
  }

  // ---- heads of the layer behind ----

  __device__ void make_next() const {
    float bias[kHeadParts], norms[kHeadParts], cosine = 1, sine = 0;
#pragma unroll
    for (int part = 0; part < kHeadParts; ++part) {
      bias[part] = a.next.bias_of(kDim * part + column);
      norms[part] = a.next_norms[part] == nullptr ? 1 : a.next_norms[part][column];
    }
    if (a.cos != nullptr) {
      const int at = row * (kPartChannels / 2) + column % kPartChannels / 2;
      cosine = a.cos[at];
      sine = a.sin[at];
    }
    mbarrier_wait(barrier(kNext), 0);
    const int group = warp % (kHeadParts * kGroups), share = warp / (kHeadParts * kGroups);
    if (share < 2)
      multiply<kDim / 32>(group / kGroups, group % kGroups, kDim / 32 * share,
                          share * kHeadParts + group / kGroups);
    __syncthreads();
    // Of two parts at most norms are asked for: there is room for no more squares.
    float v[kHeadParts];
    int num_normed = 0;
#pragma unroll
    for (int part = 0; part < kHeadParts; ++part) {
      v[part] = sum_parts(part, kHeadParts, 2 * kHeadParts) + bias[part];
      if (a.next_norms[part] == nullptr) continue;
      const uint32_t at = squares_address(num_normed++ == 0 ? kSquares : kHiddenAt);
      send(at, lane % 8, octet_sum(v[part] * v[part]));
    }
    cluster_sync();
    num_normed = 0;
#pragma unroll
    for (int part = 0; part < kHeadParts; ++part) {
      if (a.next_norms[part] != nullptr) {
        const float squares = row_squares(num_normed++ == 0 ? kSquares : kHiddenAt);
        v[part] *= norms[part] / sqrtf(squares / kDim + a.eps);
      }
      if (a.rotates[part]) {
        const float other = __shfl_xor_sync(~0U, v[part], 1);
        v[part] =
            column % 2 == 0 ? v[part] * cosine - other * sine : other * sine + v[part] * cosine;
      }
      const float other = __shfl_xor_sync(~0U, v[part], 1);
      if (column % 2 == 0 && is_there && a.next_out[part] != nullptr)
        *reinterpret_cast<uint32_t*>(a.next_out[part] + int64_t{row} * kDim + column) =
            bf16_pair(v[part], other);
      if (part > 0 && column % 2 == 0 && is_there && a.pages.store != nullptr)
        write_to_page(part - 1, bf16_pair(v[part], other));
    }
  }

  // Two neighbouring numbers of a key (matrix 0) or value (1).
  __device__ void write_to_page(int matrix, uint32_t pair) const {
    const int head = column / kPartChannels, channel = column % kPartChannels;
    const int slot = row % kPageKeys;
    unsigned char* const page =
        a.pages.store + int64_t{a.pages.work(head, row / kPageKeys)} * kPartPageBytes;
    *reinterpret_cast<uint32_t*>(page + matrix * kPartMatrixBytes +
                                 chunk_offset(slot, channel / 8) + channel % 8 * 2) = pair;
    if (matrix == 0 && channel == 0)
      reinterpret_cast<float*>(page + 2 * kPartMatrixBytes)[slot] = 1;
  }

  __device__ void run() const {
    let_next_begin();
    if (thread == 0) {
      for (int i = 0; i < kNumWeights; ++i) mbarrier_init(barrier(static_cast<Weights>(i)), 1);
      fence_mbarrier_init();
    }
    cluster_arrive();
    __syncthreads();
    if (thread == 0) bring_first();
    // What a pass has chosen of the prompt is written by the launch before.
    bool has_prompt = false;
    const auto look_at_prompt = [&] {
      has_prompt = !a.only_next && a.queries == nullptr && num_pages() > 0;
      if (thread == 32 && has_prompt) bring_prompt();
    };
    if (a.mixed != nullptr) look_at_prompt();
    const float self_bias = a.self_o.bias_of(column), q_bias = a.q.bias_of(column);
    const float q_norm = a.q_norm == nullptr ? 1 : a.q_norm[column];
    const float cross_bias = a.cross_o.bias_of(column), down_bias = a.down.bias_of(column);

    wait_for_previous();
    if (a.mixed == nullptr) look_at_prompt();
    if (a.mixed != nullptr) {
      for (int i = thread; i < kRows * kDim / 8; i += kThreads) {
        const int to = i / (kDim / 8), chunk = i % (kDim / 8);
        copy_16(halves(kInput) + to * kStride + 8 * chunk,
                a.mixed + int64_t{min(first_row + to, a.rows - 1)} * kDim + 8 * chunk);
      }
      copies_commit();
    }
    float x = a.x[int64_t{row} * kDim + column];
    const float self_gate = a.self_gate.is_there ? a.self_gate.vectors.of(row)[column] : 1;
    const float ffn_gate = a.ffn_gate.is_there ? a.ffn_gate.vectors.of(row)[column] : 1;
    Vectors vectors;
    load(a.only_next ? a.next_norm : a.cross_norm, vectors);
    copies_wait<0>();
    __syncthreads();
    if (a.mixed != nullptr) {
      x = fmaf(product(kSelfO, 0) + self_bias, self_gate, x);
      if (thread == 0 && a.queries == nullptr) bring_up(0);
    }
    cluster_wait();  // all blocks have begun
    if (a.only_next) {
      pass_on(x, a.next_norm, vectors);
      return make_next();
    }
    pass_on(x, a.cross_norm, vectors);

    const float query = product(kQ, 1) + q_bias;
    if (a.queries != nullptr) {
      if (is_there) a.x[int64_t{row} * kDim + column] = x;
      return write_query(query, q_norm);
    }
    if (thread == 0) bring_up(1);
    send_query(query, q_norm);
    cluster_sync();
    if (rank() < kHeads) attend(has_prompt);
    cluster_sync();
    if (thread == 0) bring_up(2);
    load(a.ffn_norm, vectors);
    float up_bias[kChunks];
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
      up_bias[c] = a.up.bias_of(kUpColumns * rank() + kColumns * c + in_row);
    x += product(kCrossO, 3) + cross_bias;
    if (thread == 0) bring_up(3);
    pass_on(x, a.ffn_norm, vectors);

    make_hidden(up_bias);
    arrive();
    if (a.has_next) load(a.next_norm, vectors);
    __syncthreads();
    if (thread == 0) bring_down();
    send_down();
    cluster_sync();
    x = fmaf(sum_parts(0, 1, kBlocks) + down_bias, ffn_gate, x);
    if (is_there) a.x[int64_t{row} * kDim + column] = x;
    if (!a.has_next) return;
    pass_on(x, a.next_norm, vectors);
    make_next();
  }
};

__global__ void __launch_bounds__(kThreads, 1)
    tail_kernel(const __grid_constant__ TailArguments arguments) {
  extern __shared__ uint4 raw[];
  NV_IF_TARGET(NV_PROVIDES_SM_90, (Tail{arguments, reinterpret_cast<unsigned char*>(raw)}.run();));
}

// Clusters of the kernel that the GPU holds at once; 0: none.
struct TailRoom {
  int clusters = 0;
};

TailRoom prepare_tail(const Runtime& runtime) {
  if (!runtime.is_hopper_or_later() || runtime.most_shared_bytes() < kSharedBytes) return {};
  check(
      cudaFuncSetAttribute(tail_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes),
      "layer_tail");
  check(cudaFuncSetAttribute(tail_kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
        "layer_tail");
  const EarlyLaunch launch(nullptr, false, kBlocks, kThreads, kSharedBytes, kBlocks);
  TailRoom room;
  if (cudaOccupancyMaxActiveClusters(&room.clusters, tail_kernel, launch.config()) != cudaSuccess) {
    static_cast<void>(cudaGetLastError());
    return {};
  }
  return room;
}

bool suits(const LinearWeight& weight, int64_t in, int64_t out) {
  return weight.compute_dtype() == DType::kBF16 && weight.in_features() == in &&
         weight.out_features() == out;
}

// Weights [parts * out, in] as blocks want them: [kBlocks][parts][rows][stride], rows of a block's
// columns in each part, or with `by_depth` all rows of the block's share of the depth.
__global__ void slice_kernel(const bf16* from, int in, int parts, int rows, int width, int stride,
                             bool by_depth, bf16* to) {
  const int block = blockIdx.y, chunks = stride / 8;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < parts * rows * chunks;
       i += gridDim.x * blockDim.x) {
    const int row = i / chunks, at = i % chunks * 8;
    const int64_t source =
        by_depth ? int64_t{row} * in + block * width
                 : int64_t{row / rows * kBlocks * rows + block * rows + row % rows} * in;
    *reinterpret_cast<uint4*>(to + int64_t{block} * parts * rows * stride + int64_t{i} * 8) =
        at < width ? *reinterpret_cast<const uint4*>(from + source + at) : uint4{};
  }
}

// What the kernel reads of a layer, made at its first call.
Layer layer_of(Runtime& runtime, const LinearWeight& weight, int parts, bool by_depth) {
  static std::mutex mutex;
  const PackedProduct& packed = packed_of(weight);
  const auto in = static_cast<int>(weight.in_features());
  const auto out = static_cast<int>(weight.out_features());
  const std::scoped_lock lock(mutex);
  if (packed.sliced.view().empty()) {
    const int rows = by_depth ? out : out / parts / kBlocks;
    const int width = by_depth ? in / kBlocks : in, stride = width + 8;
    packed.sliced = Tensor(packed.weight.view().device(), DType::kBF16,
                           {kBlocks, int64_t{parts} * rows, stride});
    slice_kernel<<<dim3(16, kBlocks), 256, 0, runtime.stream()>>>(
        packed.weight.view().data<bf16>(), in, parts, rows, width, stride, by_depth,
        packed.sliced.view().data<bf16>());
    check(cudaStreamSynchronize(runtime.stream()), "layer_tail");
  }
  return {reinterpret_cast<const unsigned char*>(packed.sliced.view().raw()),
          packed.bias.view().empty() ? nullptr : packed.bias.view().data<float>()};
}

NormVectors norm_of(const StreamNorm& norm, int64_t rows) {
  return {framed(norm.scale, rows, kDim), framed(norm.shift, rows, kDim), norm.eps,
          norm.scale_plus_one ? 1.0F : 0.0F};
}

bool start_in_fours(const NormVectors& norm) {
  return cuda::start_in_fours(norm.scale) && cuda::start_in_fours(norm.shift);
}

// Whether the kernel has these sizes; `to` describes the work then.
bool describe_own(Runtime& runtime, const LayerTail& tail, int64_t rows, TailArguments& to) {
  if (tail.self_o != nullptr && !suits(*tail.self_o, kDim, kDim)) return false;
  if (!suits(*tail.q, kDim, kDim) || !suits(*tail.cross_o, kDim, kDim) ||
      !suits(*tail.up, kDim, kHidden) || !suits(*tail.down, kHidden, kDim))
    return false;
  const DevicePages& pages = *tail.prompt.device;
  if (pages.format != PageFormat::kBf16 || pages.head_dim != kPartChannels ||
      pages.heads.num_heads != kHeads || pages.max_pages_per_head > 1)
    return false;
  const auto gate = [&](const FrameVectors& vectors) {
    return Gate{framed(vectors, rows, kDim), !vectors.frames.empty(), false};
  };
  if (tail.self_o != nullptr) to.self_o = layer_of(runtime, *tail.self_o, 1, false);
  to.q = layer_of(runtime, *tail.q, 1, false);
  to.cross_o = layer_of(runtime, *tail.cross_o, 1, false);
  to.up = layer_of(runtime, *tail.up, 1, false);
  to.down = layer_of(runtime, *tail.down, 1, true);
  to.self_gate = gate(tail.self_gate);
  to.ffn_gate = gate(tail.ffn_gate);
  to.cross_norm = norm_of(tail.cross_norm, rows);
  to.ffn_norm = norm_of(tail.ffn_norm, rows);
  to.q_norm = tail.q_norm.empty() ? nullptr : tail.q_norm.data<float>();
  to.store = static_cast<const unsigned char*>(pages.store);
  to.prompt = pages.heads;
  to.scale_log2 = tail.scale * 1.44269504088896341F;
  to.activation = tail.activation;
  return start_in_fours(to.cross_norm) && start_in_fours(to.ffn_norm);
}

bool describe_next(Runtime& runtime, const LayerTail& tail, int64_t rows, TailArguments& to) {
  if (!suits(*tail.next_qkv, kDim, static_cast<int64_t>(kMaxHeadParts) * kDim)) return false;
  to.has_next = true;
  to.next = layer_of(runtime, *tail.next_qkv, kHeadParts, false);
  to.next_norm = norm_of(tail.next_norm, rows);
  if (tail.next_pages != nullptr) {
    to.pages = *tail.next_pages;
    if (to.pages.format != PageFormat::kBf16 || to.pages.head_dim != kPartChannels ||
        rows % kPageKeys != 0)
      return false;
  }
  to.cos = tail.cos.empty() ? nullptr : tail.cos.data<float>();
  to.sin = tail.sin.empty() ? nullptr : tail.sin.data<float>();
  int num_normed = 0;
  for (size_t i = 0; i < kMaxHeadParts; ++i) {
    const HeadPart& part = tail.next[i];
    if (part.out.empty()) continue;
    if (part.out.dtype() != DType::kBF16 || part.out.dim(2) != kPartChannels ||
        reinterpret_cast<uintptr_t>(part.out.raw()) % sizeof(uint32_t) != 0)
      return false;
    to.rotates[i] = part.rotates;
    to.next_out[i] = part.out.data<bf16>();
    if (part.norm.empty()) continue;
    to.next_norms[i] = part.norm.data<float>();
    ++num_normed;
  }
  return num_normed <= 2 && start_in_fours(to.next_norm);
}

bool describe(Runtime& runtime, View x, const LayerTail& tail, TailArguments& to) {
  const int64_t rows = x.dim(0);
  if (rows > kFewRows || x.dim(1) != kDim) return false;
  to.x = x.data<float>();
  to.rows = static_cast<int>(rows);
  to.eps = tail.eps;
  to.only_next = tail.q == nullptr;
  return (tail.q == nullptr || describe_own(runtime, tail, rows, to)) &&
         (tail.next_qkv == nullptr || describe_next(runtime, tail, rows, to));
}

// False: the kernel does not suit. q: where the queries go with which the work ends; or empty.
bool run_in_one(Context& ctx, View mixed, View x, const LayerTail& tail, View q) {
  Runtime& runtime = *ctx.cuda();
  const auto& room = runtime.kept<TailRoom>(0, [&] { return prepare_tail(runtime); });
  TailArguments arguments{};
  if (room.clusters == 0 || !describe(runtime, x, tail, arguments)) return false;
  if (tail.self_o != nullptr) {
    if (reinterpret_cast<uintptr_t>(mixed.raw()) % 16 != 0) return false;
    arguments.mixed = mixed.data<bf16>();
  }
  if (!q.empty()) {
    if (reinterpret_cast<uintptr_t>(q.raw()) % sizeof(uint32_t) != 0) return false;
    arguments.queries = q.data<bf16>();
  }
  EarlyLaunch(runtime.stream(), true, dim3(kBlocks, blocks_of(x.dim(0), kRows)), kThreads,
              kSharedBytes, kBlocks)
      .run("layer_tail", tail_kernel, arguments);
  return true;
}

}  // namespace

void layer_queries(Context& ctx, View mixed, View x, const LayerTail& tail, View q) {
  if (x.dim(0) == 0 || run_in_one(ctx, mixed, x, tail, q)) return;
  layer_queries_by_ops(ctx, mixed, x, tail, q);
}

bool layer_tail(Context& ctx, View mixed, View x, const LayerTail& tail) {
  if (x.dim(0) == 0) return false;
  if (run_in_one(ctx, mixed, x, tail, View())) return tail.next_pages != nullptr;
  return layer_tail_by_ops(ctx, mixed, x, tail);
}

}  // namespace longtake::cuda
