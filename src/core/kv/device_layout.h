// How the pages of one layer lie in the store of a CUDA cache, what its kernels count, and the two
// launches that all policies share: tokens into pages, and the tables of the pages that attention
// reads, of many layers at once. CUDA builds only.
//
//   store: [work: W pages of head 0, of head 1, ...]
//          [history page 0 of all heads, history page 1 of all heads, ...]
//          [pages of groups, taken by any head]
//
// so that a history that grows only grows at its end.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kv/device_pages.h"

namespace longtake::cuda {

struct PageLayout {
  PageFormat format = PageFormat::kBf16;  // or kF32
  int head_dim = 0;
  int num_heads = 0;
  int work_pages = 0;  // of a head
  unsigned char* store = nullptr;

  __host__ __device__ int work(int head, int page) const { return head * work_pages + page; }

  __host__ __device__ int history(int head, int page) const {
    return num_heads * (work_pages + page) + head;
  }

  size_t page_bytes() const { return paged_bytes(head_dim, format); }

  bool operator==(const PageLayout&) const = default;
};

// Frames that stay for ever, then a ring of the most recent ones; each has pages of its own, or
// those of the ring share them: what does not fill a frame's last page stands behind others' rests.
struct FrameRing {
  int sink = 0, ring = 0;     // frames
  int tokens = 0, pages = 0;  // of a frame that shares none
  int per_page = 0;           // frames of the ring whose last pages are one; 0: none are

  // Pages that a frame of the ring has to itself.
  __host__ __device__ int own_pages() const { return per_page > 0 ? pages - 1 : pages; }

  // Of `frames` of the ring.
  __host__ __device__ int shared_pages(int frames) const {
    return per_page > 0 ? (frames + per_page - 1) / per_page : 0;
  }

  int history_pages() const { return sink * pages + ring * own_pages() + shared_pages(ring); }

  // First history page of the frame that came `index`-th.
  __host__ __device__ int page_of(int64_t index) const {
    if (index < sink) return static_cast<int>(index) * pages;
    return sink * pages + place_of(index) * own_pages();
  }

  // Of a frame of a ring that shares pages: the last of its pages, and its first row there.
  __host__ __device__ int shared_page_of(int64_t index) const {
    return sink * pages + ring * own_pages() + place_of(index) / per_page;
  }

  __host__ __device__ int shared_row_of(int64_t index) const {
    return place_of(index) % per_page * (tokens - own_pages() * kPageKeys);
  }

  __host__ __device__ int place_of(int64_t index) const {
    return static_cast<int>((index - sink) % ring);
  }

  bool operator==(const FrameRing&) const = default;
};

// Of one layer, on the device.
struct Counters {
  int64_t held = 0;         // frames committed (full: tokens), those that a window forgot included
  int64_t first_frame = 0;  // of the sink
  int64_t merged = 0, evicted = 0;
  int64_t commits = 0;  // since the cache was made, reset or loaded
};

// What the host is told of one layer, in page-locked memory: this and, of every head, entries i32,
// then a key and a value f32 that were not finite, 0 if all were.
struct Told {
  int64_t commits;
  int64_t held, first_frame, merged, evicted;
  int64_t pages;        // of the history, all heads
  int64_t group_pages;  // taken from the pool

  __host__ __device__ int32_t* entries() { return reinterpret_cast<int32_t*>(this + 1); }
};

enum class FillPlace : uint8_t {
  kWork,    // the pages of the chunk in work
  kFrames,  // frames counters->held, counters->held + 1, ...
  kTokens   // behind counters->held tokens
};

// Of a pass's queries a policy looks at every stride-th.
inline constexpr int kSampledQueries = 32;      // about; as tempcache.cpp
inline constexpr int kMostSampledQueries = 64;  // of a chunk, or of a frame

__host__ __device__ constexpr int sampled_stride(int tokens) {
  return tokens < kSampledQueries ? 1 : tokens / kSampledQueries;
}

// What a policy takes of queries q [tokens, heads, D] in the pages' type while tokens are written
// into pages: rows of the whole chunk, kept as they are, or sums of rows of each frame.
struct Asked {
  const void* q = nullptr;  // null: nothing
  int tokens = 0;
  void* rows = nullptr;         // [kMostSampledQueries, heads, D]; null: sums are wanted
  int frames = 0;               // of the sums
  float* sums = nullptr;        // [frames, heads, D], which grow
  int32_t* num_rows = nullptr;  // [heads], which grow by the rows of a frame
};

struct Fill {
  PageLayout layout;
  FillPlace place = FillPlace::kWork;
  FrameRing frames;
  const Counters* counters = nullptr;
  float* bad = nullptr;       // [2, heads], of keys and values; null: numbers are not looked at
  int32_t* filled = nullptr;  // [fill_pages, heads]: pages written, -1: none; null: not wanted
  Asked asked;
};

// Pages of a head that fill_pages looks at.
int fill_pages(const Fill& fill, int64_t tokens);

// k, v [tokens, heads, D] into pages, with weight 1; `asked` is seen to in the same launch.
void fill(const Fill& fill, const void* k, const void* v, int64_t tokens, cudaStream_t stream);

// What the table shows, in this order: the chunk in work, the sink, the ring's frames from the
// newest on (or a plain history), groups.
struct Table {
  PageLayout layout;
  int work = 0;         // pages of a head in work that are shown
  bool is_ring = true;  // false: pages of held tokens
  FrameRing frames;
  int64_t ring_frames = 0;  // most frames of the ring that are history
  int64_t read_frames = 0;  // most of them that are shown
  bool shows_sink = true;
  int moved_sink = -1;  // the history page from which on the moved sink stands; -1: it is not moved
  // Groups of every head and the pages they lie in, [heads, most_group_pages], counted from the
  // pool's first; null: none.
  const int32_t* num_groups = nullptr;
  const int32_t* group_pages = nullptr;
  int most_group_pages = 0;
  int pool = 0;  // first page of the pool
  // A commit's: so much joins counters->held first, and the host is told.
  int64_t joins = 0;
  const int64_t* clock = nullptr;
  Counters* counters = nullptr;
  Told* told = nullptr;  // null: not
  const float* bad = nullptr;
  const int32_t* pool_used = nullptr;
  // Out: as HeadPages.
  int32_t* begin = nullptr;
  int32_t* pages = nullptr;

  bool operator==(const Table&) const = default;
};

inline constexpr int kMostHeads = 1024;

void write_table(const Table& table, cudaStream_t stream);
// tables [count] on the device.
void write_tables(const Table* tables, int count, cudaStream_t stream);

// Copies of the sink's pages, from history page `to` on, with keys turned so that the sink stands
// just before the frames that table shows of the ring, which end before *clock: pair i < pairs by
// frames * speeds[i], f64 on the device.
void move_sink(const Table& table, int to, int pairs, const double* speeds, cudaStream_t stream);

// counters->held becomes `most` if it is more.
void keep_at_most(Counters* counters, int64_t most, cudaStream_t stream);

}  // namespace longtake::cuda
