#include "kv/device_layout.h"

#include <cmath>

#include "kv/block_scan.cuh"
#include "kv/device_layout.cuh"

namespace longtake::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kParts = 4;  // blocks that share a page: a small chunk has few pages
constexpr int kRows = kPageKeys / kParts;

// Slots [slot, slot + count) of a page get tokens [token, token + count), and those up to `end`
// repeat the last one.
struct Slots {
  int page, slot, token, count, end;
};

// Of the frame that came `index`-th, the rest behind its own pages; `next`: behind the last frame
// of the chunk. What no frame has stood in yet is left to the frame before it.
__device__ Slots shared_slots_of(const FrameRing& frames, int64_t index, int64_t next) {
  const int place = frames.place_of(index), first = frames.own_pages() * kPageKeys;
  const int slot = frames.shared_row_of(index), count = frames.tokens - first;
  const bool is_last = place + 1 == frames.ring || (place + 1) % frames.per_page == 0;
  const bool is_behind = index + 1 < next || index + 1 - frames.ring >= frames.sink;
  const int end = is_last || !is_behind ? kPageKeys : slot + count;
  return {frames.shared_page_of(index), slot, first, count, end};
}

__device__ Slots slots_of(const Fill& fill, int head, int block, int tokens) {
  const FrameRing& frames = fill.frames;
  if (fill.place == FillPlace::kWork) {
    const int token = block * kPageKeys;
    return {fill.layout.work(head, block), 0, token, min(kPageKeys, tokens - token), kPageKeys};
  }
  const int64_t held = fill.counters->held;
  if (fill.place == FillPlace::kTokens) {
    const int before = static_cast<int>(held % kPageKeys);
    const int slot = block == 0 ? before : 0;
    const int token = block == 0 ? 0 : block * kPageKeys - before;
    const auto page = static_cast<int>(held / kPageKeys) + block;
    return {fill.layout.history(head, page), slot, token, min(kPageKeys - slot, tokens - token),
            kPageKeys};
  }
  const int frame = block / frames.pages, part = block % frames.pages;
  const int64_t index = held + frame;
  const int in_frame = part * kPageKeys;
  const int count = min(kPageKeys, frames.tokens - in_frame);
  // A frame of the chunk that a later one displaces is not written: two would write one place.
  const int64_t next = held + tokens / frames.tokens;
  if (index >= frames.sink && index + frames.ring < next) return {0, 0, 0, 0, 0};
  if (index >= frames.sink && part == frames.own_pages()) {
    Slots slots = shared_slots_of(frames, index, next);
    slots.page = fill.layout.history(head, slots.page);
    slots.token += frame * frames.tokens;
    return slots;
  }
  return {fill.layout.history(head, frames.page_of(index) + part), 0,
          frame * frames.tokens + in_frame, count, kPageKeys};
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

// Rows of the queries, as they are. One block a head.
template <typename T>
__device__ void keep_rows(const Asked& asked, int head, int heads, int chunks) {
  const int stride = sampled_stride(asked.tokens);
  const int count = (asked.tokens + stride - 1) / stride;
  const auto* q = static_cast<const uint4*>(asked.q);
  auto* rows = static_cast<uint4*>(asked.rows);
  for (int i = threadIdx.x; i < count * chunks; i += blockDim.x) {
    const int row = i / chunks, chunk = i % chunks;
    // The place in the stride changes from row to row, so that every column is looked at.
    const int64_t token = min(row * stride + row / 4 % stride, asked.tokens - 1);
    rows[(static_cast<int64_t>(row) * heads + head) * chunks + chunk] =
        q[(token * heads + head) * chunks + chunk];
  }
}

// Sums of a frame's rows, one block a head and frame: by turns of the rows, then all turns in
// order.
template <typename T>
__device__ void sum_rows(const Asked& asked, int frame, int head, int heads, int chunks) {
  constexpr int kCount = Page<T>::kPerChunk;
  __shared__ float sums[kThreads * kCount];  // [turns, D]
  const int tokens = asked.tokens / asked.frames, stride = sampled_stride(tokens);
  const int first = stride / 2, count = (tokens - first + stride - 1) / stride;
  const int turns = kThreads / chunks, turn = threadIdx.x / chunks, chunk = threadIdx.x % chunks;
  const int head_dim = chunks * kCount;
  const auto* q = static_cast<const uint4*>(asked.q);
  float sum[kCount] = {};
  for (int row = turn; row < count; row += turns) {
    const int64_t token = static_cast<int64_t>(frame) * tokens + first + row * stride;
    float x[kCount];
    unpack<T>(q[(token * heads + head) * chunks + chunk], x);
    for (int n = 0; n < kCount; ++n) sum[n] += x[n];
  }
  for (int n = 0; n < kCount; ++n) sums[turn * head_dim + chunk * kCount + n] = sum[n];
  __syncthreads();
  for (int channel = threadIdx.x; channel < head_dim; channel += blockDim.x) {
    float total = 0;
    for (int i = 0; i < turns; ++i) total += sums[i * head_dim + channel];
    asked.sums[(static_cast<int64_t>(frame) * heads + head) * head_dim + channel] += total;
  }
  if (frame == 0 && threadIdx.x == 0) asked.num_rows[head] += count;
}

// Grid: parts of pages, then what is asked of the queries; heads.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    fill_kernel(Fill fill, const uint4* k, const uint4* v, int tokens, int parts) {
  const int head = blockIdx.y, block = blockIdx.x / kParts, part = blockIdx.x % kParts;
  const int chunks = fill.layout.head_dim / Page<T>::kPerChunk;
  if (static_cast<int>(blockIdx.x) >= parts) {
    if (fill.asked.rows)
      keep_rows<T>(fill.asked, head, gridDim.y, chunks);
    else
      sum_rows<T>(fill.asked, blockIdx.x - parts, head, gridDim.y, chunks);
    return;
  }
  const Slots slots = slots_of(fill, head, block, tokens);
  if (part == 0 && threadIdx.x == 0 && fill.filled)
    fill.filled[block * gridDim.y + head] = slots.count > 0 ? slots.page : -1;
  if (slots.count <= 0) return;
  const Page<T> page = Page<T>::of(fill.layout, slots.page);
  for (int i = threadIdx.x; i < kRows * chunks; i += blockDim.x) {
    const int row = part * kRows + i / chunks, chunk = i % chunks;
    if (row < slots.slot || row >= slots.end) continue;
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
  if (threadIdx.x < kRows && row >= slots.slot && row < slots.end)
    page.weights()[row] = row - slots.slot < slots.count ? 1.0F : 0.0F;
}

// Frames of the ring that the table shows.
__device__ int64_t ring_frames_read(const Table& table, int64_t held) {
  const int64_t in_ring = min(max(held - table.frames.sink, int64_t{0}), table.ring_frames);
  return min(in_ring, table.read_frames);
}

// One block.
__device__ void write_one(const Table& table) {
  __shared__ int begin[kMostHeads + 1];
  __shared__ int64_t shared_held;
  const int heads = table.layout.num_heads;
  const FrameRing& frames = table.frames;
  if (threadIdx.x == 0) {
    Counters& counters = *table.counters;
    if (table.joins > 0) {
      if (counters.held == 0) counters.first_frame = *table.clock;
      counters.held += table.joins;
      ++counters.commits;
    }
    shared_held = counters.held;
  }
  const auto groups_of = [&](int head) { return table.num_groups ? table.num_groups[head] : 0; };
  const auto pages_for = [](int keys) { return (keys + kPageKeys - 1) / kPageKeys; };
  const int own_head = threadIdx.x;
  const int own_groups = own_head < heads ? groups_of(own_head) : 0;
  __syncthreads();
  const int64_t held = shared_held;
  const auto sink = static_cast<int>(table.is_ring ? min(held, int64_t{frames.sink}) : 0);
  const auto in_ring = static_cast<int>(ring_frames_read(table, held));
  const int sink_pages = table.shows_sink ? sink * frames.pages : 0;
  const int own_pages = in_ring * frames.own_pages();
  const int others = table.is_ring ? own_pages + frames.shared_pages(in_ring)
                                   : static_cast<int>((held + kPageKeys - 1) / kPageKeys);
  const int fixed = table.work + sink_pages + others;
  const Scan scan = block_scan(own_head < heads ? fixed + pages_for(own_groups) : 0);
  if (own_head <= heads) {
    const int own_begin = own_head < heads ? scan.before : scan.total;
    begin[own_head] = own_begin;
    table.begin[own_head] = own_begin;
  }
  if (own_head == 0 && heads == kMostHeads) {
    begin[heads] = scan.total;
    table.begin[heads] = scan.total;
  }
  __syncthreads();
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
        if (table.is_ring && at < own_pages) {
          const int each = frames.own_pages();
          at = frames.page_of(held - 1 - at / each) + at % each;
        } else if (table.is_ring) {
          at = frames.shared_page_of(frames.sink) + at - own_pages;
        }
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
  const int64_t ring_held = min(max(held - frames.sink, int64_t{0}), table.ring_frames);
  const int64_t frames_held = sink + ring_held;
  const auto exact = static_cast<int>(table.is_ring ? frames_held * frames.tokens : held);
  if (own_head < heads) {
    told.entries()[own_head] = exact + own_groups;
    auto* bad = reinterpret_cast<float*>(told.entries() + heads);
    bad[own_head] = table.bad[own_head];
    bad[heads + own_head] = table.bad[heads + own_head];
  }
  if (threadIdx.x == 0) {
    const Counters& counters = *table.counters;
    const int64_t own = table.is_ring ? sink * frames.pages + ring_held * frames.own_pages() +
                                            frames.shared_pages(static_cast<int>(ring_held))
                                      : (held + kPageKeys - 1) / kPageKeys;
    told.commits = counters.commits;
    told.held = held;
    told.first_frame = counters.first_frame;
    told.merged = counters.merged;
    told.evicted = counters.evicted;
    told.pages = own * heads + (begin[heads] - fixed * heads);
    told.group_pages = table.pool_used ? *table.pool_used : 0;
  }
}

__global__ void __launch_bounds__(kScanned) table_kernel(Table table) {
  write_one(table);
}

__global__ void __launch_bounds__(kScanned) tables_kernel(const Table* tables) {
  write_one(tables[blockIdx.x]);
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
  const int parts = tokens == 0 ? 0 : fill_pages(fill, tokens) * kParts;
  const int asked = fill.asked.q == nullptr ? 0 : fill.asked.rows ? 1 : fill.asked.frames;
  if (parts + asked == 0) return;
  const dim3 grid(static_cast<unsigned>(parts + asked),
                  static_cast<unsigned>(fill.layout.num_heads));
  const auto kernel =
      fill.layout.format == PageFormat::kF32 ? fill_kernel<float> : fill_kernel<__nv_bfloat16>;
  kernel<<<grid, kThreads, 0, stream>>>(fill, static_cast<const uint4*>(k),
                                        static_cast<const uint4*>(v), static_cast<int>(tokens),
                                        parts);
  check(cudaGetLastError(), "filling pages");
}

void write_table(const Table& table, cudaStream_t stream) {
  table_kernel<<<1, kScanned, 0, stream>>>(table);
  check(cudaGetLastError(), "table of pages");
}

void write_tables(const Table* tables, int count, cudaStream_t stream) {
  tables_kernel<<<static_cast<unsigned>(count), kScanned, 0, stream>>>(tables);
  check(cudaGetLastError(), "tables of pages");
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
