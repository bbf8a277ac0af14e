#include "kv/tempcache_head.h"

#include <algorithm>
#include <cmath>
#include <istream>
#include <limits>
#include <numeric>
#include <ostream>

#include "ann/project.h"

namespace longtake {
namespace {

constexpr int64_t kCandidates = 8;  // of a key, checked exactly: one alone misses many partners
constexpr float kRefused = std::numeric_limits<float>::infinity();  // no candidate, or not again

}  // namespace

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
    constexpr int64_t kAhead = 4;
    if (t + kAhead < count) {
      const int32_t* soon = joins_.data() + t + kAhead;
      groups_.prefetch(*soon);
      prefetch_rows(mapped_.data(), soon, 1, head_dim_);
    }
    const int64_t group = joins_[static_cast<size_t>(t)];
    if (group < 0) continue;
    groups_.merge(group, keys + t * head_dim_, values + t * head_dim_, 1, frame);
    // The map is affine: what the key becomes, its image becomes.
    const float way =
        options_.key == GroupKey::kMean ? 1.0F / static_cast<float>(groups_.count(group)) : 1.0F;
    float* own = mapped_.data() + group * head_dim_;
    approach(own, mapped + t * head_dim_, way, head_dim_);
    moved_.push_back(static_cast<int32_t>(group));
    moved = std::copy_n(own, head_dim_, moved);
    if (tracing_)
      members_[static_cast<size_t>(group)].push_back(static_cast<int32_t>(first_key + t));
    --num_new_;
  }
  index_->set_all(moved_.data(), scratch, static_cast<int64_t>(moved_.size()));
}

// Of all pairs of a key and a candidate the nearest one joins, then the nearest that is left, and
// so on. No sorting is needed for that: every key asks its nearest candidate, a group keeps the
// nearest key that asked, and who is refused asks the next.
void HeadGroups::match(const float* keys, const float* mapped, int64_t count, float longest_query) {
  joins_.assign(static_cast<size_t>(count), -1);
  if (most_square_ == 0 || size() == 0) return;
  candidates_.resize(static_cast<size_t>(count * kCandidates));
  squares_.resize(candidates_.size());
  index_->nearest_all(mapped, count, kCandidates, most_square_, candidates_.data());
  for (int64_t t = 0; t < count; ++t) {
    const int32_t* groups = candidates_.data() + t * kCandidates;
    if (t + 1 < count) prefetch_rows(mapped_.data(), groups + kCandidates, kCandidates, head_dim_);
    const int64_t found = std::find(groups, groups + kCandidates, -1) - groups;
    float* squares = squares_.data() + t * kCandidates;
    square_distances_at(mapped_.data(), groups, found, head_dim_, mapped + t * head_dim_, squares);
    std::fill(squares + found, squares + kCandidates, kRefused);
  }
  owners_.assign(static_cast<size_t>(size()), {kRefused, -1});
  for (int64_t t = 0; t < count; ++t) {
    for (auto asking = static_cast<int32_t>(t); asking >= 0;) {
      float* squares = squares_.data() + asking * kCandidates;
      const int32_t* groups = candidates_.data() + asking * kCandidates;
      int64_t best = 0;
      for (int64_t i = 1; i < kCandidates; ++i) {
        if (squares[i] < squares[best] || (squares[i] == squares[best] && groups[i] < groups[best]))
          best = i;
      }
      const Owner own{squares[best], asking};
      if (!(own.square < most_square_)) break;
      squares[best] = kRefused;
      const int32_t group = groups[best];
      Owner& owner = owners_[static_cast<size_t>(group)];
      if (!(own < owner) || !may_join(keys + asking * head_dim_, group, longest_query)) continue;
      joins_[static_cast<size_t>(asking)] = group;
      asking = owner.token;
      if (asking >= 0) joins_[static_cast<size_t>(asking)] = -1;
      owner = own;
    }
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
