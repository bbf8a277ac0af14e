#include "kv/tempcache_groups.h"

#include <algorithm>
#include <istream>
#include <numeric>
#include <ostream>
#include <tuple>

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
}

void KeyGroups::merge(int64_t group, const float* key, const float* value, int64_t count,
                      int64_t newest) {
  LONGTAKE_CHECK(group >= 0 && group < size() && count > 0, group, ", ", count);
  const auto at = static_cast<size_t>(group);
  float* own_key = keys_.data() + group * head_dim_;
  float* own_value = values_.data() + group * head_dim_;
  const auto share =
      static_cast<float>(static_cast<double>(count) / static_cast<double>(counts_[at] + count));
  for (int64_t d = 0; d < head_dim_; ++d) own_value[d] += share * (value[d] - own_value[d]);
  if (key_ == GroupKey::kMean) {
    for (int64_t d = 0; d < head_dim_; ++d) own_key[d] += share * (key[d] - own_key[d]);
  } else if (newest >= newest_[at]) {
    std::copy_n(key, head_dim_, own_key);
  }
  counts_[at] += count;
  newest_[at] = std::max(newest_[at], newest);
}

void KeyGroups::remove(int64_t group) {
  LONGTAKE_CHECK(group >= 0 && group < size(), group);
  const auto at = static_cast<size_t>(group);
  std::copy_n(keys_.end() - head_dim_, head_dim_, keys_.begin() + group * head_dim_);
  std::copy_n(values_.end() - head_dim_, head_dim_, values_.begin() + group * head_dim_);
  counts_[at] = counts_.back();
  newest_[at] = newest_.back();
  keys_.resize(keys_.size() - static_cast<size_t>(head_dim_));
  values_.resize(values_.size() - static_cast<size_t>(head_dim_));
  counts_.pop_back();
  newest_.pop_back();
}

void KeyGroups::clear() {
  keys_.clear();
  values_.clear();
  counts_.clear();
  newest_.clear();
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
}

bool KeyGroups::read(std::istream& in, int64_t most) {
  int64_t count = 0;
  in.read(reinterpret_cast<char*>(&count), sizeof count);
  if (!in || count < 0 || count > most) return false;
  return read_all(in, count * head_dim_, keys_) && read_all(in, count * head_dim_, values_) &&
         read_all(in, count, counts_) && read_all(in, count, newest_) &&
         std::all_of(counts_.begin(), counts_.end(), [](int64_t m) { return m > 0; });
}

}  // namespace longtake
