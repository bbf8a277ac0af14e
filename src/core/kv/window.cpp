// Policy `window`: the first sink_frames frames stay for ever, of the others the window_frames most
// recent. Each frame has pages of its own, so that dropping one moves nothing. Memory is constant.
//
// A pass may read less than that, and may see the sink as if it stood just before the window, which
// keeps the distance that a model was trained with.
#include <algorithm>

#include "base/error.h"
#include "kv/host_cache.h"
#include "kv/moved_sink.h"

namespace longtake {
namespace {

class WindowCache final : public HostCache {
 public:
  WindowCache(Context& ctx, const CacheOptions& options)
      : HostCache(ctx, options),
        pages_per_frame_((options.tokens_per_frame + kPageTokens - 1) / kPageTokens),
        shown_(static_cast<size_t>(options.num_heads)),
        moved_(store_, options.num_heads) {
    if (options.sink_frames < 0 || options.window_frames < 1)
      throw Error(ErrorKind::kUsage,
                  str("window: expected at least 1 frame and 0 sink frames, found ",
                      options.window_frames, " and ", options.sink_frames));
    // One frame more than the history: the chunk in work.
    const int64_t frames = options.sink_frames + options.window_frames + 1;
    store_.reserve(static_cast<size_t>(options.num_heads * frames * pages_per_frame_));
    for (PageList& list : pages_) list.reserve(static_cast<size_t>(frames * pages_per_frame_));
  }

  void commit(Context&, View k, View v, ChunkPosition position) override {
    check_chunk(k, v);
    const int64_t tokens = options_.tokens_per_frame;
    if (k.dim(0) != position.num_frames * tokens)
      throw Error(str("commit: expected ", position.num_frames, " frames of ", tokens,
                      " tokens, found ", k.dim(0), " tokens"));
    drop_current();
    reading_ = {};
    if (num_frames() == 0) first_frame_ = position.first_frame;
    if (num_frames() < options_.sink_frames) moved_.forget();
    for (int64_t frame = 0; frame < position.num_frames; ++frame) {
      if (num_frames() == options_.sink_frames + options_.window_frames)
        erase(options_.sink_frames * pages_per_frame_,
              (options_.sink_frames + 1) * pages_per_frame_);
      append(k, v, frame * tokens, tokens, /*fill=*/false);
    }
  }

  void reset() override {
    HostCache::reset();
    reading_ = {};
    moved_.forget();
  }

  void forget_window() override {
    drop_current();
    reading_ = {};
    erase(num_sink_frames() * pages_per_frame_, num_frames() * pages_per_frame_);
  }

  void set_reading(Context& ctx, const HistoryReading& reading) override {
    drop_current();
    reading_ = reading;
    if (reading.sink != HistoryReading::Sink::kBeforeWindow) return;
    const int64_t sink = num_sink_frames();
    moved_.move(ctx, pages_, sink * pages_per_frame_, reading,
                sink_distance(reading, first_frame_, sink, num_frames() - sink));
  }

  KvView view() const override {
    if (reading_.is_everything()) return HostCache::view();
    const bool is_moved = reading_.sink == HistoryReading::Sink::kBeforeWindow && moved_.is_moved();
    const int64_t sink = num_sink_frames() * pages_per_frame_;
    const int64_t first_read = (num_frames() - num_window_frames_read()) * pages_per_frame_;
    for (size_t head = 0; head < pages_.size(); ++head) {
      const PageList& all = pages_[head];
      const auto from = is_moved ? moved_.pages(head).begin() : all.begin();
      shown_[head].clear();
      if (reading_.sink != HistoryReading::Sink::kHidden)
        shown_[head].insert(shown_[head].end(), from, from + sink);
      shown_[head].insert(shown_[head].end(), all.begin() + first_read, all.end());
    }
    return {store_.dtype(), store_.head_dim(), shown_};
  }

  std::vector<int32_t> members(int64_t /*head*/, int64_t num_committed) const override {
    const int64_t tokens = options_.tokens_per_frame;
    const int64_t sink = std::min(num_committed, options_.sink_frames * tokens);
    const int64_t forgotten = num_committed - num_frames() * tokens;
    std::vector<int32_t> out(static_cast<size_t>(num_committed), -1);
    for (int64_t i = 0; i < num_committed; ++i) {
      if (i < sink || i >= sink + forgotten)
        out[static_cast<size_t>(i)] = static_cast<int32_t>(i < sink ? i : i - forgotten);
    }
    return out;
  }

 protected:
  std::vector<int64_t> policy_state() const override { return {first_frame_}; }

  // The pages say the rest, if there are not too many of them.
  bool set_policy_state(const std::vector<int64_t>& state) override {
    if (state.size() != 1) return false;
    first_frame_ = state[0];
    const auto same = [this](const PageList& list) { return list.size() == pages_[0].size(); };
    return std::all_of(pages_.begin(), pages_.end(), same) &&
           num_history_pages(0) % pages_per_frame_ == 0 &&
           num_frames() <= options_.sink_frames + options_.window_frames;
  }

 private:
  int64_t num_frames() const { return num_history_pages(0) / pages_per_frame_; }

  int64_t num_sink_frames() const { return std::min(num_frames(), options_.sink_frames); }

  int64_t num_window_frames_read() const {
    return std::min(num_frames() - num_sink_frames(), reading_.window_frames);
  }

  int64_t pages_per_frame_;
  int64_t first_frame_ = 0;  // of the sink
  HistoryReading reading_;
  mutable std::vector<PageList> shown_;  // per head, what view() shows of a limited reading
  MovedSink moved_;
};

}  // namespace

std::unique_ptr<KvCache> make_window_cache(Context& ctx, const CacheOptions& options) {
  return std::make_unique<WindowCache>(ctx, options);
}

}  // namespace longtake
