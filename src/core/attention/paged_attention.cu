// Host side of paged attention, and the kernels around the two that do the work: planning and
// combining cut rows.
#include "attention/paged_attention.cuh"

namespace longtake::cuda {

namespace {

constexpr int kMaxBlocks = 1024;

// One block of kMaxBlocks threads, thread b for block b of the attention kernel. Every block gets
// as many whole rows as leave none of them with more than its fair share of pages; what is missing
// to the fair share comes from the tail, in order.
__global__ void __launch_bounds__(kMaxBlocks)
    plan_kernel(PageLists lists, int num_blocks, int32_t* plan) {
  __shared__ int32_t sums[kMaxBlocks];
  const int block = threadIdx.x;
  const bool on = block < num_blocks;
  const int64_t total = lists.offsets[lists.num_rows];
  const auto share_begin = [&](int b) { return static_cast<int32_t>(total * b / num_blocks); };
  const int share = on ? share_begin(block + 1) - share_begin(block) : 0;
  int load = 0, whole = 0;
  for (; (whole + 1) * num_blocks <= lists.num_rows; ++whole) {
    int more = load;
    if (on) {
      const int row = whole * num_blocks + block;
      more += lists.offsets[row + 1] - lists.offsets[row];
    }
    if (__syncthreads_or(more > share)) break;
    load = more;
  }
  sums[block] = share - load;
  for (int step = 1; step < kMaxBlocks; step *= 2) {
    __syncthreads();
    const int32_t before = block >= step ? sums[block - step] : 0;
    __syncthreads();
    sums[block] += before;
  }
  if (block == 0) {
    plan[0] = whole;
    plan[1] = 0;
  }
  if (on) plan[2 + block] = sums[block];
}

// Where a row is cut: the boundary between attention blocks `boundary` - 1 and `boundary`.
struct Cut {
  int row;
  int begin;     // of the row, in units of the tail
  int from, to;  // attention blocks [from, to) have a part of the row each, or are empty
};

// False unless the boundary is the first that lies strictly inside a row.
__device__ bool find_cut(const PageLists& lists, const int32_t* plan, int num_blocks, int boundary,
                         Cut& cut) {
  const int32_t* starts = plan + 1;  // [num_blocks + 1]
  const int first_row = plan[0] * num_blocks;
  const int base = lists.offsets[first_row], unit = starts[boundary];
  // The last row that begins at or before the boundary.
  int high = lists.num_rows;
  cut.row = first_row;
  while (high - cut.row > 1) {
    const int middle = (cut.row + high) / 2;
    (lists.offsets[middle] - base <= unit ? cut.row : high) = middle;
  }
  if (cut.row >= lists.num_rows) return false;  // no tail
  cut.begin = lists.offsets[cut.row] - base;
  const int end = lists.offsets[cut.row + 1] - base;
  cut.from = boundary - 1;
  if (unit <= cut.begin || unit >= end || starts[cut.from] > cut.begin) return false;
  cut.to = boundary + 1;
  while (cut.to < num_blocks && starts[cut.to] < end) ++cut.to;
  return true;
}

constexpr int kCombineSlices = 16;  // of a tile's queries, a block each
constexpr int kEmptyBlocks = 8;     // that look for rows without pages

// Blocks x < num_blocks put the row together that is cut at boundary x, if one is; the others write
// zeros for rows without pages.
template <int D>
__global__ void __launch_bounds__(256) combine_kernel(PagedArguments args, int num_blocks) {
  constexpr int kQueries = kTileQueries / kCombineSlices;
  const int tiles = args.lists.num_rows / args.num_heads;
  // Calls body(query, in_tile, channel) for what this thread has of a row's slice.
  const auto each_value = [&](int row, const auto& body) {
    const int first = static_cast<int>(blockIdx.y) * kQueries;
    for (int i = threadIdx.x; i < kQueries * D; i += blockDim.x) {
      const int in_tile = first + i / D, query = row % tiles * kTileQueries + in_tile;
      if (query < args.num_queries) {
        const int64_t at = static_cast<int64_t>(query) * args.num_heads + row / tiles;
        args.out[at * D + i % D] = __float2bfloat16(body(in_tile, i % D));
      }
    }
  };
  if (blockIdx.x >= num_blocks) {
    for (int row = blockIdx.x - num_blocks; row < args.lists.num_rows; row += kEmptyBlocks) {
      if (args.lists.offsets[row] < args.lists.offsets[row + 1]) continue;
      each_value(row, [](int, int) { return 0.0F; });
    }
    return;
  }
  Cut cut;
  if (blockIdx.x == 0 || !find_cut(args.lists, args.plan, num_blocks, blockIdx.x, cut)) return;
  const int32_t* starts = args.plan + 1;
  each_value(cut.row, [&](int in_tile, int channel) {
    // A block's second slot if the row began inside its stretch, else the first.
    const auto at = [&](int block) {
      return static_cast<int64_t>(2 * block + (starts[block] < cut.begin)) * kTileQueries + in_tile;
    };
    float reference = -INFINITY;
#pragma unroll 4
    for (int b = cut.from; b < cut.to; ++b) {
      const float other = starts[b] < starts[b + 1] ? args.partial_sum[at(b)].x : -INFINITY;
      reference = fmaxf(reference, other);
    }
    float numerator = 0, sum = 0;
#pragma unroll 4
    for (int b = cut.from; b < cut.to; ++b) {
      if (starts[b] == starts[b + 1]) continue;
      const float2 part = args.partial_sum[at(b)];
      const float factor = fast_exp2(part.x - reference);
      numerator += factor * args.partial_out[at(b) * D + channel];
      sum += factor * part.y;
    }
    return sum == 0 ? 0.0F : numerator / sum;
  });
}

}  // namespace

PagedAttention::PagedAttention(int head_dim, AttentionKernel kernel, PageFormat format)
    : head_dim_(head_dim), kernel_(kernel), format_(format) {
  expect_head_dim(head_dim, format);
  int device = 0;
  cudaDeviceProp properties;
  check(cudaGetDevice(&device), "GPU");
  check(cudaGetDeviceProperties(&properties, device), "GPU");
  const auto capability = str(properties.major, ".", properties.minor);
  if (kernel == AttentionKernel::kBest) {
    kernel_ = properties.major == 9 ? AttentionKernel::kHopper : AttentionKernel::kPortable;
  }
  if (kernel_ == AttentionKernel::kHopper && properties.major != 9) {
    throw Error(str("attention kernel: expected compute capability 9.0, found ", capability));
  }
  if (format == PageFormat::kFp8 && kernel_ != AttentionKernel::kHopper) {
    throw Error(str("attention in 8 bits: expected compute capability 9.0, found ", capability));
  }
  if (properties.major < 8) {
    throw Error(
        str(properties.name, ": expected compute capability 8.0 or later, found ", capability));
  }
  num_blocks_ = properties.multiProcessorCount;
  LONGTAKE_CHECK(num_blocks_ <= kMaxBlocks, num_blocks_);
  plan_ = DeviceArray<int32_t>(static_cast<size_t>(num_blocks_) + 2);
  partial_ = DeviceArray<float>(static_cast<size_t>(2 * num_blocks_) * kTileQueries *
                                static_cast<size_t>(head_dim + 2));
}

size_t PagedAttention::workspace_bytes() const {
  return plan_.size() * sizeof(int32_t) + partial_.size() * sizeof(float);
}

void PagedAttention::plan(const PageLists& lists, cudaStream_t stream) {
  plan_kernel<<<1, kMaxBlocks, 0, stream>>>(lists, num_blocks_, plan_.data());
  check(cudaGetLastError(), "planning attention");
}

void PagedAttention::run(const void* q, int64_t num_queries, int num_heads, const void* store,
                         const PageLists& lists, float scale, void* out, cudaStream_t stream) {
  const int64_t tiles = (num_queries + kTileQueries - 1) / kTileQueries;
  LONGTAKE_CHECK(lists.num_rows == tiles * num_heads, lists.num_rows, " rows, ", tiles, " tiles");
  LONGTAKE_CHECK(scale > 0, scale);
  if (lists.num_rows == 0) return;
  PagedArguments args{};
  args.q = static_cast<const __nv_bfloat16*>(q);
  args.out = static_cast<__nv_bfloat16*>(out);
  args.num_queries = static_cast<int>(num_queries);
  args.num_heads = num_heads;
  args.store = static_cast<const unsigned char*>(store);
  args.lists = lists;
  args.plan = plan_.data();
  args.partial_out = partial_.data();
  args.partial_sum = reinterpret_cast<float2*>(
      partial_.data() + static_cast<int64_t>(2 * num_blocks_) * kTileQueries * head_dim_);
  args.scale_log2 = scale * 1.44269504088896341F;
  if (kernel_ == AttentionKernel::kHopper) {
    launch_hopper(head_dim_, format_, num_blocks_, args, stream);
  } else {
    launch_portable(head_dim_, num_blocks_, args, stream);
  }
  check(cudaGetLastError(), "attention");
  const auto combine = head_dim_ == 64 ? combine_kernel<64> : combine_kernel<128>;
  const dim3 grid(static_cast<unsigned>(num_blocks_ + kEmptyBlocks), kCombineSlices);
  combine<<<grid, 256, 0, stream>>>(args, num_blocks_);
  check(cudaGetLastError(), "combining attention");
}

}  // namespace longtake::cuda
