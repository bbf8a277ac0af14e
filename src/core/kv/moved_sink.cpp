#include "kv/moved_sink.h"

#include <algorithm>
#include <array>

#include "device/parallel.h"
#include "kv/time_rotation.h"

namespace longtake {

MovedSink::MovedSink(PageStore& store, int64_t num_heads)
    : store_(store), pages_(static_cast<size_t>(num_heads)) {}

void MovedSink::move(Context& ctx, std::span<const PageList> from, int64_t num_pages,
                     const HistoryReading& reading, int64_t frames) {
  if (frames == moved_by_) return;
  moved_by_ = frames;
  const DType dtype = store_.dtype();
  const int64_t head_dim = store_.head_dim();
  const TimeRotation rotation(reading.time_pairs, reading.time_theta, frames);
  const auto wanted = static_cast<size_t>(num_pages);
  for (PageList& pages : pages_) {
    while (pages.size() < wanted) pages.push_back(store_.take());
  }
  parallel_for(ctx, static_cast<int64_t>(pages_.size()), 1, [&](int64_t begin, int64_t end) {
    std::array<float, size_t{2} * TimeRotation::kMaxPairs> key, value;
    for (auto head = static_cast<size_t>(begin); head < static_cast<size_t>(end); ++head) {
      for (size_t page = 0; page < wanted; ++page) {
        const KvPage& source = from[head][page];
        KvPage& to = pages_[head][page];
        clear_page(to, dtype, head_dim);
        for (int64_t slot = 0; slot < source.num_keys; ++slot) {
          read_token(source, dtype, head_dim, slot, key.data(), value.data());
          rotation.apply(key.data());
          write_token(to, dtype, head_dim, slot, key.data(), value.data(), source.bias[slot]);
        }
      }
    }
  });
}

int64_t sink_distance(const HistoryReading& reading, int64_t first_frame, int64_t sink_frames,
                      int64_t other_frames) {
  const int64_t first_read = reading.next_frame - std::min(other_frames, reading.window_frames);
  return first_read - sink_frames - first_frame;
}

}  // namespace longtake
