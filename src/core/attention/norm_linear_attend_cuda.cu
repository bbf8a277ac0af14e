// Cross attention to a short prompt in one launch: a block makes the queries of one head and 16
// tokens (ops/stream_product.cuh), the heads of a row being a cluster, and goes on to read the
// prompt, whose pages of the head it has brought in with the weights. A warp reads 16 keys of every
// page; what the warps have is put together in their order.
#include "attention/attend.h"
#include "attention/norm_linear_attend.h"
#include "attention/paged_attention.cuh"
#include "ops/stream_product.cuh"

namespace longtake::cuda {
namespace {

constexpr int kMostPages = 2;  // of a head
constexpr int kHeadDim = kHeadColumns;
constexpr int kMatrixBytes = kPageKeys * kHeadDim * 2;
constexpr int kPageBytes = static_cast<int>(paged_bytes(kHeadDim));
constexpr int kQueryStride = kHeadDim + 8, kPartStride = kHeadDim + 8;  // in elements
// What the warps have of the outputs takes the place of w; the queries and the warps' sums, which
// are less, that of x.
constexpr int kLeastStride = kProductWarps * kTileRows * kPartStride * 4 / (kHeadColumns * 2);
static_assert(kPageKeys == 16 * kProductWarps && kTileRows == 16);

// 16 queries against a warp's keys of the pages: numerators of the outputs as mma lays them out,
// and of its two rows the sum and the logit, in powers of two, that it is relative to.
struct Part {
  float out[kHeadDim / 8][4] = {};
  float reference[2] = {-INFINITY, -INFINITY};
  float sum[2] = {};

  __device__ void read(const unsigned char* page, const uint32_t (&q)[kHeadDim / 16][4],
                       float scale) {
    const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * 16;
    float logits[2][4] = {};
    uint32_t b[4];
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
      load_matrices(b, page + chunk_offset(first + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
      mma_m16n8k16(logits[0], q[k], b[0], b[1]);
      mma_m16n8k16(logits[1], q[k], b[2], b[3]);
    }
    const auto* weights = reinterpret_cast<const float*>(page + 2 * kMatrixBytes) + first;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float most = fmaxf(fmaxf(logits[0][2 * r], logits[0][2 * r + 1]),
                         fmaxf(logits[1][2 * r], logits[1][2 * r + 1])) *
                   scale;
      most = fmaxf(most, __shfl_xor_sync(~0U, most, 1));
      most = fmaxf(most, __shfl_xor_sync(~0U, most, 2));
      most = fmaxf(most, reference[r]);
      const float factor = fast_exp2(reference[r] - most);
      reference[r] = most;
      sum[r] *= factor;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const float2 weight = *reinterpret_cast<const float2*>(weights + 8 * n + 2 * (lane % 4));
        float* pair = logits[n] + 2 * r;
        pair[0] = fast_exp2(fmaf(pair[0], scale, -most));
        pair[1] = fast_exp2(fmaf(pair[1], scale, -most));
        sum[r] = fmaf(pair[0], weight.x, fmaf(pair[1], weight.y, sum[r]));
      }
#pragma unroll
      for (int c = 0; c < kHeadDim / 8; ++c) {
        out[c][2 * r] *= factor;
        out[c][2 * r + 1] *= factor;
      }
    }
    const uint32_t terms[4] = {
        pack_bf16(logits[0][0], logits[0][1]), pack_bf16(logits[0][2], logits[0][3]),
        pack_bf16(logits[1][0], logits[1][1]), pack_bf16(logits[1][2], logits[1][3])};
#pragma unroll
    for (int c = 0; c < kHeadDim / 8; c += 2) {
      load_matrices_transposed(
          b, page + kMatrixBytes + chunk_offset(first + lane % 16, c + lane / 16));
      mma_m16n8k16(out[c], terms, b[0], b[1]);
      mma_m16n8k16(out[c + 1], terms, b[2], b[3]);
    }
  }
};

struct ToAttention {
  static constexpr bool kNormsHeads = true;

  const float* norm;
  int dim;
  float eps;
  const unsigned char* store;
  HeadPages heads;
  float scale_log2;
  bf16* out;

  struct Loaded {
    float2 norm;
  };

  __device__ int first_column(int columns) const { return blockIdx.x * columns; }

  __device__ const float* heads_norm() const { return norm; }

  __device__ int num_pages() const { return heads.begin[blockIdx.x + 1] - heads.begin[blockIdx.x]; }

  __device__ void bring(bf16* to) const {
    const int32_t* pages = heads.pages + heads.begin[blockIdx.x];
    for (int j = 0; j < num_pages(); ++j) {
      const unsigned char* from = store + int64_t{pages[j]} * kPageBytes;
      for (int at = 16 * threadIdx.x; at < kPageBytes; at += 16 * kProductThreads)
        copy_16(reinterpret_cast<unsigned char*>(to) + j * kPageBytes + at, from + at);
    }
  }

  __device__ Loaded load(const Product&, int, int column) const {
    return {norm == nullptr ? float2{1, 1} : *reinterpret_cast<const float2*>(norm + column)};
  }

