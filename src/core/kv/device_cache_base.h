// DeviceCache: what the policies of CUDA devices share: one store of pages, the pages of the chunk
// in work, the table that attention reads, and what the host is told. CUDA builds only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <iosfwd>
#include <memory>
#include <span>
#include <vector>

#include "device/buffer.h"
#include "device/cuda_check.h"
#include "device/cuda_runtime.h"
#include "kv/cache.h"
#include "kv/device_commit_batch.h"
#include "kv/device_layout.h"

namespace longtake::cuda {

// Pages that have room in a store: of a head in work and in the history, and those that heads
// share.
struct Room {
  int work = 0, history = 0, pool = 0;
};

// Keys of a head that start a page of their own in a saved state, in its order.
struct KeyRun {
  int64_t keys = 0;
  std::vector<int32_t> pages;  // of the store
  std::vector<float> values;   // [keys, D] before they were weighted; empty: those of the pages
  bool shares_last = false;    // the last page, with other runs
  int last_row = 0;            // where the run's keys begin there

  int32_t page_of(int64_t key) const { return pages[static_cast<size_t>(key / kPageKeys)]; }

  bool is_shared(int64_t key) const { return shares_last && page_of(key) == pages.back(); }

  int row_of(int64_t key) const {
    return static_cast<int>(key % kPageKeys) + (is_shared(key) ? last_row : 0);
  }
};

class DeviceCache : public KvCache {
 public:
  bool prepare_chunk(Context& ctx) override { return prepare_frames(ctx, options_.chunk_frames); }

  void set_buckets(std::span<const Bucket> buckets) override;
  void set_current(Context& ctx, View k, View v) override;
  const PageLayout* work_pages(int64_t tokens) override;
  void read_written(Context& ctx, View q, int64_t tokens) override;
  void expect_finite() const override;
  void reset() override;
  void set_reading(Context& ctx, const HistoryReading& reading) override;
  KvView view() const override;
  int64_t num_history_pages(int64_t head) const override;
  int64_t entries() const override;
  int64_t total_entries() const override;

  MergeCounts merge_counts() const override { return {told().merged, told().evicted}; }

  size_t bytes() const override { return store_.size(); }

  size_t bytes_used() const override;

  size_t num_growths() const override { return num_growths_; }

  void save(std::ostream& out) const override;
  void load(std::istream& in) override;

 protected:
  // A policy's constructor calls allocate() and then reset().
  DeviceCache(Context& ctx, const CacheOptions& options, const FrameRing& frames);

  // Adds what the policy shows behind frames_: groups, or tokens in its place.
  virtual void describe(Table& table) const = 0;

  // What a saved state says (device_cache_state.cpp). read_policy takes over the policy's own
  // numbers, what follows the pages and, of every head, how many keys these hold; false: it makes
  // no sense. Then runs() says where they go.
  virtual std::vector<int64_t> policy_state() const = 0;
  virtual std::vector<KeyRun> runs(int head) const = 0;
  virtual bool read_policy(std::istream& in, const std::vector<int64_t>& state,
                           const std::vector<int64_t>& keys) = 0;

  virtual void write_policy(std::ostream&) const {}

  // Frames of the sink, or of the `ring_frames` behind it that `held` frames leave.
  std::vector<KeyRun> frame_runs(int head, int64_t held, int64_t ring_frames, bool sink) const;

  // members() of a policy that keeps frames: of `held` ones the sink and the `ring_frames` newest,
  // in the order in which the table shows them.
  std::vector<int32_t> frame_members(int64_t held, int64_t ring_frames,
                                     int64_t num_committed) const;

  // Moves into a store of that size, in which all that was kept stays. Not while recording.
  void allocate(const Room& room);

  void check_tokens(const char* what, View k, View v) const;
  void check_frames(const char* what, View x, ChunkPosition position) const;

  // As set_current and, in the same launch, what is asked of the pass's queries.
  void write_current(View k, View v, const Asked& asked);

  // The tokens become part of the history: place kFrames or kTokens. finish() counts them.
  void append(FillPlace place, View k, View v, const Asked& asked = {});
  // The last of a commit of `joins` frames or tokens, in the batch.
  void finish(int64_t joins);

  // The page's summaries are made anew; numbers below 0 are none. With the batch, or at once.
  void summarise_later(const int32_t* pages, int count);
  void summarise(const int32_t* pages, int count);
  void summarise_all();

  Counters read_counters() const;
  void write_counters(const Counters& counters);

  PageLayout layout() const;

  Told& told() const { return *reinterpret_cast<Told*>(told_.data()); }

  void join_commits() override {
    if (waits_for_ == batch_->round()) batch_->run();
  }

  Runtime& runtime() const { return runtime_; }

  cudaStream_t stream() const { return runtime_.stream(); }

  // Pages of a head that `tokens` fill.
  static int pages_for(int64_t tokens) {
    return static_cast<int>((tokens + kPageKeys - 1) / kPageKeys);
  }

  // Room for `wanted`, by doublings of what there is: how attention shares out its work depends on
  // rooms, and a session that is loaded is to play the bits of the one that was saved.
  static int doubled(int room, int64_t wanted) {
    int64_t more = std::max(room, 1);
    while (more < wanted) more *= 2;
    return static_cast<int>(more);
  }

  const CacheOptions options_;
  const FrameRing frames_;
  Room room_;
  DeviceArray<Counters> counters_;
  HistoryReading reading_;
  const std::shared_ptr<CommitBatch> batch_;  // of the options, or its own

 private:
  Table table_of(int work_pages, const DeviceArray<int32_t>& begin,
                 const DeviceArray<int32_t>& pages) const;
  void write_shown() const;

  int usual_work() const { return pages_for(options_.chunk_frames * options_.tokens_per_frame); }

  Device device_;
  Runtime& runtime_;
  DeviceArray<unsigned char> store_;
  DeviceArray<float> bad_;       // [2, heads]: of keys and values
  DeviceArray<int32_t> filled_;  // pages that the last launch filled
  PageLayout work_layout_;       // of work_pages()
  DeviceArray<double> speeds_;   // of a moved sink, by pair
  Buffer told_;
  std::unique_ptr<PageSummaries> summaries_;
  int current_pages_ = 0;  // of the chunk in work; 0: there is none
  int moved_sink_ = -1;    // history page of the moved sink, once there is one
  size_t num_growths_ = 0;
  int64_t waits_for_ = 0;  // round of the batch

  // What attention reads while there is a chunk in work, and what it was written for.
  DeviceArray<int32_t> begin_, pages_;
  mutable DevicePages shown_;
  mutable int shown_work_ = 0;
  mutable HistoryReading shown_reading_;
  // The history alone, written when it is asked for.
  DeviceArray<int32_t> history_begin_, history_pages_;
  mutable DevicePages history_;
};

std::unique_ptr<KvCache> make_device_full_cache(Context& ctx, const CacheOptions& options);
std::unique_ptr<KvCache> make_device_window_cache(Context& ctx, const CacheOptions& options);
std::unique_ptr<KvCache> make_device_temp_cache(Context& ctx, const CacheOptions& options);

}  // namespace longtake::cuda
