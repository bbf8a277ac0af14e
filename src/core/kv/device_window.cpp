// Policy `window` on CUDA: the first frames stay for ever, of the others the most recent; each has
// pages of its own, a ring of them, so that a steady step moves and allocates nothing.
#include <algorithm>
#include <utility>

#include "base/error.h"
#include "kv/device_cache_base.h"

namespace longtake::cuda {
namespace {

FrameRing ring_of(const CacheOptions& options) {
  if (options.sink_frames < 0 || options.window_frames < 1)
    throw Error(ErrorKind::kUsage,
                str("window: expected at least 1 frame and 0 sink frames, found ",
                    options.window_frames, " and ", options.sink_frames));
  const int64_t pages = (options.tokens_per_frame + kPageKeys - 1) / kPageKeys;
  FrameRing frames{static_cast<int>(options.sink_frames), static_cast<int>(options.window_frames),
                   static_cast<int>(options.tokens_per_frame), static_cast<int>(pages)};
  // AnnSA wants a frame's pages to be its own, too.
  const auto rest = static_cast<int>(options.tokens_per_frame % kPageKeys);
  if (options.reads_whole && !options.page_summaries && pages > 1 && rest > 0 &&
      2 * rest <= kPageKeys)
    frames.per_page = kPageKeys / rest;
  return frames;
}

class DeviceWindowCache final : public DeviceCache {
 public:
  DeviceWindowCache(Context& ctx, const CacheOptions& options)
      : DeviceCache(ctx, options, ring_of(options)) {
    allocate(
        {pages_for(options.chunk_frames * options.tokens_per_frame), frames_.history_pages(), 0});
    DeviceCache::reset();
  }

  void set_reading(Context& ctx, const HistoryReading& reading) override {
    LONGTAKE_CHECK(reading.is_everything() || frames_.per_page == 0, "frames share pages");
    DeviceCache::set_reading(ctx, reading);
  }

  void commit(Context&, View k, View v, ChunkPosition position) override {
    check_tokens("commit", k, v);
    check_frames("commit", k, position);
    append(FillPlace::kFrames, k, v);
    finish(position.num_frames);
  }

  std::vector<int32_t> members(int64_t, int64_t num_committed) const override {
    LONGTAKE_CHECK(frames_.per_page == 0, "frames share pages");
    return frame_members(told().held, frames_.ring, num_committed);
  }

  void forget_window() override {
    keep_at_most(counters_.data(), frames_.sink, stream());
    finish(0);
  }

 protected:
  void describe(Table& table) const override { table.ring_frames = options_.window_frames; }

  std::vector<int64_t> policy_state() const override { return {read_counters().first_frame}; }

  std::vector<KeyRun> runs(int head) const override {
    const int64_t held = read_counters().held;
    std::vector<KeyRun> all = frame_runs(head, held, frames_.ring, true);
    for (KeyRun& run : frame_runs(head, held, frames_.ring, false)) all.push_back(std::move(run));
    return all;
  }

  bool read_policy(std::istream&, const std::vector<int64_t>& state,
                   const std::vector<int64_t>& keys) override {
    const int64_t held = keys.front() / frames_.tokens;
    const auto same = [&](int64_t count) { return count == held * frames_.tokens; };
    if (state.size() != 1 || !std::all_of(keys.begin(), keys.end(), same) ||
        held > frames_.sink + frames_.ring)
      return false;
    write_counters({.held = held, .first_frame = state[0]});
    return true;
  }
};

}  // namespace

std::unique_ptr<KvCache> make_device_window_cache(Context& ctx, const CacheOptions& options) {
  return std::make_unique<DeviceWindowCache>(ctx, options);
}

}  // namespace longtake::cuda
