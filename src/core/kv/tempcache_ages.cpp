#include "kv/tempcache_ages.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numbers>

namespace longtake {

KeyAges::KeyAges(int64_t head_dim, int64_t pairs, double theta)
    : head_dim_(head_dim), pairs_(pairs) {
  for (int64_t i = 0; i < pairs; ++i)
    speeds_.push_back(std::pow(theta, -static_cast<double>(i) / static_cast<double>(pairs)));
  reach(0);
}

void KeyAges::reach(int64_t most) {
  // The slowest pairs of a head have turned by then; a table must end somewhere.
  constexpr int64_t kMostAges = 1 << 13;
  for (; num_ages_ <= std::min(most, kMostAges - 1); ++num_ages_) {
    const auto age = static_cast<double>(num_ages_);
    for (const double speed : speeds_) phases_.push_back(static_cast<float>(std::cos(speed * age)));
    for (const double speed : speeds_) phases_.push_back(static_cast<float>(std::sin(speed * age)));
  }
}

int64_t KeyAges::age(int64_t now, int64_t frame) const {
  return std::clamp<int64_t>(now - frame, 0, num_ages_ - 1);
}

void KeyAges::biases(const KeyGroups& groups, const float* query, int64_t now, float* biases,
                     std::vector<float>& scratch) const {
  const int64_t width = 2 * pairs_;
  const auto row = static_cast<int64_t>(kMostSightings);
  scratch.resize(static_cast<size_t>(width + 2 * row * groups.size()));
  float* const split = scratch.data();  // even channels, then odd ones
  const auto scale = 1.0F / std::sqrt(static_cast<float>(head_dim_));
  for (int64_t i = 0; i < width; ++i) split[i % 2 * pairs_ + i / 2] = scale * query[i];
  age_biases({phases_.data(), pairs_, num_ages_}, groups, split, now, split + width, biases);
}

KeyAges::Range KeyAges::log_mass(const KeyGroups& groups, int64_t group, const float* query,
                                 int64_t now) const {
  constexpr double kPi = std::numbers::pi;
  constexpr double kRounding = 1e-6;  // of the table and of the radius, relative
  const float* key = groups.key(group);
  const double scale = 1.0 / std::sqrt(static_cast<double>(head_dim_));
  double still = 0, norm = 0;  // what no rotation changes
  for (int64_t d = 0; d < head_dim_; ++d) {
    if (d >= 2 * pairs_) still += scale * double{query[d]} * double{key[d]};
    norm += double{query[d]} * double{query[d]};
  }
  double low = 0, high = 0, most = -INFINITY;
  std::array<double, 2 * kMostSightings> logits{};
  size_t used = 0;
  const auto sightings = groups.sightings(group);
  for (const Sighting& seen : sightings) {
    const int64_t half = std::max(seen.last - seen.middle(), seen.middle() - seen.first);
    const float* phase = phases_.data() + age(now, seen.middle()) * 2 * pairs_;
    const float* turned = phases_.data() + age(half, 0) * 2 * pairs_;
    double logit = still, slack = 0;
    for (int64_t i = 0; i < pairs_; ++i) {
      const double q0 = query[2 * i], q1 = query[2 * i + 1];
      const double k0 = key[2 * i], k1 = key[2 * i + 1];
      logit += scale * ((q0 * k0 + q1 * k1) * double{phase[i]} +
                        (q0 * k1 - q1 * k0) * double{phase[pairs_ + i]});
      if (half == 0) continue;
      // A vector of length 1 that turns by x moves by sqrt(2 - 2 cos(x)), at most by 2.
      const bool over = speeds_[static_cast<size_t>(i)] * static_cast<double>(half) >= kPi;
      const double way = over ? 2 : std::sqrt(std::max(0.0, 2 - 2 * double{turned[i]}) + kRounding);
      slack += scale * std::hypot(q0, q1) * std::hypot(k0, k1) * way;
    }
    logits[used++] = logit - slack;
    logits[used++] = logit + slack;
    most = std::max(most, logit + slack);
  }
  for (size_t i = 0; i < sightings.size(); ++i) {
    low += sightings[i].count * std::exp(logits[2 * i] - most);
    high += sightings[i].count * std::exp(logits[2 * i + 1] - most);
  }
  const double off = scale * std::sqrt(norm) * double{groups.radius(group)} * (1 + kRounding);
  return {most + std::log(low) - off, most + std::log(high) + off};
}

}  // namespace longtake
