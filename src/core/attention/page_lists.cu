// Page lists on the device. A block measures the pages of one row and lists the best; the last
// block to be done sums up the lengths.
#include "attention/page_lists.h"

#include "attention/choose.cuh"

namespace longtake::cuda {

namespace {

constexpr int kBytesPerPage = 8;  // of shared memory: rank and keys

struct ListArguments {
  const void* q;
  int num_queries;
  HeadPages heads;
  const __nv_bfloat16* means;
  const float* weights;
  const int32_t* counts;
  float scale_log2;
  double density;
  int max_pages, first_pages, last_pages;
  int32_t* listed;   // [rows][max_pages]
  int32_t* lengths;  // [3][rows]: pages listed, their keys, keys there
  int32_t* offsets;
  uint32_t* arrived;
  volatile double* told;  // the density reached
};

// Lengths of all rows summed up, for the attention that follows, and the density.
__device__ void sum_up(const ListArguments& args, int rows, ChooseScratch& scratch) {
  const int tiles = rows / args.heads.num_heads;
  const int stretch = (rows + kChooseThreads - 1) / kChooseThreads;
  const int begin = min(rows, static_cast<int>(threadIdx.x) * stretch);
  const int end = min(rows, begin + stretch);
  int own = 0, total = 0;
  double read = 0, there = 0;
  for (int row = begin; row < end; ++row) {
    own += __ldcg(args.lengths + row);
    const double queries = min(kTileQueries, args.num_queries - row % tiles * kTileQueries);
    read += queries * __ldcg(args.lengths + rows + row);
    there += queries * __ldcg(args.lengths + 2 * rows + row);
  }
  int at = scan(own, total, scratch);
  for (int row = begin; row < end; ++row) {
    args.offsets[row] = at;
    at += __ldcg(args.lengths + row);
  }
  __shared__ double sums[2][kChooseThreads / 32];
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    read += __shfl_xor_sync(~0U, read, step);
    there += __shfl_xor_sync(~0U, there, step);
  }
  if (threadIdx.x % 32 == 0) {
    sums[0][threadIdx.x / 32] = read;
    sums[1][threadIdx.x / 32] = there;
  }
  __syncthreads();
  if (threadIdx.x > 0) return;
  args.offsets[rows] = total;
  for (int w = 1; w < kChooseThreads / 32; ++w) {
    read += sums[0][w];
    there += sums[1][w];
  }
  *args.told = there > 0 ? read / there : 1;
}

// One block a row.
template <int D, typename T>
__global__ void __launch_bounds__(kChooseThreads) list_kernel(ListArguments args) {
  extern __shared__ uint32_t rank[];  // [max_pages], then sizes
  __shared__ MeasureScratch<D> measuring;
  __shared__ ChooseScratch choosing;
  const int rows = gridDim.x, row = blockIdx.x, tiles = rows / args.heads.num_heads;
  const int head = row / tiles, tile = row % tiles;
  const int32_t* own = args.heads.pages + args.heads.begin[head];
  const int pages = min(args.max_pages, args.heads.begin[head + 1] - args.heads.begin[head]);
  auto* keys = reinterpret_cast<int32_t*>(rank + args.max_pages);
  const auto is_always = [&](int p) {
    return p < args.first_pages || p >= pages - args.last_pages;
  };
  int own_keys = 0, own_always = 0, total, always;
  for (int p = threadIdx.x; p < pages; p += kChooseThreads) {
    keys[p] = args.counts[own[p]];
    own_keys += keys[p];
    if (is_always(p)) own_always += keys[p];
  }
  scan(own_keys, total, choosing);
  scan(own_always, always, choosing);
  const int wanted = max(always, static_cast<int>(ceil(args.density * total)));
  if (wanted > always && wanted < total) {
    measure<D, Measure::kMass>(
        static_cast<const T*>(args.q) + head * D, int64_t{args.heads.num_heads} * D,
        tile * kTileQueries, args.num_queries, args.scale_log2, pages,
        [&](int p) { return args.means + int64_t{own[p]} * D; },
        [&](int p) { return args.weights[own[p]]; }, measuring, reinterpret_cast<float*>(rank));
  }
  for (int p = threadIdx.x; p < pages; p += kChooseThreads) {
    if (wanted == total || is_always(p)) {
      rank[p] = kAlways;
    } else {
      rank[p] = wanted > always ? rank_of(__uint_as_float(rank[p])) : 0;
    }
  }
  __syncthreads();
  const int chosen = choose_best(
      rank, pages, wanted, [&](int p) { return keys[p]; }, choosing);
  int32_t* listed = args.listed + static_cast<int64_t>(row) * args.max_pages;
  own_keys = 0;
  for (int p = threadIdx.x; p < pages; p += kChooseThreads) {
    if (rank[p] == 0) continue;
    listed[rank[p] - 1] = own[p];
    own_keys += keys[p];
  }
  int read;
  scan(own_keys, read, choosing);
  if (threadIdx.x == 0) {
    args.lengths[row] = chosen;
    args.lengths[rows + row] = read;
    args.lengths[2 * rows + row] = total;
  }
  if (is_last_block(args.arrived, rows)) sum_up(args, rows, choosing);
}

template <typename Body>
void with_kernel(int head_dim, bool q_is_f32, const Body& body) {
  if (head_dim == 64) {
    body(q_is_f32 ? list_kernel<64, float> : list_kernel<64, __nv_bfloat16>);
  } else {
    body(q_is_f32 ? list_kernel<128, float> : list_kernel<128, __nv_bfloat16>);
  }
}

}  // namespace

