// Host side of paged attention, and the kernel that puts cut rows together.
#include <algorithm>

#include "attention/paged_attention.cuh"

namespace longtake::cuda {

namespace {

// Where a row is cut: the boundary between attention blocks `boundary` - 1 and `boundary`.
struct Cut {
  int row;
  int begin;     // of the row, in units of the tail
  int from, to;  // attention blocks [from, to) have a part of the row each, or are empty
};

// False unless the boundary is the first that lies strictly inside a row. plan: starts, then whole.
__device__ bool find_cut(const PageLists& lists, const int32_t* starts, int num_blocks,
                         int boundary, Cut& cut) {
  const int first_row = starts[num_blocks + 1] * num_blocks;
  if (first_row >= lists.num_rows()) return false;  // no tail
  const int base = pages_before(lists, first_row), unit = starts[boundary];
  cut.row = row_at(lists, first_row, base + unit);
  cut.begin = pages_before(lists, cut.row) - base;
  const int end = cut.begin + length_of(lists, cut.row / lists.rows_per_list);
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
  const int num_rows = args.lists.num_rows(), tiles = num_rows / args.num_heads;
  // Calls body(in_tile, channel) for the four channels that this thread has of a row's slice: what
  // it reads comes a whole trip to memory after what says which.
  const auto each_four = [&](int row, const auto& body) {
    constexpr int kFours = D / 4;
    const int first = static_cast<int>(blockIdx.y) * kQueries;
    for (int i = threadIdx.x; i < kQueries * kFours; i += blockDim.x) {
      const int in_tile = first + i / kFours, query = row % tiles * kTileQueries + in_tile;
      if (query >= args.num_queries) continue;
      const float4 x = body(in_tile, i % kFours * 4);
      *reinterpret_cast<uint2*>(out_of<D>(args, query, row / tiles) + i % kFours * 4) = {
          pack_bf16(x.x, x.y), pack_bf16(x.z, x.w)};
    }
  };
  if (blockIdx.x >= num_blocks) {
    for (int row = blockIdx.x - num_blocks; row < num_rows; row += kEmptyBlocks) {
      if (length_of(args.lists, row / args.lists.rows_per_list) > 0) continue;
      each_four(row, [](int, int) { return float4{}; });
    }
    return;
  }
  Cut cut;
  const int32_t* starts = args.plan;
  if (blockIdx.x == 0 || !find_cut(args.lists, starts, num_blocks, blockIdx.x, cut)) return;
  each_four(cut.row, [&](int in_tile, int channel) {
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
    float4 numerator{};
    float sum = 0;
#pragma unroll 4
    for (int b = cut.from; b < cut.to; ++b) {
      if (starts[b] == starts[b + 1]) continue;
      const float2 part = args.partial_sum[at(b)];
      const float4 more = *reinterpret_cast<const float4*>(args.partial_out + at(b) * D + channel);
      const float factor = fast_exp2(part.x - reference);
      numerator = {fmaf(factor, more.x, numerator.x), fmaf(factor, more.y, numerator.y),
                   fmaf(factor, more.z, numerator.z), fmaf(factor, more.w, numerator.w)};
      sum += factor * part.y;
    }
    const float inverse = sum == 0 ? 0 : 1 / sum;
    return float4{numerator.x * inverse, numerator.y * inverse, numerator.z * inverse,
                  numerator.w * inverse};
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
  if (kernel == AttentionKernel::kBest || format == PageFormat::kF32) {
    kernel_ = properties.major == 9 && format != PageFormat::kF32 ? AttentionKernel::kHopper
                                                                  : AttentionKernel::kPortable;
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
  num_blocks_ = std::min(properties.multiProcessorCount, kMaxBlocks);
  if (format == PageFormat::kF32) {
    prepare_f32();
    return;
  }
  if (kernel_ == AttentionKernel::kHopper) {
    room_ = prepare_hopper(head_dim, format);
  } else {
    prepare_portable(head_dim);
  }
  room_[0] = num_blocks_;
  plan_ = DeviceArray<int32_t>(static_cast<size_t>(num_blocks_) + 2);
  partial_ = DeviceArray<float>(static_cast<size_t>(2 * num_blocks_) * kTileQueries *
                                static_cast<size_t>(head_dim + 2));
}

size_t PagedAttention::workspace_bytes() const {
  return plan_.size() * sizeof(int32_t) + partial_.size() * sizeof(float);
}

namespace {

// How many blocks work on a row; 0: by shares. Costs are counted in the time that a page takes, as
// if all lists were as long as the longest may be.
int choose_blocks_per_row(const ClusterRoom& room, int num_blocks, int64_t num_rows,
                          int64_t max_pages, int head_dim) {
  // What it costs besides: to begin a row; to begin it in a cluster and put it together there; by
  // shares, to make a plan, to write parts of rows and to put them together in a second launch. Of
  // 64 channels the last is as long as 24 pages take, and four groups of warps read rows in half
  // the time (paged_attention_sm90.cu).
  constexpr int64_t kRow = 1, kCluster = 4;
  const int64_t shares = head_dim == 64 ? 24 : 6;
  int best = 0;
  int64_t least = (num_rows * (max_pages + kRow) + num_blocks - 1) / num_blocks + shares;
  for (size_t i = 0; i < room.size(); ++i) {
    if (room[i] == 0) continue;
    const int64_t rounds = (num_rows + room[i] - 1) / room[i];
    const int64_t blocks = int64_t{1} << i;
    const int64_t cost =
        rounds * ((max_pages + blocks - 1) / blocks + (blocks > 1 ? kCluster : kRow));
    if (cost < least) {
      least = cost;
      best = static_cast<int>(blocks);
    }
  }
  return best;
}

}  // namespace

void PagedAttention::run(const void* q, int64_t num_queries, int num_heads, const void* store,
                         const PageLists& lists, float scale, void* out, cudaStream_t stream) {
  const int64_t tiles = (num_queries + kTileQueries - 1) / kTileQueries;
  LONGTAKE_CHECK(lists.num_rows() == tiles * num_heads, lists.num_rows(), " rows, ", tiles,
                 " tiles");
  LONGTAKE_CHECK(scale > 0, scale);
  if (lists.num_rows() == 0) return;
  PagedArguments args{};
  args.q = q;
  args.out = out;
  args.num_queries = static_cast<int>(num_queries);
  args.num_heads = num_heads;
  args.store = static_cast<const unsigned char*>(store);
  args.lists = lists;
  args.scale_log2 = scale * 1.44269504088896341F;
  if (format_ == PageFormat::kF32) {
    launch_f32(head_dim_, args, stream);
    check(cudaGetLastError(), "attention in f32");
    return;
  }
  args.blocks_per_row =
      choose_blocks_per_row(room_, num_blocks_, lists.num_rows(), lists.max_pages, head_dim_);
  args.plan = plan_.data();
  args.partial_out = partial_.data();
  args.partial_sum = reinterpret_cast<float2*>(
      partial_.data() + static_cast<int64_t>(2 * num_blocks_) * kTileQueries * head_dim_);
  int blocks = num_blocks_;
  if (args.blocks_per_row > 1) blocks = args.blocks_per_row * lists.num_rows();
  if (args.blocks_per_row == 1) blocks = std::min(num_blocks_, lists.num_rows());
  if (kernel_ == AttentionKernel::kHopper) {
    launch_hopper(head_dim_, format_, blocks, args, stream);
  } else {
    launch_portable(head_dim_, blocks, args, stream);
  }
  check(cudaGetLastError(), "attention");
  if (args.blocks_per_row > 0) return;
  const auto combine = head_dim_ == 64 ? combine_kernel<64> : combine_kernel<128>;
  const dim3 grid(static_cast<unsigned>(num_blocks_ + kEmptyBlocks), kCombineSlices);
  combine<<<grid, 256, 0, stream>>>(args, num_blocks_);
  check(cudaGetLastError(), "combining attention");
}

}  // namespace longtake::cuda
