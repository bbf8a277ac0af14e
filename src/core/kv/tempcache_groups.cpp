#include "kv/tempcache_groups.h"

#include <algorithm>
#include <cmath>
#include <istream>
#include <numeric>
#include <ostream>
#include <tuple>

#include "ann/project.h"
#include "base/error.h"

namespace longtake {
namespace {

template <typename T>
void write_all(std::ostream& out, const std::vector<T>& values) {
  out.write(reinterpret_cast<const char*>(values.data()),
            static_cast<std::streamsize>(values.size() * sizeof(T)));
}

// Appends `count` values block by block: a hostile count meets the stream's end before it meets the
// memory's.
template <typename T>
bool read_all(std::istream& in, int64_t count, std::vector<T>& values) {
  constexpr int64_t kBlock = 1 << 16;
  values.clear();
  for (int64_t left = count; left > 0; left -= kBlock) {
    const auto part = static_cast<size_t>(std::min(left, kBlock));
    values.resize(values.size() + part);
    in.read(reinterpret_cast<char*>(values.data() + values.size() - part),
            static_cast<std::streamsize>(part * sizeof(T)));
    if (!in) return false;
  }
  return true;
}

}  // namespace

void KeyGroups::add(const float* key, const float* value, int64_t count, int64_t newest) {
  keys_.insert(keys_.end(), key, key + head_dim_);
  values_.insert(values_.end(), value, value + head_dim_);
  counts_.push_back(count);
  newest_.push_back(newest);
  radii_.push_back(0);
  seen_.emplace_back();
  see(seen_.back(), newest, count);
}

float KeyGroups::radius_with(int64_t group, float distance) const {
  // Where the key moves to is off by its way for those that were there, by the rest for the new.
  const auto at = static_cast<size_t>(group);
  const float share = key_ == GroupKey::kMean ? 1.0F / static_cast<float>(counts_[at] + 1) : 1.0F;
  return std::max(radii_[at] + share * distance, (1 - share) * distance);
}

std::span<const Sighting> KeyGroups::sightings(int64_t group) const {
  const Sightings& seen = seen_[static_cast<size_t>(group)];
  const auto unused =
      std::find_if(seen.begin(), seen.end(), [](const Sighting& s) { return s.count == 0; });
  return {seen.begin(), unused};
}

void KeyGroups::see(Sightings& seen, int64_t frame, int64_t count) {
  const auto at = static_cast<int32_t>(frame);
  std::array<Sighting, kMostSightings + 1> all{};
  size_t used = 0;
  while (used < seen.size() && seen[used].count > 0) ++used;
  std::copy_n(seen.begin(), used, all.begin());
  const auto place = std::find_if(all.begin(), all.begin() + static_cast<int64_t>(used),
                                  [at](const Sighting& s) { return s.last >= at; });
  const bool inside = place->count > 0 && place->first <= at;
  if (inside) {
    place->count += static_cast<int32_t>(count);
  } else {
    std::copy_backward(place, all.begin() + static_cast<int64_t>(used),
                       all.begin() + static_cast<int64_t>(used) + 1);
    *place = {at, at, static_cast<int32_t>(count)};
    ++used;
  }
  if (used > seen.size()) {
    // The pair whose gap matters least: gaps count by the age of their newer end.
    constexpr double kYoung = 4;  // frames; younger ones do not differ in this
    const int32_t newest = all[used - 1].last;
    size_t least = 0;
    double least_gap = INFINITY;
    for (size_t i = 0; i + 1 < used; ++i) {
      const double gap =
          (all[i + 1].middle() - all[i].middle()) / (newest - all[i + 1].middle() + kYoung);
      if (gap < least_gap) least = i;
      least_gap = std::min(gap, least_gap);
    }
    all[least].last = all[least + 1].last;
    all[least].count += all[least + 1].count;
    std::copy(all.begin() + static_cast<int64_t>(least) + 2, all.end(),
              all.begin() + static_cast<int64_t>(least) + 1);
  }
  std::copy_n(all.begin(), seen.size(), seen.begin());
}

void KeyGroups::merge(int64_t group, const float* key, const float* value, int64_t count,
                      int64_t newest, float radius) {
  LONGTAKE_CHECK(group >= 0 && group < size() && count > 0, group, ", ", count);
  const auto at = static_cast<size_t>(group);
  float* own_key = keys_.data() + group * head_dim_;
  const auto share =
      static_cast<float>(static_cast<double>(count) / static_cast<double>(counts_[at] + count));
  const bool newer = newest >= newest_[at];
  const float way = key_ == GroupKey::kMean ? share : newer ? 1.0F : 0.0F;
  const float distance = std::sqrt(approach(own_key, key, way, head_dim_));
  radii_[at] = std::max(radii_[at] + way * distance, radius + (1 - way) * distance);
  see(seen_[at], newest, count);
  approach(values_.data() + group * head_dim_, value, share, head_dim_);
  counts_[at] += count;
  newest_[at] = std::max(newest_[at], newest);
}

void KeyGroups::prefetch(int32_t group) const {
  prefetch_rows(keys_.data(), &group, 1, head_dim_);
  prefetch_rows(values_.data(), &group, 1, head_dim_);
  if (group >= 0) __builtin_prefetch(&seen_[static_cast<size_t>(group)]);
}

void KeyGroups::remove(int64_t group) {
  LONGTAKE_CHECK(group >= 0 && group < size(), group);
  const auto at = static_cast<size_t>(group);
  std::copy_n(keys_.end() - head_dim_, head_dim_, keys_.begin() + group * head_dim_);
  std::copy_n(values_.end() - head_dim_, head_dim_, values_.begin() + group * head_dim_);
  counts_[at] = counts_.back();
  newest_[at] = newest_.back();
  radii_[at] = radii_.back();
  seen_[at] = seen_.back();
  keys_.resize(keys_.size() - static_cast<size_t>(head_dim_));
  values_.resize(values_.size() - static_cast<size_t>(head_dim_));
  counts_.pop_back();
  newest_.pop_back();
  radii_.pop_back();
  seen_.pop_back();
}

void KeyGroups::clear() {
  keys_.clear();
  values_.clear();
  counts_.clear();
  newest_.clear();
  radii_.clear();
  seen_.clear();
}

std::vector<int64_t> KeyGroups::stalest(int64_t count) const {
  LONGTAKE_CHECK(count >= 0 && count <= size(), count);
  std::vector<int64_t> order(counts_.size());
  std::iota(order.begin(), order.end(), int64_t{0});
  const auto staler = [this](int64_t a, int64_t b) {
    return std::tuple(newest(a), this->count(a), a) < std::tuple(newest(b), this->count(b), b);
  };
  std::nth_element(order.begin(), order.begin() + count, order.end(), staler);
  order.resize(static_cast<size_t>(count));
  std::sort(order.rbegin(), order.rend());
  return order;
}

void KeyGroups::write(std::ostream& out) const {
  const int64_t count = size();
  out.write(reinterpret_cast<const char*>(&count), sizeof count);
  write_all(out, keys_);
  write_all(out, values_);
  write_all(out, counts_);
  write_all(out, newest_);
  write_all(out, radii_);
  write_all(out, seen_);
}

bool KeyGroups::read(std::istream& in, int64_t most) {
  int64_t count = 0;
  in.read(reinterpret_cast<char*>(&count), sizeof count);
  if (!in || count < 0 || count > most) return false;
  return read_all(in, count * head_dim_, keys_) && read_all(in, count * head_dim_, values_) &&
         read_all(in, count, counts_) && read_all(in, count, newest_) &&
         read_all(in, count, radii_) && read_all(in, count, seen_) &&
         std::all_of(counts_.begin(), counts_.end(), [](int64_t m) { return m > 0; }) &&
         std::all_of(radii_.begin(), radii_.end(), [](float r) { return r >= 0; }) &&
         std::all_of(seen_.begin(), seen_.end(), [](const Sightings& seen) {
           return std::all_of(seen.begin(), seen.end(), [](const Sighting& s) {
             return s.count >= 0 && s.first >= 0 && s.last >= s.first;
           });
         });
}

}  // namespace longtake
