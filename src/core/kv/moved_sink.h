// Copies of a sink's pages as if its frames stood elsewhere in time. Rotations compose, so the keys
// are turned by the frames they are moved; the copies are made again only when that number changes.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "device/context.h"
#include "kv/cache.h"
#include "kv/page.h"

namespace longtake {

class MovedSink {
 public:
  // The copies' pages come from `store`, which must outlive this.
  MovedSink(PageStore& store, int64_t num_heads);

  // Moves the first num_pages pages of every head of `from` by so many frames; reading: the
  // rotation of its keys.
  void move(Context& ctx, std::span<const PageList> from, int64_t num_pages,
            const HistoryReading& reading, int64_t frames);

  // The sink is another one from here on.
  void forget() { moved_by_ = 0; }

  // Whether a move has made copies, which count instead of the sink's own pages.
  bool is_moved() const { return moved_by_ != 0; }

  const PageList& pages(size_t head) const { return pages_[head]; }

 private:
  PageStore& store_;
  std::vector<PageList> pages_;  // per head
  int64_t moved_by_ = 0;         // frames
};

// How a policy with a sink shows a history of so many sink and other frames, the sink's first frame
// being first_frame: the frames by which the sink is moved.
int64_t sink_distance(const HistoryReading& reading, int64_t first_frame, int64_t sink_frames,
                      int64_t other_frames);

}  // namespace longtake
