#include "kv/device_layout.h"

#include <cmath>

#include "kv/device_layout.cuh"

namespace longtake::cuda {
namespace {

constexpr int kParts = 4;  // blocks that share a page: a small chunk has few pages
constexpr int kRows = kPageKeys / kParts;

// Slots [slot, slot + count) of a page get tokens [token, token + count).
struct Slots {
  int page, slot, token, count;
};

__device__ Slots slots_of(const Fill& fill, int head, int block, int tokens) {
  const FrameRing& frames = fill.frames;
  if (fill.place == FillPlace::kWork) {
    const int token = block * kPageKeys;
    return {fill.layout.work(head, block), 0, token, min(kPageKeys, tokens - token)};
  }
  const int64_t held = fill.counters->held;
  if (fill.place == FillPlace::kTokens) {
    const int before = static_cast<int>(held % kPageKeys);
    const int slot = block == 0 ? before : 0;
    const int token = block == 0 ? 0 : block * kPageKeys - before;
    const auto page = static_cast<int>(held / kPageKeys) + block;
    return {fill.layout.history(head, page), slot, token, min(kPageKeys - slot, tokens - token)};
  }
  const int frame = block / frames.pages, part = block % frames.pages;
  const int64_t index = held + frame;
  const int in_frame = part * kPageKeys;
  const int count = min(kPageKeys, frames.tokens - in_frame);
  // A frame of the chunk that a later one displaces is not written: two would write one place.
  if (index >= frames.sink && index + frames.ring < held + tokens / frames.tokens)
    return {0, 0, 0, 0};
  return {fill.layout.history(head, frames.page_of(index) + part), 0,
          frame * frames.tokens + in_frame, count};
}

// Whether a 16-byte chunk holds a number whose exponent has every bit set.
template <typename T>
__device__ bool is_finite(const uint4& chunk) {
  const uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
  bool finite = true;
  for (const uint32_t word : words) {
    finite &= (word & 0x7f800000U) != 0x7f800000U;
    if constexpr (sizeof(T) == 2) finite &= (word & 0x7f80U) != 0x7f80U;
  }
  return finite;
}

template <typename T>
__device__ float first_bad(const uint4& chunk) {
  constexpr int kCount = Page<T>::kPerChunk;
  float numbers[kCount];
  unpack<T>(chunk, numbers);
  for (const float x : numbers) {
    if (!isfinite(x)) return x;
  }
  return 0;
}

// Grid: parts of pages, heads.
template <typename T>
__global__ void __launch_bounds__(256)
    fill_kernel(Fill fill, const uint4* k, const uint4* v, int tokens) {
  const int head = blockIdx.y, block = blockIdx.x / kParts, part = blockIdx.x % kParts;
  const Slots slots = slots_of(fill, head, block, tokens);
  if (part == 0 && threadIdx.x == 0 && fill.filled)
    fill.filled[block * gridDim.y + head] = slots.count > 0 ? slots.page : -1;
  if (slots.count <= 0) return;
  const Page<T> page = Page<T>::of(fill.layout, slots.page);
  const int chunks = fill.layout.head_dim / Page<T>::kPerChunk;
  for (int i = threadIdx.x; i < kRows * chunks; i += blockDim.x) {
    const int row = part * kRows + i / chunks, chunk = i % chunks;
    if (row < slots.slot) continue;
    const int from = row - slots.slot;
    const int64_t token = slots.token + min(from, slots.count - 1);
    const int64_t at = (token * gridDim.y + head) * chunks + chunk;
    const uint4 key = k[at];
    const uint4 value = from < slots.count ? v[at] : uint4{};
    page.key_chunk(row, chunk) = key;
    page.value_chunk(row, chunk) = value;
    if (fill.bad) {
      if (!is_finite<T>(key)) fill.bad[head] = first_bad<T>(key);
      if (!is_finite<T>(value)) fill.bad[gridDim.y + head] = first_bad<T>(value);
    }
  }
  const int row = part * kRows + threadIdx.x;
  if (threadIdx.x < kRows && row >= slots.slot)
    page.weights()[row] = row - slots.slot < slots.count ? 1.0F : 0.0F;
}

// Frames of the ring that the table shows.
__device__ int64_t ring_frames_read(const Table& table, int64_t held) {
  const int64_t in_ring = min(max(held - table.frames.sink, int64_t{0}), table.ring_frames);
  return min(in_ring, table.read_frames);
}

// One block.
__global__ void __launch_bounds__(1024) table_kernel(Table table) {
  __shared__ int begin[kMostHeads + 1];
  __shared__ int64_t shared_held;
  const int heads = table.layout.num_heads;
  const FrameRing& frames = table.frames;
  if (threadIdx.x == 0) {
    Counters& counters = *table.counters;
    if (table.joins > 0) {
      if (counters.held == 0) counters.first_frame = *table.clock;
      counters.held += table.joins;
    }
    shared_held = counters.held;
  }
  __syncthreads();
  const int64_t held = shared_held;
  const auto sink = static_cast<int>(table.is_ring ? min(held, int64_t{frames.sink}) : 0);
  const auto in_ring = static_cast<int>(ring_frames_read(table, held));
  const int sink_pages = table.shows_sink ? sink * frames.pages : 0;
  const int others =
      table.is_ring ? in_ring * frames.pages : static_cast<int>((held + kPageKeys - 1) / kPageKeys);
  const int fixed = table.work + sink_pages + others;
  const auto groups_of = [&](int head) { return table.num_groups ? table.num_groups[head] : 0; };
  const auto pages_for = [](int keys) { return (keys + kPageKeys - 1) / kPageKeys; };
  if (threadIdx.x == 0) {
    begin[0] = 0;
    for (int head = 0; head < heads; ++head)
      begin[head + 1] = begin[head] + fixed + pages_for(groups_of(head));
  }
  __syncthreads();
  for (int head = threadIdx.x; head <= heads; head += blockDim.x) table.begin[head] = begin[head];
  const int warps = blockDim.x / 32, lane = threadIdx.x % 32;
  for (int head = threadIdx.x / 32; head < heads; head += warps) {
    const int count = begin[head + 1] - begin[head];
    for (int i = lane; i < count; i += 32) {
      int page;
      int at = i;
      if (at < table.work) {
        page = table.layout.work(head, at);
      } else if ((at -= table.work) < sink_pages) {
        page = table.layout.history(head, at + (table.moved_sink < 0 ? 0 : table.moved_sink));
      } else if ((at -= sink_pages) < others) {
        if (table.is_ring) at = frames.page_of(held - 1 - at / frames.pages) + at % frames.pages;
        page = table.layout.history(head, at);
      } else {
        at -= others;
        page = table.pool + table.group_pages[head * table.most_group_pages + at];
      }
      table.pages[begin[head] + i] = page;
    }
  }
  if (!table.told) return;
  Told& told = *table.told;
  const int64_t frames_held = sink + min(max(held - frames.sink, int64_t{0}), table.ring_frames);
  const auto exact = static_cast<int>(table.is_ring ? frames_held * frames.tokens : held);
  for (int head = threadIdx.x; head < heads; head += blockDim.x) {
    told.entries()[head] = exact + groups_of(head);
    auto* bad = reinterpret_cast<float*>(told.entries() + heads);
    bad[head] = table.bad[head];
    bad[heads + head] = table.bad[heads + head];
  }
  if (threadIdx.x == 0) {
    const Counters& counters = *table.counters;
    const int64_t own =
        table.is_ring ? frames_held * frames.pages : (held + kPageKeys - 1) / kPageKeys;
    told.held = held;
    told.first_frame = counters.first_frame;
    told.merged = counters.merged;
    told.evicted = counters.evicted;
    told.pages = own * heads + (begin[heads] - fixed * heads);
    told.group_pages = table.pool_used ? *table.pool_used : 0;
    if (table.joins > 0) ++told.commits;
  }
}

// Grid: pages of the sink, heads; a thread a pair of channels of some rows.
template <typename T>
__global__ void __launch_bounds__(256)
    move_sink_kernel(Table table, int to, int pairs, const double* speeds) {
  __shared__ float cosines[128], sines[128];
  const FrameRing& frames = table.frames;
  const int64_t held = table.counters->held;
  const int64_t sink = min(held, int64_t{frames.sink});
  const int head = blockIdx.y;
  if (blockIdx.x >= sink * frames.pages) return;
  const int64_t moved_by =
      *table.clock - ring_frames_read(table, held) - sink - table.counters->first_frame;
  for (int i = threadIdx.x; i < pairs; i += blockDim.x) {
    double sine, cosine;
    sincos(static_cast<double>(moved_by) * speeds[i], &sine, &cosine);
    cosines[i] = static_cast<float>(cosine);
    sines[i] = static_cast<float>(sine);
  }
  __syncthreads();
  const Page<T> from = Page<T>::of(table.layout, table.layout.history(head, blockIdx.x));
  const Page<T> moved = Page<T>::of(table.layout, table.layout.history(head, to + blockIdx.x));
  constexpr int kCount = Page<T>::kPerChunk;
  const int chunks = table.layout.head_dim / kCount;
  for (int i = threadIdx.x; i < kPageKeys * chunks; i += blockDim.x) {
    const int row = i / chunks, chunk = i % chunks;
    float key[kCount];
    unpack<T>(from.key_chunk(row, chunk), key);
    for (int p = 0; p < kCount / 2; ++p) {
      const int pair = chunk * kCount / 2 + p;
      if (pair >= pairs) break;
      const float a = key[2 * p], b = key[2 * p + 1];
      key[2 * p] = a * cosines[pair] - b * sines[pair];
      key[2 * p + 1] = b * cosines[pair] + a * sines[pair];
    }
    moved.key_chunk(row, chunk) = pack<T>(key);
    moved.value_chunk(row, chunk) = from.value_chunk(row, chunk);
  }
  if (threadIdx.x < kPageKeys) moved.weights()[threadIdx.x] = from.weights()[threadIdx.x];
}

__global__ void keep_at_most_kernel(Counters* counters, int64_t most) {
  counters->held = min(counters->held, most);
}

}  // namespace

int fill_pages(const Fill& fill, int64_t tokens) {
  if (fill.place == FillPlace::kFrames)
    return static_cast<int>(tokens / fill.frames.tokens) * fill.frames.pages;
  const auto pages = static_cast<int>((tokens + kPageKeys - 1) / kPageKeys);
  return fill.place == FillPlace::kWork ? pages : pages + 1;
}

void fill(const Fill& fill, const void* k, const void* v, int64_t tokens, cudaStream_t stream) {
  if (tokens == 0) return;
  const dim3 grid(static_cast<unsigned>(fill_pages(fill, tokens) * kParts),
                  static_cast<unsigned>(fill.layout.num_heads));
  const auto kernel =
      fill.layout.format == PageFormat::kF32 ? fill_kernel<float> : fill_kernel<__nv_bfloat16>;
  kernel<<<grid, 256, 0, stream>>>(fill, static_cast<const uint4*>(k), static_cast<const uint4*>(v),
                                   static_cast<int>(tokens));
  check(cudaGetLastError(), "filling pages");
}

void write_table(const Table& table, cudaStream_t stream) {
  table_kernel<<<1, 1024, 0, stream>>>(table);
  check(cudaGetLastError(), "table of pages");
}

void move_sink(const Table& table, int to, int pairs, const double* speeds, cudaStream_t stream) {
  const int pages = table.frames.sink * table.frames.pages;
  if (pages == 0) return;
  const dim3 grid(static_cast<unsigned>(pages), static_cast<unsigned>(table.layout.num_heads));
  const auto kernel = table.layout.format == PageFormat::kF32 ? move_sink_kernel<float>
                                                              : move_sink_kernel<__nv_bfloat16>;
  kernel<<<grid, 256, 0, stream>>>(table, to, pairs, speeds);
  check(cudaGetLastError(), "moving the sink");
}

void keep_at_most(Counters* counters, int64_t most, cudaStream_t stream) {
  keep_at_most_kernel<<<1, 1, 0, stream>>>(counters, most);
  check(cudaGetLastError(), "forgetting a window");
}

}  // namespace longtake::cuda
