// AnnCA on the device. A block measures a head's tokens by a tile of queries; the head's last block
// to be done adds up what the tiles found, chooses and packs.
#include "attention/prompt_tokens.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "attention/choose.cuh"

namespace longtake::cuda {

namespace {

constexpr int kMaxTokens = 2048;

struct TokenArguments {
  const void* q;
  int num_queries, tiles, num_tokens, num_kept;
  float scale_log2;
  DevicePages prompt, kept;
  const __nv_bfloat16* keys;
  float* worth;
  int32_t* members;
  uint32_t* arrived;
};

// Page `i` of a head.
__device__ unsigned char* page_of(const DevicePages& pages, int head, int i, size_t bytes) {
  auto* store = static_cast<unsigned char*>(const_cast<void*>(pages.store));
  return store + bytes * pages.heads.pages[pages.heads.begin[head] + i];
}

// Copies tokens order [num_kept] of a head into its pages, 16 bytes a thread at a time.
template <int D>
__device__ void pack_kept(const TokenArguments& args, int head, const int32_t* order) {
  const bool wide = args.prompt.format == PageFormat::kF32;
  const int chunks = D / (wide ? 4 : 8), matrix = kPageKeys * chunks * 16;
  const size_t bytes = paged_bytes(D, args.prompt.format);
  const auto offset = [&](int slot, int chunk) {
    return wide ? (slot * chunks + chunk) * 16 : chunk_offset(slot, chunk);
  };
  const int slots = (args.num_kept + kPageKeys - 1) / kPageKeys * kPageKeys;
  for (int i = threadIdx.x; i < slots * chunks; i += kChooseThreads) {
    const int entry = i / chunks, chunk = i % chunks;
    const bool used = entry < args.num_kept;
    const int token = order[min(entry, args.num_kept - 1)];
    const unsigned char* from =
        page_of(args.prompt, head, token / kPageKeys, bytes) + offset(token % kPageKeys, chunk);
    unsigned char* to = page_of(args.kept, head, entry / kPageKeys, bytes);
    const int at = offset(entry % kPageKeys, chunk);
    *reinterpret_cast<uint4*>(to + at) = *reinterpret_cast<const uint4*>(from);
    *reinterpret_cast<uint4*>(to + matrix + at) =
        used ? *reinterpret_cast<const uint4*>(from + matrix) : uint4{};
    if (chunk == 0) {
      reinterpret_cast<float*>(to + 2 * matrix)[entry % kPageKeys] = used ? 1.0F : 0.0F;
    }
  }
}

// One block a head and tile.
template <int D, Measure kMeasure, typename T>
__global__ void __launch_bounds__(kChooseThreads)
    choose_kernel(const __grid_constant__ TokenArguments args) {
  __shared__ uint32_t rank[kMaxTokens];
  __shared__ int32_t order[kMaxTokens];

  __shared__ union {
    MeasureScratch<D> measuring;
    ChooseScratch choosing;
  } scratch;

  const int head = blockIdx.x / args.tiles, tile = blockIdx.x % args.tiles;
  const int tokens = args.num_tokens;
  float* worth = args.worth + static_cast<int64_t>(head) * args.tiles * tokens;
  measure<D, kMeasure>(
      static_cast<const T*>(args.q) + head * D, int64_t{args.prompt.heads.num_heads} * D,
      tile * kTileQueries, args.num_queries, args.scale_log2, tokens,
      [&](int i) { return args.keys + (static_cast<int64_t>(head) * tokens + i) * D; },
      [](int) { return 1.0F; }, scratch.measuring, worth + static_cast<int64_t>(tile) * tokens);
  if (!is_last_block(args.arrived + head, args.tiles)) return;
  for (int i = threadIdx.x; i < tokens; i += kChooseThreads) {
    float value = __ldcg(worth + i);
    for (int t = 1; t < args.tiles; ++t) {
      const float other = __ldcg(worth + static_cast<int64_t>(t) * tokens + i);
      value = kMeasure == Measure::kMass ? value + other : fmaxf(value, other);
    }
    rank[i] = rank_of(value);
  }
  __syncthreads();
  choose_best(
      rank, tokens, args.num_kept, [](int) { return 1; }, scratch.choosing);
  for (int i = threadIdx.x; i < tokens; i += kChooseThreads) {
    const int entry = static_cast<int>(rank[i]) - 1;
    args.members[head * tokens + i] = entry;
    if (entry >= 0) order[entry] = i;
  }
  __syncthreads();
  pack_kept<D>(args, head, order);
}

// keys [num_heads, num_tokens, D] out of the prompt's pages; one block a head and token.
__global__ void unpack_kernel(DevicePages prompt, int num_tokens, int head_dim,
                              __nv_bfloat16* keys) {
  const int head = blockIdx.x / num_tokens, token = blockIdx.x % num_tokens;
  const unsigned char* page =
      page_of(prompt, head, token / kPageKeys, paged_bytes(head_dim, prompt.format));
  const int slot = token % kPageKeys, channel = threadIdx.x;
  float value;
  if (prompt.format == PageFormat::kF32) {
    value = reinterpret_cast<const float*>(page)[slot * head_dim + channel];
  } else {
    const auto* chunk =
        reinterpret_cast<const __nv_bfloat16*>(page + chunk_offset(slot, channel / 8));
    value = __bfloat162float(chunk[channel % 8]);
  }
  keys[static_cast<int64_t>(blockIdx.x) * head_dim + channel] = __float2bfloat16(value);
}

template <typename Body>
void with_kernel(int head_dim, bool by_mass, bool wide, const Body& body) {
  const auto call = [&]<int D, Measure kMeasure>() {
    body(wide ? choose_kernel<D, kMeasure, float> : choose_kernel<D, kMeasure, __nv_bfloat16>);
  };
  if (head_dim == 64) {
    by_mass ? call.template operator()<64, Measure::kMass>()
            : call.template operator()<64, Measure::kBest>();
  } else {
    by_mass ? call.template operator()<128, Measure::kMass>()
            : call.template operator()<128, Measure::kBest>();
  }
}

}  // namespace

PromptTokens::PromptTokens(const DevicePages& prompt, int num_kept, cudaStream_t stream)
    : prompt_(prompt), kept_(prompt), num_kept_(num_kept) {
  const int heads = prompt.heads.num_heads, dim = prompt.head_dim;
  const auto tokens = static_cast<int>(prompt.num_tokens);
  if (dim != 64 && dim != 128) {
    throw Error(str("AnnCA on the GPU: expected 64 or 128 channels a head, found ", dim));
  }
  if (tokens > kMaxTokens) {
    throw Error(str("AnnCA on the GPU: expected a prompt of at most ", kMaxTokens,
                    " tokens, found ", tokens));
  }
  LONGTAKE_CHECK(0 <= num_kept && num_kept <= tokens, num_kept);
  const int pages = (num_kept + kPageKeys - 1) / kPageKeys;
  std::vector<int32_t> table(static_cast<size_t>(heads * pages + heads + 1));
  std::iota(table.begin(), table.end(), 0);
  for (int h = 0; h <= heads; ++h) table[static_cast<size_t>(heads * pages + h)] = h * pages;
  table_ = on_device(table);
  store_ = DeviceArray<unsigned char>(static_cast<size_t>(heads * pages) *
                                      paged_bytes(dim, prompt.format));
  members_ = DeviceArray<int32_t>(static_cast<size_t>(heads * tokens));
  arrived_ = on_device(std::vector<uint32_t>(static_cast<size_t>(heads)));
  kept_.store = store_.data();
  kept_.heads = {heads, table_.data() + heads * pages, table_.data()};
  kept_.max_pages_per_head = pages;
  kept_.num_tokens = num_kept;
  keys_ = DeviceArray<uint16_t>(static_cast<size_t>(heads * tokens * dim));
  if (tokens == 0) return;
  unpack_kernel<<<static_cast<unsigned>(heads * tokens), static_cast<unsigned>(dim), 0, stream>>>(
      prompt, tokens, dim, reinterpret_cast<__nv_bfloat16*>(keys_.data()));
  check(cudaGetLastError(), "keys of a prompt");
}

void PromptTokens::choose(const void* q, int64_t num_queries, bool by_mass, float scale,
                          cudaStream_t stream) {
  const auto tiles = static_cast<int>((num_queries + kTileQueries - 1) / kTileQueries);
  const int heads = prompt_.heads.num_heads;
  if (tiles == 0 || heads == 0 || num_kept_ == 0) return;
  if (tiles > tiles_) {
    tiles_ = tiles;
    worth_ = DeviceArray<float>(static_cast<size_t>(heads) * static_cast<size_t>(tiles) *
                                static_cast<size_t>(prompt_.num_tokens));
  }
  TokenArguments args{};
  args.q = q;
  args.num_queries = static_cast<int>(num_queries);
  args.tiles = tiles;
  args.num_tokens = static_cast<int>(prompt_.num_tokens);
  args.num_kept = num_kept_;
  args.scale_log2 = scale * 1.44269504088896341F;
  args.prompt = prompt_;
  args.kept = kept_;
  args.keys = reinterpret_cast<const __nv_bfloat16*>(keys_.data());
  args.worth = worth_.data();
  args.members = members_.data();
  args.arrived = arrived_.data();
  with_kernel(prompt_.head_dim, by_mass, prompt_.format == PageFormat::kF32,
              [&](const auto kernel) {
                kernel<<<static_cast<unsigned>(heads * tiles), kChooseThreads, 0, stream>>>(args);
              });
  check(cudaGetLastError(), "choice of prompt tokens");
}

}  // namespace longtake::cuda
