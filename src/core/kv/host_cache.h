// HostCache: what the policies of the CPU share: pages in a store, a list of them per head.
#pragma once

#include <cstddef>
#include <cstdint>
#include <iosfwd>
#include <memory>
#include <span>
#include <vector>

#include "kv/cache.h"
#include "kv/page.h"

namespace longtake {

class HostCache : public KvCache {
 public:
  void set_buckets(std::span<const Bucket> buckets) override;
  void set_current(Context& ctx, View k, View v) override;
  void reset() override;
  void set_reading(Context& ctx, const HistoryReading& reading) override;

  KvView view() const override { return {store_.dtype(), store_.head_dim(), pages_}; }

  int64_t num_history_pages(int64_t head) const override;  // the chunk in work follows them
  int64_t entries() const override;
  int64_t total_entries() const override;
  std::vector<int32_t> members(int64_t head, int64_t num_committed) const override;

  size_t bytes() const override { return store_.bytes(); }

  size_t bytes_used() const override;

  size_t num_growths() const override { return store_.num_slabs(); }

  void save(std::ostream& out) const override;
  void load(std::istream& in) override;

 protected:
  HostCache(Context& ctx, const CacheOptions& options);

  void check_tokens(const char* what, View k, View v) const;
  void check_chunk(View k, View v) const;  // of commit: the same, and every number is finite
  void check_finite(const char* what, View x) const;
  void drop_current();
  // Appends tokens [begin, begin + count) behind the history of every head, filling its last page
  // first if `fill` is set.
  void append(View k, View v, int64_t begin, int64_t count, bool fill);
  // Returns history pages [begin, end) of every head to the store.
  void erase(int64_t begin, int64_t end);

  // What a policy knows besides the pages.
  virtual std::vector<int64_t> policy_state() const { return {}; }

  virtual bool set_policy_state(const std::vector<int64_t>& state) { return state.empty(); }

  // What is too much for numbers; read after the pages and set_policy_state.
  virtual void write_policy(std::ostream&) const {}

  virtual bool read_policy(std::istream&) { return true; }

  CacheOptions options_;
  PageStore store_;
  std::vector<PageList> pages_;  // per head: history, then the chunk in work
  int64_t num_current_ = 0;      // pages of the chunk in work, the same for every head
  std::vector<Bucket> buckets_;  // of the chunk in work

 private:
  std::vector<PageList> spare_;  // per head: pages of the chunk in work, kept from step to step
};

// Policies; see full.cpp, window.cpp, tempcache.cpp, flowcache.cpp.
std::unique_ptr<KvCache> make_full_cache(Context& ctx, const CacheOptions& options);
std::unique_ptr<KvCache> make_window_cache(Context& ctx, const CacheOptions& options);
std::unique_ptr<KvCache> make_temp_cache(Context& ctx, const CacheOptions& options);
std::unique_ptr<KvCache> make_flow_cache(Context& ctx, const CacheOptions& options);

}  // namespace longtake
