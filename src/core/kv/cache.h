// KvCache: the keys and values that one layer remembers. A policy decides what stays of every
// committed chunk: on the CPU one file each (full.cpp, window.cpp, tempcache.cpp, flowcache.cpp)
// over host_cache.h, on CUDA over device_cache.h.
//
// On CUDA all of it is only enqueued, and what is enqueued between two calls of prepare_chunk may
// be recorded and replayed (device/graph.h): frames are counted on the device, and which frame it
// is says CacheOptions::clock. Numbers that the cache tells (entries() and the like) are those of
// the last commit once the caller has synchronised.
#pragma once

#include <cstddef>
#include <cstdint>
#include <iosfwd>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/dtype.h"
#include "device/context.h"
#include "kv/page.h"
#include "kv/tempcache.h"
#include "tensor/tensor.h"

namespace longtake {

// Where a chunk stands in the video, in latent frames.
struct ChunkPosition {
  int64_t first_frame = 0;
  int64_t num_frames = 1;
};

// What a pass may read of the history, in a policy that keeps frames apart.
struct HistoryReading {
  enum class Sink : uint8_t {
    kInPlace,       // read where its frames were committed
    kBeforeWindow,  // read as if it stood just before the oldest window frame that is read
    kHidden         // not read
  };

  Sink sink = Sink::kInPlace;
  int64_t window_frames = std::numeric_limits<int64_t>::max();  // most recent ones behind the sink
  // For kBeforeWindow: the first frame of the chunk in work, which follows the window (on CUDA the
  // clock says it), and the temporal rotation of the keys.
  int64_t next_frame = 0;
  int64_t time_pairs = 0;
  double time_theta = 10000;

  bool is_everything() const {
    return sink == Sink::kInPlace && window_frames == std::numeric_limits<int64_t>::max();
  }
};

class CommitBatch;  // kv/device_commit_batch.h

namespace cuda {
struct PageLayout;  // kv/device_layout.h
}

struct CacheOptions {
  std::string memory = "full";  // policy: "full" | "window" | "tempcache" | "flowcache"
  int64_t sink_frames = 1;      // window, tempcache: first frames, kept for ever
  int64_t window_frames = 36;   // window: most recent frames kept beside the sink
  int64_t reserve_tokens = 0;   // full: history tokens that need no growth
  int64_t budget_tokens = 0;    // flowcache: most keys per head
  DType dtype = DType::kBF16;
  int64_t num_heads = 0;
  int64_t head_dim = 0;
  int64_t tokens_per_frame = 0;
  int64_t layer = -1;  // named by errors; -1: unknown
  // tempcache: of its budget, as far as it is more than the least that works, this layer gets
  // layer_shares[layer] times an equal share. Empty, or layer unknown: 1. Their mean should be 1.
  std::vector<double> layer_shares;
  // CUDA: i64 [1] on the device, the first latent frame of the chunk in work; and how many frames
  // are committed together.
  View clock;
  int64_t chunk_frames = 1;
  // CUDA: what a commit has to do besides storing the chunk waits there until join_commits(), and
  // is done for all that wait in one set of launches; for the layers of one model, which are alike.
  // Null: it does not wait.
  std::shared_ptr<CommitBatch> batch;
  bool page_summaries = false;  // CUDA: keep what AnnSA chooses pages by
  // CUDA, window: no pass reads a part of what is kept (set_reading()), so that frames may share
  // pages.
  bool reads_whole = false;
  TempCacheOptions tempcache;
};

// Keys of all heads that a policy no longer keeps one by one, since the cache was made or reset.
struct MergeCounts {
  int64_t merged = 0;   // joined another key
  int64_t evicted = 0;  // keys forgotten over a budget, each of which may have stood for several
};

class KvCache {
 public:
  virtual ~KvCache() = default;
  KvCache(const KvCache&) = delete;
  KvCache& operator=(const KvCache&) = delete;

  // Makes room for one chunk more, outside of anything that is recorded. True: what view() shows
  // lies elsewhere now, and records made before are no longer good.
  virtual bool prepare_chunk(Context&) { return false; }

  // The same for so many frames, which are committed together or one by one: before a prompt's
  // switch computes the history anew.
  virtual bool prepare_frames(Context&, int64_t /*num_frames*/) { return false; }

  // What the tokens of the chunk in work are assigned to, [L]; of the next set_current and commit.
  // Empty, as at first: nothing.
  virtual void set_buckets(std::span<const Bucket> buckets) = 0;

  // Sets the keys and values of the chunk in work: k, v [L, N, D] in the cache's dtype, keys
  // already rotated. Replaced by the next call, forgotten by commit and reset; never part of the
  // history.
  virtual void set_current(Context& ctx, View k, View v) = 0;

