// Host side of paged attention, and the kernels around the two that do the work: planning,
// combining cut rows, packing pages.
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

// One block a row; those of whole rows have nothing to do, except that rows without pages become
// zeros. Thread t has channel t mod D of query t / D, and so on.
template <int D>
__global__ void __launch_bounds__(256) combine_kernel(PagedArguments args, int num_blocks) {
  const int row = blockIdx.x;
  const int begin = args.lists.offsets[row], end = args.lists.offsets[row + 1];
  const int tail_row = args.plan[0] * num_blocks;
  if (row < tail_row && end > begin) return;
  const int32_t* starts = args.plan + 1;  // [num_blocks + 1]
  int from = 0, to = 0;                   // blocks that have a part of the row
  int unit = 0;
  if (end > begin) {
    const int base = args.lists.offsets[tail_row];
    unit = begin - base;
    // The block that the row begins in: the last that begins at or before it and is not empty.
    int high = num_blocks;
    while (high - from > 1) {
      const int middle = (from + high) / 2;
      (starts[middle] <= unit ? from : high) = middle;
    }
    to = from;
    while (to < num_blocks && starts[to] < end - base) ++to;
    if (to - from == 1) return;
  }
  const int tiles = args.lists.num_rows / args.num_heads;
  const int head = row / tiles, tile = row % tiles;
  for (int i = threadIdx.x; i < kTileQueries * D; i += blockDim.x) {
    const int in_tile = i / D, channel = i % D;
    const int query = tile * kTileQueries + in_tile;
    if (query >= args.num_queries) return;
    const auto at = [&](int block) {
      const int slot = 2 * block + (starts[block] >= unit ? 0 : 1);
      return static_cast<int64_t>(slot) * kTileQueries + in_tile;
    };
    float reference = -INFINITY;
    for (int b = from; b < to; ++b) {
      if (starts[b + 1] > starts[b]) reference = fmaxf(reference, args.partial_sum[at(b)].x);
    }
    float numerator = 0, sum = 0;
    for (int b = from; b < to; ++b) {
      if (starts[b + 1] == starts[b]) continue;
      const float2 part = args.partial_sum[at(b)];
      const float factor = fast_exp2(part.x - reference);
      numerator += factor * args.partial_out[at(b) * D + channel];
      sum += factor * part.y;
    }
    args.out[(static_cast<int64_t>(query) * args.num_heads + head) * D + channel] =
        __float2bfloat16(sum == 0 ? 0 : numerator / sum);
  }
}

// One block a page, one thread a chunk of 8 channels at a time.
__global__ void __launch_bounds__(256)
    pack_kernel(const uint4* k, const uint4* v, const float* bias, int num_tokens, int num_heads,
                int head_dim, const int32_t* pages, unsigned char* store) {
  const int head = blockIdx.y, chunks = head_dim / 8;
  const int begin = blockIdx.x * kPageKeys, used = min(kPageKeys, num_tokens - begin);
  unsigned char* page =
      store + static_cast<int64_t>(pages[head * gridDim.x + blockIdx.x]) * paged_bytes(head_dim);
  const int half = kPageKeys * head_dim * 2;
  const auto weight_of = [&](int slot) {
    if (slot >= used) return 0.0F;
    return bias ? expf(bias[static_cast<int64_t>(head) * num_tokens + begin + slot]) : 1.0F;
  };
  for (int i = threadIdx.x; i < kPageKeys * chunks; i += blockDim.x) {
    const int slot = i / chunks, chunk = i % chunks;
    const int64_t token = begin + min(slot, used - 1);
    const int64_t at = (token * num_heads + head) * chunks + chunk;
    *reinterpret_cast<uint4*>(page + chunk_offset(slot, chunk)) = k[at];
    uint4 value = slot < used ? v[at] : uint4{};
    if (bias && slot < used) {
      const float weight = weight_of(slot);
      auto* pairs = reinterpret_cast<__nv_bfloat162*>(&value);
      for (int p = 0; p < 4; ++p) {
        const float2 pair = __bfloat1622float2(pairs[p]);
        pairs[p] = __floats2bfloat162_rn(pair.x * weight, pair.y * weight);
      }
    }
    *reinterpret_cast<uint4*>(page + half + chunk_offset(slot, chunk)) = value;
  }
  if (threadIdx.x < kPageKeys) {
    reinterpret_cast<float*>(page + 2 * half)[threadIdx.x] = weight_of(threadIdx.x);
  }
}

void expect_head_dim(int head_dim) {
  if (head_dim != 64 && head_dim != 128) {
    throw Error(str("attention on the GPU: expected 64 or 128 channels a head, found ", head_dim));
  }
}

}  // namespace

PagedAttention::PagedAttention(int head_dim, AttentionKernel kernel)
    : head_dim_(head_dim), kernel_(kernel) {
  expect_head_dim(head_dim);
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
    launch_hopper(head_dim_, num_blocks_, args, stream);
  } else {
    launch_portable(head_dim_, num_blocks_, args, stream);
  }
  check(cudaGetLastError(), "attention");
  const auto combine = head_dim_ == 64 ? combine_kernel<64> : combine_kernel<128>;
  combine<<<static_cast<unsigned>(lists.num_rows), 256, 0, stream>>>(args, num_blocks_);
  check(cudaGetLastError(), "combining attention");
}

void pack_pages(const void* k, const void* v, const float* bias, int64_t num_tokens, int num_heads,
                int head_dim, const int32_t* pages, void* store, cudaStream_t stream) {
  expect_head_dim(head_dim);
  if (num_tokens == 0 || num_heads == 0) return;
  const dim3 grid(static_cast<unsigned>((num_tokens + kPageKeys - 1) / kPageKeys),
                  static_cast<unsigned>(num_heads));
  pack_kernel<<<grid, 256, 0, stream>>>(static_cast<const uint4*>(k), static_cast<const uint4*>(v),
                                        bias, static_cast<int>(num_tokens), num_heads, head_dim,
                                        pages, static_cast<unsigned char*>(store));
  check(cudaGetLastError(), "packing pages");
}

}  // namespace longtake::cuda
