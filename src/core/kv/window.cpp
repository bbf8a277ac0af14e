// Policy `window`: the first sink_frames frames stay for ever, of the others the window_frames most
// recent. Each frame has pages of its own, so that dropping one moves nothing. Memory is constant.
#include <algorithm>

#include "base/error.h"
#include "kv/cache.h"

namespace longtake {
namespace {

class WindowCache final : public KvCache {
 public:
  WindowCache(Context& ctx, const CacheOptions& options)
      : KvCache(ctx, options),
        pages_per_frame_((options.tokens_per_frame + kPageTokens - 1) / kPageTokens) {
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
    check_tokens("commit", k, v);
    const int64_t tokens = options_.tokens_per_frame;
    if (k.dim(0) != position.num_frames * tokens)
      throw Error(str("commit: expected ", position.num_frames, " frames of ", tokens,
                      " tokens, found ", k.dim(0), " tokens"));
    drop_current();
    for (int64_t frame = 0; frame < position.num_frames; ++frame) {
      if (num_frames() == options_.sink_frames + options_.window_frames)
        erase(options_.sink_frames * pages_per_frame_,
              (options_.sink_frames + 1) * pages_per_frame_);
      append(k, v, frame * tokens, tokens, /*fill=*/false);
    }
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
  // The pages say it all, if there are not too many of them.
  bool set_policy_state(const std::vector<int64_t>& state) override {
    const auto same = [this](const PageList& list) { return list.size() == pages_[0].size(); };
    return state.empty() && std::all_of(pages_.begin(), pages_.end(), same) &&
           num_history_pages(0) % pages_per_frame_ == 0 &&
           num_frames() <= options_.sink_frames + options_.window_frames;
  }

 private:
  int64_t num_frames() const { return num_history_pages(0) / pages_per_frame_; }

  int64_t pages_per_frame_;
};

}  // namespace

std::unique_ptr<KvCache> make_window_cache(Context& ctx, const CacheOptions& options) {
  return std::make_unique<WindowCache>(ctx, options);
}

}  // namespace longtake
