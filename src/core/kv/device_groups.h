// The groups of merged keys of layers' heads on the GPU, and the launches of one frame's merge.
// tempcache.h says what the options mean, tempcache.cpp what the policy is; this does the same with
// all heads of all layers in one launch. CUDA builds only.
//
// What is known of a group lies in rows: row = page * 128 + slot, `page` of a pool that a layer's
// heads share and from which each takes what it needs; so does the page that attention sees. Of a
// frame that leaves the exact ones:
//
//   begin     what queries were seen; (seldom) the metric becomes that of all of them so far
//   map       keys lose their temporal rotation, are mapped and get codes; (seldom) groups, too
//   search    codes of keys against codes of groups, as products of 8-bit matrices; the few that
//             look nearest, exactly
//   pair      pairs from the nearest on; what goes over the budget
//   merge     keys join their groups; these are mapped and coded anew
//   settle    groups over the budget go, keys without a partner start groups; where they are many,
//             in a launch of its own
//
// and once a commit
//
//   show      biases; pages of groups that changed are written from their masters in f32
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kv/device_layout.h"
#include "kv/tempcache.h"

namespace longtake::cuda {

inline constexpr int kCandidates = 8;      // of a key
inline constexpr int kSigns = 48;          // of a code by hashing
inline constexpr int kSeen = 8;            // sightings of a group
inline constexpr int kMostAges = 1 << 13;  // that biases tell apart
inline constexpr int kMostPairs = 64;

// Frames in a row at which members were seen; as Sighting of tempcache_groups.h.
struct Seen {
  int32_t first, last, count;
};

// Means of members, [rows, D]. Beside pages in f32 they are f32; beside pages in bf16 they have 24
// bits, the upper 16 and the lower 8 of them apart: what a mean is off by then, after hundreds of
// members, does not show in a page.
struct Vectors {
  void* high = nullptr;
  uint8_t* low = nullptr;  // null: f32

  bool operator==(const Vectors&) const = default;
};

// Of one layer. All pointers on the device; H heads, D channels, T tokens of a frame, F frames of a
// chunk.
struct Groups {
  PageLayout layout;
  FrameRing frames;  // the ring holds the exact frames and a chunk
  int pool = 0;      // the store's page that is the pool's page 0
  int exact_frames = 0;
  int chunk_frames = 0;  // that are committed now
  int later_frames = 0;  // at most in the next commit
  int64_t offset = 0;    // of their first frame from *clock
  bool takes_reads = true;
  int asked_tokens = 0;  // of which `asked` are some
  Counters* counters = nullptr;
  const int64_t* clock = nullptr;
  int64_t* ring_frames = nullptr;  // [ring]: their numbers

  // Options.
  MergeRule rule = MergeRule::kNats;
  GroupKey key = GroupKey::kMean;
  GroupBias bias = GroupBias::kAges;
  AnnEngine ann = AnnEngine::kLsh;
  float most_square = 0;
  float most_error = 0;               // max_error sqrt(D); 0: not asked for
  int capacity = 0;                   // groups of a head; 0: no budget
  bool shares = false;                // of all heads together
  int pairs = 0;                      // of the temporal rotation
  const double* speeds = nullptr;     // [pairs]
  const float* phases = nullptr;      // [kMostAges, 2 pairs]: cosines, then sines
  const float* directions = nullptr;  // [D, kSigns]

  // Groups.
  int32_t* sizes = nullptr;  // [H]
  int32_t* owned = nullptr;  // [H]: pages taken
  int32_t* pages = nullptr;  // [H, most_pages]
  int most_pages = 0;
  Vectors keys, values;                         // keys without the temporal rotation
  void* mapped = nullptr;                       // [rows, D]: f32, beside pages in bf16 f16
  int8_t* codes = nullptr;                      // [rows, code_bytes()]
  float *scales = nullptr, *squares = nullptr;  // [rows]: of quantised codes; null: codes are signs
  float2* inverses = nullptr;                   // [rows]: inverse_of() them
  int32_t *counts = nullptr, *newest = nullptr;
  float* radii = nullptr;
  Seen* seen = nullptr;                  // [rows, kSeen]
  uint8_t* stale = nullptr;              // [rows]: the page does not show the master yet
  unsigned long long* claims = nullptr;  // [rows]: ~0 between launches
  int32_t* free_pages = nullptr;         // a stack of those that nobody owns
  int32_t* num_free = nullptr;
  int32_t* pool_used = nullptr;
  int32_t* shown =
      nullptr;  // [H, most_pages]: the store's pages that show groups; null: not wanted

