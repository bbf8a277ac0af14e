#include "kv/device_commit_batch.h"

#include <algorithm>
#include <iterator>

#include "base/error.h"
#include "kv/device_store.h"

namespace longtake {

template <typename T>
const typename CommitBatch::Described<T>::One& CommitBatch::Described<T>::of(
    const std::vector<T>& host, cudaStream_t stream) {
  cudaStreamCaptureStatus status;
  cuda::check(cudaStreamIsCapturing(stream, &status), "commit");
  const bool is_recording = status != cudaStreamCaptureStatusNone;
  auto found =
      std::find_if(known_.begin(), known_.end(), [&](const One& one) { return one.host == host; });
  if (found == known_.end()) {
    // A record cannot allocate: what is written outside of one leaves room for a few more.
    constexpr size_t kSets = 32, kSpare = 4;
    const size_t room = blocks_.empty() ? 0 : blocks_.back().size() - used_;
    if (room < (is_recording ? 1 : kSpare) * host.size()) {
      LONGTAKE_CHECK(!is_recording, "descriptions of commits: no room for ", host.size());
      blocks_.emplace_back(kSets * host.size());
      used_ = 0;
    }
    known_.push_back({host, blocks_.back().data() + used_, false});
    used_ += host.size();
    found = std::prev(known_.end());
  }
  if (!found->is_written) cuda::store(host.data(), host.size() * sizeof(T), found->device, stream);
  found->is_written |= !is_recording;
  return *found;
}

void CommitBatch::add(const cuda::PageSummaries& summaries, const cuda::SummaryJob& job) {
  summaries_.push_back(job);
  kind_ = &summaries;
}

cuda::GroupBatch CommitBatch::batch_of(const std::vector<cuda::Groups>& groups) {
  const cuda::Groups& first = groups.front();
  for (const cuda::Groups& g : groups)
    LONGTAKE_CHECK(g.layout.format == first.layout.format && g.ann == first.ann &&
                       g.layout.head_dim == first.layout.head_dim &&
                       g.layout.num_heads == first.layout.num_heads &&
                       g.frames.tokens == first.frames.tokens,
                   "layers of one commit");
  const auto& known = known_groups_.of(groups, runtime_.stream());
  return {known.device, known.host.data(), static_cast<int>(groups.size())};
}

cuda::GroupBatch CommitBatch::on_device(const cuda::Groups& groups) {
  return batch_of({groups});
}

void CommitBatch::run() {
  const cudaStream_t stream = runtime_.stream();
  ++round_;
  if (!groups_.empty()) cuda::merge_frames(batch_of(groups_), stream);
  if (!summaries_.empty()) {
    int most = 0;
    for (const cuda::SummaryJob& job : summaries_) most = std::max(most, job.count);
    kind_->update_all(known_summaries_.of(summaries_, stream).device,
                      static_cast<int>(summaries_.size()), most, stream);
  }
  if (!tables_.empty())
    cuda::write_tables(known_tables_.of(tables_, stream).device, static_cast<int>(tables_.size()),
                       stream);
  groups_.clear();
  summaries_.clear();
  tables_.clear();
}

}  // namespace longtake
