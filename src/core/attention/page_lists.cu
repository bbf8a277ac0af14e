// Page lists on the device: summaries of pages, lengths of lists, and the choice of each row.
#include "attention/page_lists.h"

#include <algorithm>

#include "attention/paged_attention.cuh"
#include "device/mma.cuh"

namespace longtake::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kTilePages = 64;  // whose mean keys are in shared memory at a time

__device__ int pages_of(const HeadPages& heads, int head, int max_pages) {
  return min(max_pages, heads.begin[head + 1] - heads.begin[head]);
}

__device__ int pages_listed(int pages, float density, int always) {
  return min(pages, max(always, static_cast<int>(ceilf(density * static_cast<float>(pages)))));
}

// One thread: heads are few.
__global__ void offsets_kernel(HeadPages heads, int max_pages, int tiles, float density, int always,
                               int32_t* offsets) {
  int at = 0, row = 0;
  for (int head = 0; head < heads.num_heads; ++head) {
    const int listed = pages_listed(pages_of(heads, head, max_pages), density, always);
    for (int tile = 0; tile < tiles; ++tile, at += listed) offsets[row++] = at;
  }
  offsets[row] = at;
}

struct ChooseArguments {
  const __nv_bfloat16* q;
  int num_queries;
  HeadPages heads;
  const unsigned char* means;
  const float* weights;
  float scale_log2;
  int max_pages, first_pages, last_pages;
  const int32_t* offsets;
  int32_t* listed;
};

// The sum over the block of both numbers, and over the threads before this one.
struct Counts {
  int a, b;
};

__device__ Counts scan(Counts own, Counts& total) {
  __shared__ Counts by_warp[kThreads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Counts sum = own;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int a = __shfl_up_sync(~0U, sum.a, step), b = __shfl_up_sync(~0U, sum.b, step);
    if (lane >= step) sum = {sum.a + a, sum.b + b};
  }
  __syncthreads();
  if (lane == 31) by_warp[warp] = sum;
  __syncthreads();
  Counts before = {};
  total = {};
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) {
    if (w == warp) before = total;
    total = {total.a + by_warp[w].a, total.b + by_warp[w].b};
  }
  return {before.a + sum.a - own.a, before.b + sum.b - own.b};
}

// mass [pages]: that of every page, summed over the tile's queries. Two passes over the mean keys:
// the first finds each query's softmax sum, the second shares it out.
template <int D>
__device__ void measure(const ChooseArguments& args, int head, int tile, int pages,
                        unsigned char* rows, float* weights, float (*by_warp)[kTilePages],
                        float* mass) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int32_t* own = args.heads.pages + args.heads.begin[head];
  const int first = tile * kTileQueries + warp * 16;
  uint32_t q[D / 16][4];
  load_left<D>(q, args.q + head * D, int64_t{args.heads.num_heads} * D, first, args.num_queries);
  float logits[kTilePages / 2];
  const float scale[2] = {args.scale_log2, args.scale_log2};
  OnlineSoftmax<8, 0> softmax;
  float share[2];
  for (int pass = 0; pass < 2; ++pass) {
    for (int begin = 0; begin < pages; begin += kTilePages) {
      __syncthreads();
      // Beyond the last page: that page again, without weight.
      for (int i = threadIdx.x; i < kTilePages * (D / 8); i += kThreads) {
        const int row = i / (D / 8), chunk = i % (D / 8);
        const int64_t page = own[min(begin + row, pages - 1)];
        copy_16(rows + offset_in_64_rows(row, chunk), args.means + (page * D + 8 * chunk) * 2);
      }
      if (threadIdx.x < kTilePages) {
        const int page = begin + threadIdx.x;
        weights[threadIdx.x] = page < pages ? args.weights[own[page]] : 0;
      }
      copies_commit();
      copies_wait<0>();
      __syncthreads();
      multiply_rows<D>(logits, q, rows);
      if (pass == 0) {
        softmax.update<kTilePages>(logits, weights, scale, 0);
        continue;
      }
#pragma unroll
      for (int i = 0; i < kTilePages / 8; ++i) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float sum = 0;
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const float logit =
                fmaf(logits[4 * i + 2 * r + c], args.scale_log2, -softmax.reference[r]);
            sum += share[r] * fast_exp2(logit);
          }
#pragma unroll
          for (int step = 4; step < 32; step *= 2) sum += __shfl_xor_sync(~0U, sum, step);
          const int column = 8 * i + 2 * (lane & 3) + c;
          if (lane < 4) by_warp[warp][column] = sum * weights[column];
        }
      }
      __syncthreads();
      if (threadIdx.x < kTilePages && begin + threadIdx.x < pages) {
        float sum = 0;
#pragma unroll
        for (int w = 0; w < kThreads / 32; ++w) sum += by_warp[w][threadIdx.x];
        mass[begin + threadIdx.x] = sum;
      }
    }
    if (pass == 0) {
      softmax.finish();
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const bool there = first + lane / 4 + 8 * r < args.num_queries;
        share[r] = there && softmax.sum[r] > 0 ? 1 / softmax.sum[r] : 0;
      }
    }
  }
}