  // Metric.
  void* asked = nullptr;             // [kMostSampledQueries, H, D]: queries of this commit
  double* moments = nullptr;         // [H, D, D]
  int64_t* num_queries = nullptr;    // [H]
  float* maps = nullptr;             // [H, D, D]
  float* centres = nullptr;          // [H, D]
  int32_t* longest_query = nullptr;  // bits of a float

  // Queries of the passes that read.
  float* read_sums = nullptr;          // [F, H, D]
  int32_t* num_read = nullptr;         // [H]
  int32_t* num_chunks_read = nullptr;  // [H]
  float* readers = nullptr;            // [H, D]

  // Of the frame in work.
  float* new_keys = nullptr;   // [H, T, D]
  void* new_mapped = nullptr;  // [H, T, D], as mapped
  int8_t* new_codes = nullptr;
  float *new_scales = nullptr, *new_squares = nullptr;
  int32_t* candidates = nullptr;  // [H, T, kCandidates], from the nearest on
  float* distances = nullptr;     // [H, T, kCandidates], squared; infinite: none
  int32_t* joins = nullptr;       // [H, T]: group or -1
  int32_t* order = nullptr;       // [H, T]: keys that join none, and from the end those that do
  int32_t* num_new = nullptr;     // [H]: of the former
  // What leaves: of a head all below an order, and so many of those at it.
  unsigned long long* cuts = nullptr;            // [H]
  int32_t* cut_ties = nullptr;                   // [H]
  int32_t* num_gone = nullptr;                   // [H]
  int32_t *leaving = nullptr, *tails = nullptr;  // [H, most_leaving()]
  // Of the last groups, as many as go: the group whose place each takes; -1: it goes itself.
  int32_t* destinations = nullptr;  // [H, most_leaving()]

  __host__ __device__ static int code_bytes_of(AnnEngine ann, int head_dim) {
    return ann == AnnEngine::kLsh ? 64 : head_dim;
  }

  __host__ __device__ int most_leaving() const {
    return frames.tokens * (shares ? layout.num_heads : 1);
  }

  // Whether heads take pages from the pool as they need them; else each has its own for ever.
  __host__ __device__ bool takes_pages() const { return capacity == 0 || shares; }

  bool operator==(const Groups&) const = default;
};

// The layers of one commit: alike in format, channels, heads, tokens of a frame and engine.
struct GroupBatch {
  const Groups* layers = nullptr;  // on the device
  const Groups* host = nullptr;    // the same on the host
  int count = 0;
};

// The whole merge.
void merge_frames(const GroupBatch& batch, cudaStream_t stream);

// Its launches, one after the other for every frame of the chunk: the `step`-th has been written
// and displaces one. show_groups and share_pages once, behind them.
void begin_merge(const GroupBatch& batch, int step, cudaStream_t stream);
void map_keys(const GroupBatch& batch, int step, cudaStream_t stream);
void search_groups(const GroupBatch& batch, int step, cudaStream_t stream);
void pair_keys(const GroupBatch& batch, int step, cudaStream_t stream);
void join_groups(const GroupBatch& batch, int step, cudaStream_t stream);
void map_joined(const GroupBatch& batch, int step, cudaStream_t stream);
void settle_groups(const GroupBatch& batch, int step, cudaStream_t stream);
void show_groups(const GroupBatch& batch, cudaStream_t stream);
// Heads that share a pool take the pages that the next chunk can fill, and give back others.
void share_pages(const GroupBatch& batch, cudaStream_t stream);

// Groups are as after load(): mapped and coded by the metric that is there.
void remap_groups(const GroupBatch& batch, cudaStream_t stream);

}  // namespace longtake::cuda