  template <int kPairs, typename RowOf>
  __device__ void finish_tile(const Product& p, int first_row, const RowOf& row_of, int column,
                              const float2 (&v)[kPairs], const Loaded (&)[kPairs],
                              void* shared) const {
    auto* const queries = static_cast<bf16*>(shared);                                // over x
    auto* const parts = reinterpret_cast<float*>(queries + kTileRows * p.stride());  // over w
    auto* const sums = reinterpret_cast<float2*>(queries + kTileRows * kQueryStride);
    const unsigned char* const pages =
        reinterpret_cast<const unsigned char*>(queries + (kTileRows + kHeadColumns) * p.stride());
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, in_head = column % kHeadDim;
#pragma unroll
    for (int i = 0; i < kPairs; ++i)
      *reinterpret_cast<uint32_t*>(queries + row_of(i) * kQueryStride + in_head) =
          bf16_pair(v[i].x, v[i].y);
    __syncthreads();
    uint32_t q[kHeadDim / 16][4];
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k)
      load_matrices(q[k], queries + lane % 16 * kQueryStride + 16 * k + lane / 16 * 8);
    Part part;
    for (int j = 0; j < num_pages(); ++j) part.read(pages + j * kPageBytes, q, scale_log2);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = warp * kTileRows + lane / 4 + 8 * r;
      part.sum[r] += __shfl_xor_sync(~0U, part.sum[r], 1);
      part.sum[r] += __shfl_xor_sync(~0U, part.sum[r], 2);
      if (lane % 4 == 0) sums[row] = {part.reference[r], part.sum[r]};
#pragma unroll
      for (int c = 0; c < kHeadDim / 8; ++c)
        *reinterpret_cast<float2*>(parts + row * kPartStride + 8 * c + 2 * (lane % 4)) = {
            part.out[c][2 * r], part.out[c][2 * r + 1]};
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int row = row_of(i);
      float reference = -INFINITY, sum = 0;
#pragma unroll
      for (int w = 0; w < kProductWarps; ++w)
        reference = fmaxf(reference, sums[w * kTileRows + row].x);
      float2 mixed{};
#pragma unroll
      for (int w = 0; w < kProductWarps; ++w) {
        const float2 own = sums[w * kTileRows + row];
        const float factor = own.x == -INFINITY ? 0 : fast_exp2(own.x - reference);
        const float2 more =
            *reinterpret_cast<const float2*>(parts + (w * kTileRows + row) * kPartStride + in_head);
        mixed = {fmaf(factor, more.x, mixed.x), fmaf(factor, more.y, mixed.y)};
        sum = fmaf(factor, own.y, sum);
      }
      if (first_row + row >= p.rows) continue;
      const float inverse = sum == 0 ? 0 : 1 / sum;
      *reinterpret_cast<uint32_t*>(out + int64_t{first_row + row} * dim + column) =
          bf16_pair(mixed.x * inverse, mixed.y * inverse);
    }
  }
};

}  // namespace

void norm_linear_attend(Context& ctx, View x, const StreamNorm& norm, const LinearWeight& weight,
                        View head_norm, float eps, const KvView& kv, float scale, View out) {
  LONGTAKE_CHECK(kv.device != nullptr);
  const DevicePages& pages = *kv.device;
  const NormVectors vectors = stream_norm_of(x, norm);
  const Product p = product_of(x, weight);
  const size_t page_bytes = static_cast<size_t>(pages.max_pages_per_head) * kPageBytes;
  if (suits(x, weight, vectors) && ctx.cuda()->is_hopper_or_later() && p.stride() >= kLeastStride &&
      pages.format == PageFormat::kBf16 && pages.head_dim == kHeadDim &&
      pages.max_pages_per_head <= kMostPages &&
      p.out <= kHeadColumns * static_cast<int>(kMostHeadBlocks) && starts_in_pairs(out.raw()) &&
      fits(ctx, p, kHeadColumns, page_bytes)) {
    ToAttention to;
    to.norm = head_norm.empty() ? nullptr : head_norm.data<float>();
    to.dim = p.out;
    to.eps = eps;
    to.store = static_cast<const unsigned char*>(pages.store);
    to.heads = pages.heads;
    to.scale_log2 = scale * 1.44269504088896341F;
    to.out = out.data<bf16>();
    const auto blocks = static_cast<unsigned>(p.out / kHeadColumns);
    return launch_product<kHeadColumns, true>(ctx, "norm_linear_attend", p, vectors, to,
                                              dim3(blocks, blocks_of(p.rows, kTileRows)), blocks,
                                              page_bytes);
  }
  const Workspace::Scope scope(ctx.workspace());
  const View q = ctx.workspace().take(kv.dtype, out.shape());
  const HeadPart part{head_norm, false, q};
  cuda::norm_linear_heads(ctx, x, norm, weight, {&part, 1}, View(), View(), eps);
  cuda::attend(ctx, q, kv, nullptr, scale, out);
}

}  // namespace longtake::cuda
