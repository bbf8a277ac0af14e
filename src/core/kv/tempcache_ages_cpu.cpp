#include <algorithm>
#include <array>
#include <cstddef>

#include "kv/tempcache_ages.h"
#include "kv/time_rotation.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kv/tempcache_ages_cpu.cpp"
#include "hwy/foreach_target.h"  // stands first: it parses this file once per target

#include "hwy/cache_control.h"
#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"
#include "ops/simd-inl.h"

HWY_BEFORE_NAMESPACE();

namespace longtake::HWY_NAMESPACE {

using Part = hn::CappedTag<float, 8>;  // of a row of the table

// What cosine and sine of a turn of the key weigh in its dot product with the query: for query
// (q0, q1) and key (k0, k1) of a pair q0 k0 + q1 k1 and, `pairs` behind it, q0 k1 - q1 k0.
HWY_INLINE void turn_terms(const float* query, const float* key, size_t pairs, float* terms) {
  const auto some = [&](auto d, size_t i) HWY_ATTR {
    hn::Vec<decltype(d)> k0, k1;
    hn::LoadInterleaved2(d, key + 2 * i, k0, k1);
    const auto q0 = load_f32(d, query + i), q1 = load_f32(d, query + pairs + i);
    store_f32(d, hn::MulAdd(q0, k0, hn::Mul(q1, k1)), terms + i);
    store_f32(d, hn::MulSub(q0, k1, hn::Mul(q1, k0)), terms + pairs + i);
  };
  const Part d;
  size_t i = 0;
  for (; i + hn::Lanes(d) <= pairs; i += hn::Lanes(d)) some(d, i);
  for (; i < pairs; ++i) some(hn::CappedTag<float, 1>(), i);
}

#if HWY_TARGET == HWY_SCALAR
// out [4] = row . terms, [width] each, of four rows.
void dots(const float* const* rows, const float* terms, size_t width, float* out) {
  for (size_t row = 0; row < 4; ++row) {
    out[row] = 0;
    for (size_t i = 0; i < width; ++i) out[row] += rows[row][i] * terms[i];
  }
}
#else
// Sums of a, b, c and d, side by side. All four are summed in the same order.
template <class D, class V = hn::Vec<D> >
HWY_INLINE hn::Vec<hn::FixedTag<float, 4> > sums(D d, V a, V b, V c, V e) {
  const hn::FixedTag<float, 4> four;
  if constexpr (hn::MaxLanes(d) == 8) {
    const auto fold = [four](V x)
                          HWY_ATTR { return hn::Add(hn::LowerHalf(x), hn::UpperHalf(four, x)); };
    return sums(four, fold(a), fold(b), fold(c), fold(e));
  } else {
    const auto ac = hn::Add(hn::InterleaveLower(a, c), hn::InterleaveUpper(d, a, c));
    const auto be = hn::Add(hn::InterleaveLower(b, e), hn::InterleaveUpper(d, b, e));
    return hn::Add(hn::InterleaveLower(ac, be), hn::InterleaveUpper(d, ac, be));
  }
}

// out [4] = row . terms, [width] each, of four rows; all four are summed in the same order.
HWY_INLINE void dots(const float* const* rows, const float* terms, size_t width, float* out) {
  const Part d;
  auto a = hn::Zero(d), b = a, c = a, e = a;
  size_t i = 0;
  for (; i + hn::Lanes(d) <= width; i += hn::Lanes(d)) {
    const auto term = load_f32(d, terms + i);
    a = hn::MulAdd(load_f32(d, rows[0] + i), term, a);
    b = hn::MulAdd(load_f32(d, rows[1] + i), term, b);
    c = hn::MulAdd(load_f32(d, rows[2] + i), term, c);
    e = hn::MulAdd(load_f32(d, rows[3] + i), term, e);
  }
  hn::StoreU(sums(d, a, b, c, e), hn::FixedTag<float, 4>(), out);
  for (; i < width; ++i) {
    for (size_t row = 0; row < 4; ++row) out[row] += rows[row][i] * terms[i];
  }
}
#endif

// age_biases().
void biases_of(const AgeTable& table, const KeyGroups& groups, const float* query, int64_t now,
               float* rows, float* biases) {
  const auto pairs = static_cast<size_t>(table.pairs);
  const size_t width = 2 * pairs;
  const auto row_at = [&](int64_t frame) {
    const int64_t age = std::clamp<int64_t>(now - frame, 0, table.num_ages - 1);
    return table.phases + static_cast<size_t>(age) * width;
  };
  std::array<float, 2 * TimeRotation::kMaxPairs> terms;
  // Far below the largest f32, and far more than a weight that still means something.
  constexpr float kMostNats = 80;
  float* logits = rows;
  float* weights = rows + groups.size() * static_cast<int64_t>(kMostSightings);
  size_t used = 0;
  for (int64_t group = 0; group < groups.size(); ++group) {
    // Of each key a part is read, too far apart for the processor to guess.
    constexpr int64_t kAhead = 12;
    if (group + kAhead < groups.size()) {
      const float* key = groups.key(group + kAhead);
      for (size_t i = 0; i <= width; i += 16) hwy::Prefetch(key + i);
    }
    if (groups.count(group) == 1) continue;
    turn_terms(query, groups.key(group), pairs, terms.data());
    const float* newest = row_at(groups.newest(group));
    std::array<const float*, kMostSightings> seen;
    seen.fill(newest);
    const auto sightings = groups.sightings(group);
    for (size_t i = 0; i < kMostSightings; ++i) weights[used + i] = 0;
    for (size_t i = 0; i < sightings.size(); ++i) {
      seen[i] = row_at(sightings[i].middle());
      weights[used + i] = static_cast<float>(sightings[i].count);
    }
    const std::array<const float*, 4> shown = {newest, newest, newest, newest};
    std::array<float, 4> own;
    dots(shown.data(), terms.data(), width, own.data());
    for (size_t i = 0; i < kMostSightings; i += 4)
      dots(seen.data() + i, terms.data(), width, logits + used + i);
    for (size_t i = 0; i < kMostSightings; ++i)
      logits[used + i] = std::min(logits[used + i] - own[0], kMostNats);
    used += kMostSightings;
  }
  for_lanes(used, [&](auto d, size_t i) HWY_ATTR {
    const auto mass = hn::Exp(d, load_f32(d, logits + i));
    store_f32(d, hn::Mul(mass, load_f32(d, weights + i)), logits + i);
  });
  used = 0;
  for (int64_t group = 0; group < groups.size(); ++group) {
    biases[group] = 1;
    if (groups.count(group) == 1) continue;
    float mass = 0;
    for (size_t i = 0; i < kMostSightings; ++i) mass += logits[used + i];
    biases[group] = mass;
    used += kMostSightings;
  }
  for_lanes(static_cast<size_t>(groups.size()), [&](auto d, size_t i) HWY_ATTR {
    store_f32(d, hn::Log(d, load_f32(d, biases + i)), biases + i);
  });
}

}  // namespace longtake::HWY_NAMESPACE

HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace longtake {

static_assert(kMostSightings == 8);

HWY_EXPORT(biases_of);

void age_biases(const AgeTable& table, const KeyGroups& groups, const float* query, int64_t now,
                float* rows, float* biases) {
  HWY_DYNAMIC_DISPATCH(biases_of)(table, groups, query, now, rows, biases);
}

}  // namespace longtake
#endif  // HWY_ONCE