// One block a row.
template <int D>
__global__ void __launch_bounds__(kThreads) choose_kernel(ChooseArguments args) {
  extern __shared__ __align__(128) unsigned char rows[];
  __shared__ float weights[kTilePages], by_warp[kThreads / 32][kTilePages];
  auto* mass = reinterpret_cast<float*>(rows + kTilePages * D * 2);
  const int tiles = gridDim.x / args.heads.num_heads;
  const int head = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  const int pages = pages_of(args.heads, head, args.max_pages);
  const int at = args.offsets[blockIdx.x], wanted = args.offsets[blockIdx.x + 1] - at;
  if (wanted == 0) return;
  if (wanted < pages) measure<D>(args, head, tile, pages, rows, weights, by_warp, mass);
  __syncthreads();
  // Masses are not negative, so that their bits are in order as integers.
  auto* rank = reinterpret_cast<uint32_t*>(mass);
  for (int p = threadIdx.x; p < pages; p += kThreads) {
    const bool always = p < args.first_pages || p >= pages - args.last_pages;
    if (always || wanted == pages) rank[p] = 0x7f800000U;
  }
  __syncthreads();
  // The largest threshold that `wanted` pages reach, bit by bit. A thread looks at a stretch.
  const int stretch = (pages + kThreads - 1) / kThreads;
  const int begin = min(pages, static_cast<int>(threadIdx.x) * stretch);
  const int end = min(pages, begin + stretch);
  uint32_t threshold = 0;
  Counts total;
  for (int bit = 30; bit >= 0; --bit) {
    const uint32_t tried = threshold | 1U << bit;
    Counts own = {};
    for (int p = begin; p < end; ++p) own.a += rank[p] >= tried;
    scan(own, total);
    if (total.a >= wanted) threshold = tried;
  }
  // Those above it, and of those at it the first.
  Counts own = {};
  for (int p = begin; p < end; ++p) {
    own.a += rank[p] > threshold;
    own.b += rank[p] == threshold;
  }
  Counts before = scan(own, total);
  const int at_threshold = wanted - total.a;
  const int32_t* numbers = args.heads.pages + args.heads.begin[head];
  for (int p = begin; p < end; ++p) {
    const bool above = rank[p] > threshold, equal = rank[p] == threshold;
    if (above || (equal && before.b < at_threshold)) {
      args.listed[at + before.a + min(before.b, at_threshold)] = numbers[p];
    }
    before = {before.a + above, before.b + equal};
  }
}

}  // namespace

PageLister::PageLister(int max_rows, int max_pages_per_head, int head_dim)
    : max_rows_(max_rows),
      max_pages_(max_pages_per_head),
      head_dim_(head_dim),
      offsets_(static_cast<size_t>(max_rows) + 1),
      pages_(static_cast<size_t>(max_rows) * static_cast<size_t>(max_pages_per_head)) {
  LONGTAKE_CHECK(head_dim == 64 || head_dim == 128, head_dim);
  const int bytes = kTilePages * head_dim * 2 + max_pages_per_head * 4;
  const auto kernel = head_dim == 64 ? choose_kernel<64> : choose_kernel<128>;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) !=
      cudaSuccess) {
    static_cast<void>(cudaGetLastError());
    throw Error(
        str("page lists: expected pages of a head that fit in a multiprocessor's shared "
            "memory, found ",
            max_pages_per_head));
  }
}

PageLists PageLister::list(const void* q, int64_t num_queries, const HeadPages& heads,
                           const PageSummaries& summaries, float scale, const ListOptions& options,
                           cudaStream_t stream) {
  if (!(options.density >= 0) || !(options.density <= 1)) {
    throw Error(ErrorKind::kUsage, str("density: expected 0..1, found ", options.density));
  }
  const auto tiles = static_cast<int>((num_queries + kTileQueries - 1) / kTileQueries);
  const int rows = tiles * heads.num_heads;
  LONGTAKE_CHECK(rows <= max_rows_, rows, " rows, at most ", max_rows_);
  const auto density = static_cast<float>(options.density);
  offsets_kernel<<<1, 1, 0, stream>>>(heads, max_pages_, tiles, density,
                                      options.first_pages + options.last_pages, offsets_.data());
  check(cudaGetLastError(), "lengths of page lists");
  const PageLists lists = {rows, 1, max_pages_, 0, offsets_.data(), pages_.data()};
  if (rows == 0) return lists;
  ChooseArguments args{};
  args.q = static_cast<const __nv_bfloat16*>(q);
  args.num_queries = static_cast<int>(num_queries);
  args.heads = heads;
  args.means = static_cast<const unsigned char*>(summaries.means());
  args.weights = summaries.weights();
  args.scale_log2 = scale * 1.44269504088896341F;
  args.max_pages = max_pages_;
  args.first_pages = options.first_pages;
  args.last_pages = options.last_pages;
  args.offsets = offsets_.data();
  args.listed = pages_.data();
  const auto kernel = head_dim_ == 64 ? choose_kernel<64> : choose_kernel<128>;
  const auto bytes = static_cast<size_t>(kTilePages * head_dim_ * 2 + max_pages_ * 4);
  kernel<<<static_cast<unsigned>(rows), kThreads, bytes, stream>>>(args);
  check(cudaGetLastError(), "page lists");
  return lists;
}

}  // namespace longtake::cuda
