#include "kv/device_commit_batch.h"

#include <algorithm>

#include "base/error.h"

namespace longtake {

template <typename T>
const std::pair<std::vector<T>, cuda::DeviceArray<T>>& CommitBatch::Uploads<T>::of(
    const std::vector<T>& host, cudaStream_t stream) {
  const auto found = std::find_if(known_.begin(), known_.end(),
                                  [&](const auto& one) { return one.first == host; });
  if (found != known_.end()) return *found;
  auto& added = known_.emplace_back(host, cuda::DeviceArray<T>(host.size()));
  cuda::check(cudaMemcpyAsync(added.second.data(), added.first.data(), host.size() * sizeof(T),
                              cudaMemcpyHostToDevice, stream),
              "commit");
  return added;
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
  return {known.second.data(), known.first.data(), static_cast<int>(groups.size())};
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
    kind_->update_all(known_summaries_.of(summaries_, stream).second.data(),
                      static_cast<int>(summaries_.size()), most, stream);
  }
  if (!tables_.empty())
    cuda::write_tables(known_tables_.of(tables_, stream).second.data(),
                       static_cast<int>(tables_.size()), stream);
  groups_.clear();
  summaries_.clear();
  tables_.clear();
}

}  // namespace longtake
