// Policy `full` on CUDA: every committed token stays. The store doubles when it is full, between
// frames.
#include <algorithm>
#include <numeric>

#include "base/error.h"
#include "kv/device_cache_base.h"

namespace longtake::cuda {
namespace {

class DeviceFullCache final : public DeviceCache {
 public:
  DeviceFullCache(Context& ctx, const CacheOptions& options) : DeviceCache(ctx, options, {}) {
    const int64_t tokens =
        std::max(options.reserve_tokens, options.chunk_frames * options.tokens_per_frame);
    allocate({pages_for(options.chunk_frames * options.tokens_per_frame), pages_for(tokens), 0});
    DeviceCache::reset();
  }

  bool is_bounded() const override { return true; }

  bool prepare_frames(Context&, int64_t num_frames) override {
    prepared_ += num_frames * options_.tokens_per_frame;
    if (prepared_ <= int64_t{room_.history} * kPageKeys) return false;
    allocate({room_.work, doubled(room_.history, pages_for(prepared_)), 0});
    return true;
  }

  void commit(Context&, View k, View v, ChunkPosition) override {
    check_tokens("commit", k, v);
    enqueued_ += k.dim(0);
    LONGTAKE_CHECK(enqueued_ <= prepared_, "prepare_chunk: ", prepared_, " tokens, not ",
                   enqueued_);
    append(FillPlace::kTokens, k, v);
    finish(k.dim(0));
  }

  std::vector<int32_t> members(int64_t, int64_t num_committed) const override {
    std::vector<int32_t> out(static_cast<size_t>(num_committed));
    std::iota(out.begin(), out.end(), 0);
    return out;
  }

  void reset() override {
    DeviceCache::reset();
    prepared_ = enqueued_ = 0;
  }

 protected:
  void describe(Table& table) const override { table.is_ring = false; }

  std::vector<int64_t> policy_state() const override { return {}; }

  std::vector<KeyRun> runs(int head) const override {
    KeyRun run{read_counters().held, {}, {}};
    for (int page = 0; page < pages_for(run.keys); ++page)
      run.pages.push_back(layout().history(head, page));
    return {run};
  }

  bool read_policy(std::istream&, const std::vector<int64_t>& state,
                   const std::vector<int64_t>& keys) override {
    const auto same = [&](int64_t count) { return count == keys.front(); };
    if (!state.empty() || !std::all_of(keys.begin(), keys.end(), same)) return false;
    prepared_ = keys.front();
    if (pages_for(prepared_) > room_.history)
      allocate({room_.work, doubled(room_.history, pages_for(prepared_)), 0});
    write_counters({.held = prepared_});
    return true;
  }

 private:
  int64_t prepared_ = 0;  // tokens that there is room for by what was asked
  int64_t enqueued_ = 0;  // tokens of commits that no replay made
};

}  // namespace

std::unique_ptr<KvCache> make_device_full_cache(Context& ctx, const CacheOptions& options) {
  return std::make_unique<DeviceFullCache>(ctx, options);
}

}  // namespace longtake::cuda