  // The clean chunk joins the history; the policy decides what stays. k, v as above. Throws Error
  // for numbers that are not finite, naming layer and head, and then nothing has changed; on CUDA
  // expect_finite() throws it.
  virtual void commit(Context& ctx, View k, View v, ChunkPosition position) = 0;

  // With CacheOptions::batch: enqueues what its commits have to do, if this one's is among them.
  // Before anything that needs it is enqueued, before a record ends and before the host
  // synchronises.
  virtual void join_commits() {}

  // Throws Error if a commit met numbers that are not finite, naming layer and head. After the
  // caller has synchronised.
  virtual void expect_finite() const {}

  // A policy that measures keys by the queries that read them is shown those of every clean chunk,
  // before its commit: q [L, N, D], rotated.
  virtual bool wants_queries() const { return false; }

  virtual void observe_queries(Context&, View, ChunkPosition) {}

  // And the queries of passes that only read, before the commit of their chunk: q [L, N, D],
  // rotated.
  virtual void observe_reads(Context&, View) {}

  // The same in fewer launches: of a pass that only reads, and of one that commits.
  virtual void read_chunk(Context& ctx, View q, View k, View v) {
    observe_reads(ctx, q);
    set_current(ctx, k, v);
  }

  // On CUDA: the pages in which keys and values of a chunk of so many tokens are while it is in
  // work, for a launch that writes them there by itself, and of its weights 1; read_written() then
  // takes the place of read_chunk(), and without q that of set_current(). Null: there are none
  // such.
  virtual const cuda::PageLayout* work_pages(int64_t /*tokens*/) { return nullptr; }

  // q stays as it is until join_branch() (device/branch.h).
  virtual void read_written(Context&, View /*q*/, int64_t /*tokens*/) {}

  virtual void commit_chunk(Context& ctx, View q, View k, View v, ChunkPosition position) {
    if (wants_queries()) observe_queries(ctx, q, position);
    commit(ctx, k, v, position);
  }

  // Forgets everything; keeps the memory.
  virtual void reset() = 0;

  // Forgets the history except a sink, in a policy that has one.
  virtual void forget_window() { reset(); }

  // Limits what view() shows of the history, until the next call, commit or reset. Throws
  // Error(kUsage) if the policy does not keep frames apart and the reading is not everything.
  virtual void set_reading(Context& ctx, const HistoryReading& reading) = 0;

  // History, as far as it may be read, and the chunk in work; valid until the next call that
  // changes the cache.
  virtual KvView view() const = 0;

  // Pages of a head's list that are history.
  virtual int64_t num_history_pages(int64_t head) const = 0;

  virtual int64_t entries() const = 0;        // keys in the history, largest head
  virtual int64_t total_entries() const = 0;  // keys in the history, all heads

  virtual MergeCounts merge_counts() const { return {}; }

  // For measurements: which entry of the head's history (slots in list order) stands for each of
  // the num_committed keys so far, in the order of their commits; -1: none does. A policy that
  // merges knows it only if trace_members was called while it was empty.
  virtual void trace_members() {}

  virtual std::vector<int32_t> members(int64_t head, int64_t num_committed) const = 0;

  // Whether attention over the history is within bound_log_mass of that over all keys committed:
  // nothing was forgotten.
  virtual bool is_bounded() const { return false; }

  // What one query can have got from the keys that an entry stands for. q [D], rotated, asks at
  // `frame`; low, high [entries of the head]: logits of the entries, bias included, which become
  // the least and the greatest log sum_i exp(q . k_i / sqrt(D)).
  virtual void bound_log_mass(int64_t /*head*/, const float* /*q*/, int64_t /*frame*/,
                              double* /*low*/, double* /*high*/) const {}

  virtual size_t bytes() const = 0;       // reserved
  virtual size_t bytes_used() const = 0;  // pages of the history

  // How often the store grew. `full` grows as the video does; a steady step of `window` never.
  virtual size_t num_growths() const = 0;

  // The history as bytes. load replaces the history; it throws Error(kInput) on a state of another
  // shape or policy or a short stream, and then the cache is empty.
  virtual void save(std::ostream& out) const = 0;
  virtual void load(std::istream& in) = 0;

 protected:
  KvCache() = default;
};

// Null on the CPU, where a commit is done at once.
std::shared_ptr<CommitBatch> make_commit_batch(Context& ctx);

// By ctx.device() and options.memory. Throws Error(kUsage) for an unknown policy or impossible
// sizes.
std::unique_ptr<KvCache> make_cache(Context& ctx, const CacheOptions& options);

// The least budget of tempcache: sink and exact frames and one more, in keys per head.
int64_t least_tempcache_budget(const CacheOptions& options);

// Throws Error(kUsage) for sizes and options.tempcache that make no sense together.
void check_tempcache(const CacheOptions& options);

}  // namespace longtake
