#include "kv/tempcache_head.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <istream>
#include <limits>
#include <numeric>
#include <ostream>

#include "ann/project.h"

namespace longtake {
namespace {

constexpr int64_t kCandidates = 8;  // of a key, checked exactly: one alone misses many partners

}  // namespace

struct HeadGroups::Match {
  uint64_t rank;  // squared distance, then token: floats that are not negative sort as their bits
  int32_t group;

  Match(float square, int32_t token, int32_t to)
      : rank(uint64_t{std::bit_cast<uint32_t>(square)} << 32 | static_cast<uint32_t>(token)),
        group(to) {}

  int32_t token() const { return static_cast<int32_t>(rank & 0xffffffffU); }

  bool operator<(const Match& other) const {
    return rank != other.rank ? rank < other.rank : group < other.group;
  }
};

float most_square_of(const TempCacheOptions& options) {
  if (options.max_error > 0) return std::numeric_limits<float>::infinity();
  const double tau = options.merge_threshold;
  return static_cast<float>(options.rule == MergeRule::kPaper ? 2 - 2 * tau : tau * tau);
}

TempCacheOptions resolve_rule(TempCacheOptions options) {
  if (options.rule != MergeRule::kPaper) return options;
  options.key = GroupKey::kNewest;
  options.bias = GroupBias::kLogCount;
  options.time_pairs = 0;  // keys are compared as they are
  return options;
}

HeadGroups::HeadGroups(int64_t head_dim, const TempCacheOptions& options)
    : head_dim_(head_dim),
      options_(options),
      most_square_(most_square_of(options)),
      groups_(head_dim, options.key),
      metric_(head_dim, options.rule),
      index_(make_ann_index(options.ann, head_dim, options.seed)) {}

HeadGroups::HeadGroups(HeadGroups&&) noexcept = default;
HeadGroups::~HeadGroups() = default;

void HeadGroups::refresh_metric(const float* keys, int64_t count) {
  metric_.refresh(keys, count);
  remap();
}

void HeadGroups::join(const float* keys, const float* values, int64_t count, int64_t frame,
                      float longest_query, int64_t first_key, float* mapped, float* scratch) {
  metric_.map_all(keys, count, mapped);
  match(keys, mapped, count, longest_query);
  num_new_ = count;
  moved_.clear();
  float* moved = scratch;
  for (int64_t t = 0; t < count; ++t) {
    const int64_t group = joins_[static_cast<size_t>(t)];
    if (group < 0) continue;
    groups_.merge(group, keys + t * head_dim_, values + t * head_dim_, 1, frame);
    // The map is affine: what the key becomes, its image becomes.
    const float share =
        options_.key == GroupKey::kMean ? 1.0F / static_cast<float>(groups_.count(group)) : 1.0F;
    float* own = mapped_.data() + group * head_dim_;
    for (int64_t d = 0; d < head_dim_; ++d) own[d] += share * (mapped[t * head_dim_ + d] - own[d]);
    moved_.push_back(static_cast<int32_t>(group));
    moved = std::copy_n(own, head_dim_, moved);
    if (tracing_)
      members_[static_cast<size_t>(group)].push_back(static_cast<int32_t>(first_key + t));
    --num_new_;
  }
  index_->set_all(moved_.data(), scratch, static_cast<int64_t>(moved_.size()));
}

void HeadGroups::match(const float* keys, const float* mapped, int64_t count, float longest_query) {
  matches_.clear();
  const int64_t asking = most_square_ > 0 ? count : 0;
  candidates_.resize(static_cast<size_t>(asking * kCandidates));
  index_->nearest_all(mapped, asking, kCandidates, most_square_, candidates_.data());
  std::array<float, kCandidates> squares{};
  for (int64_t t = 0; t < asking; ++t) {
    const int32_t* groups = candidates_.data() + t * kCandidates;
    const int64_t found = std::find(groups, groups + kCandidates, -1) - groups;
    square_distances_at(mapped_.data(), groups, found, head_dim_, mapped + t * head_dim_,
                        squares.data());
    for (int64_t i = 0; i < found; ++i) {
      const float square = squares[static_cast<size_t>(i)];
      if (square < most_square_ && may_join(keys + t * head_dim_, groups[i], longest_query))
        matches_.emplace_back(square, static_cast<int32_t>(t), groups[i]);
    }
  }
  std::sort(matches_.begin(), matches_.end());
  joins_.assign(static_cast<size_t>(count), -1);
  taken_.assign(static_cast<size_t>(size()), 0);
  for (const Match& m : matches_) {
    char& taken = taken_[static_cast<size_t>(m.group)];
    int32_t& join = joins_[static_cast<size_t>(m.token())];
    if (join >= 0 || taken != 0) continue;
    join = m.group;
    taken = 1;
  }
}

// Whether the group's key stays within max_error of all its members.
bool HeadGroups::may_join(const float* key, int64_t group, float longest_query) const {
  if (options_.max_error == 0) return true;
  const float distance = std::sqrt(square_distance(key, groups_.key(group), head_dim_));
  const double radius = groups_.radius_with(group, distance);
  return double{longest_query} * radius <=
         options_.max_error * std::sqrt(static_cast<double>(head_dim_));
}

void HeadGroups::add_new(const float* keys, const float* values, const float* mapped, int64_t frame,
                         int64_t first_key) {
  for (size_t t = 0; t < joins_.size(); ++t) {
    if (joins_[t] >= 0) continue;
    const auto row = static_cast<int64_t>(t) * head_dim_;
    groups_.add(keys + row, values + row, 1, frame);
    if (tracing_) members_.push_back({static_cast<int32_t>(first_key + static_cast<int64_t>(t))});
    mapped_.insert(mapped_.end(), mapped + row, mapped + row + head_dim_);
  }
  append_to_index();
}

void HeadGroups::remove(int64_t group) {
  groups_.remove(group);
  index_->remove(group);
  std::copy_n(mapped_.end() - head_dim_, head_dim_, mapped_.begin() + group * head_dim_);
  mapped_.resize(mapped_.size() - static_cast<size_t>(head_dim_));
  if (!tracing_) return;
  members_[static_cast<size_t>(group)].swap(members_.back());
  members_.pop_back();
}

void HeadGroups::clear() {
  groups_.clear();
  metric_.clear();
  index_->clear();
  mapped_.clear();
  members_.clear();
}

// Maps and indexes all groups anew, after the metric changed.
void HeadGroups::remap() {
  mapped_.resize(static_cast<size_t>(size() * head_dim_));
  index_->clear();
  if (size() == 0) return;
  metric_.map_all(groups_.key(0), size(), mapped_.data());
  append_to_index();
}

// Groups that the index does not know yet: the last ones.
void HeadGroups::append_to_index() {
  const int64_t known = index_->size();
  moved_.resize(static_cast<size_t>(size() - known));
  std::iota(moved_.begin(), moved_.end(), static_cast<int32_t>(known));
  index_->set_all(moved_.data(), mapped_.data() + known * head_dim_, size() - known);
}

void HeadGroups::write(std::ostream& out) const {
  groups_.write(out);
  metric_.write(out);
}

bool HeadGroups::read(std::istream& in, int64_t most) {
  if (!groups_.read(in, most) || !metric_.read(in)) return false;
  remap();
  return true;
}

}  // namespace longtake