PageLister::PageLister(int max_rows, int max_pages_per_head, int head_dim)
    : max_rows_(max_rows),
      max_pages_(max_pages_per_head),
      head_dim_(head_dim),
      offsets_(static_cast<size_t>(max_rows) + 1),
      pages_(static_cast<size_t>(max_rows) * static_cast<size_t>(max_pages_per_head)),
      counts_(3 * static_cast<size_t>(max_rows)),
      arrived_(on_device(std::vector<uint32_t>{0})),
      density_(1) {
  LONGTAKE_CHECK(head_dim == 64 || head_dim == 128, head_dim);
  *density_.data() = 1;
  // The kernel's limit is that of all listers, so it is the device's, whatever this one needs.
  int device = 0, most = 0;
  check(cudaGetDevice(&device), "GPU");
  check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "GPU");
  for (const bool q_is_f32 : {false, true}) {
    with_kernel(head_dim, q_is_f32, [&](const auto kernel) {
      cudaFuncAttributes known;
      check(cudaFuncGetAttributes(&known, kernel), "page lists");
      const int room = most - static_cast<int>(known.sharedSizeBytes);
      if (max_pages_per_head > room / kBytesPerPage) {
        throw Error(str("page lists: expected at most ", room / kBytesPerPage,
                        " pages a head, which a multiprocessor's shared memory holds, found ",
                        max_pages_per_head));
      }
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, room),
            "page lists");
    });
  }
}

PageLists PageLister::list(const void* q, bool q_is_f32, int64_t num_queries,
                           const HeadPages& heads, const PageSummaries& summaries, float scale,
                           const ListOptions& options, cudaStream_t stream) {
  if (!(options.density >= 0) || !(options.density <= 1)) {
    throw Error(ErrorKind::kUsage, str("density: expected 0..1, found ", options.density));
  }
  const auto tiles = static_cast<int>((num_queries + kTileQueries - 1) / kTileQueries);
  const int rows = tiles * heads.num_heads;
  LONGTAKE_CHECK(rows <= max_rows_, rows, " rows, at most ", max_rows_);
  const PageLists lists = {rows, 1, max_pages_, max_pages_, offsets_.data(), pages_.data()};
  if (rows == 0) return lists;
  ListArguments args{};
  args.q = q;
  args.num_queries = static_cast<int>(num_queries);
  args.heads = heads;
  args.means = static_cast<const __nv_bfloat16*>(summaries.means());
  args.weights = summaries.weights();
  args.counts = summaries.counts();
  args.scale_log2 = scale * 1.44269504088896341F;
  args.density = options.density;
  args.max_pages = max_pages_;
  args.first_pages = options.first_pages;
  args.last_pages = options.last_pages;
  args.listed = pages_.data();
  args.lengths = counts_.data();
  args.offsets = offsets_.data();
  args.arrived = arrived_.data();
  args.told = density_.data();
  with_kernel(head_dim_, q_is_f32, [&](const auto kernel) {
    kernel<<<static_cast<unsigned>(rows), kChooseThreads,
             static_cast<size_t>(max_pages_) * kBytesPerPage, stream>>>(args);
  });
  check(cudaGetLastError(), "page lists");
  return lists;
}

}  // namespace longtake::cuda
