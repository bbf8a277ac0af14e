// Cross attention to a short prompt in one launch: a block makes the queries of one head and 16
// tokens (ops/stream_product.cuh), the heads of a row being a cluster, and goes on to read the
// prompt, whose pages of the head it has brought in with the weights. A warp reads 16 keys of every
// page; what the warps have is put together in their order.
#include "attention/attend.h"
#include "attention/norm_linear_attend.h"
#include "attention/prompt_part.cuh"
#include "ops/stream_product.cuh"

namespace longtake::cuda {
namespace {

constexpr int kMostPages = 2;  // of a head
// What the warps have of the outputs takes the place of w; the queries and the warps' sums, which
// are less, that of x.
constexpr int kLeastStride = kPartWarps * kPartQueries * kPartStride * 4 / (kHeadColumns * 2);
static_assert(kPartWarps == kProductWarps && kPartQueries == kTileRows &&
              kPartChannels == kHeadColumns);

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
      const unsigned char* from = store + int64_t{pages[j]} * kPartPageBytes;
      for (int at = 16 * threadIdx.x; at < kPartPageBytes; at += 16 * kProductThreads)
        copy_16(reinterpret_cast<unsigned char*>(to) + j * kPartPageBytes + at, from + at);
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
    auto* const sums = reinterpret_cast<float2*>(queries + kTileRows * kPartStride);
    const unsigned char* const pages =
        reinterpret_cast<const unsigned char*>(queries + (kTileRows + kHeadColumns) * p.stride());
    const int lane = threadIdx.x % 32, in_head = column % kPartChannels;
#pragma unroll
    for (int i = 0; i < kPairs; ++i)
      *reinterpret_cast<uint32_t*>(queries + row_of(i) * kPartStride + in_head) =
          bf16_pair(v[i].x, v[i].y);
    __syncthreads();
    uint32_t q[kPartChannels / 16][4];
#pragma unroll
    for (int k = 0; k < kPartChannels / 16; ++k)
      load_matrices(q[k], queries + lane % 16 * kPartStride + 16 * k + lane / 16 * 8);
    PromptPart part;
    for (int j = 0; j < num_pages(); ++j) part.read(pages + j * kPartPageBytes, q, scale_log2);
    part.write(parts, sums);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int row = row_of(i);
      if (first_row + row >= p.rows) continue;
      float mixed[2];
      combine_prompt_parts<2>(parts, sums, row, in_head, mixed);
      *reinterpret_cast<uint32_t*>(out + int64_t{first_row + row} * dim + column) =
          bf16_pair(mixed[0], mixed[1]);
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
  const size_t page_bytes = static_cast<size_t>(pages.max_pages_per_head) * kPartPageBytes;
  if (suits(x, weight, vectors) && ctx.cuda()->is_hopper_or_later() && p.stride() >= kLeastStride &&
      pages.format == PageFormat::kBf16 && pages.head_dim == kPartChannels &&
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
