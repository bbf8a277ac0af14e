// Policy `tempcache`: what merging may change (nothing, for equal keys), and what bounds it.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "attention/attend.h"
#include "base/error.h"
#include "base/philox.h"
#include "each_target.h"
#include "kv/cache.h"
#include "kv/tempcache_ages.h"
#include "kv/tempcache_groups.h"
#include "kv/tempcache_metric.h"
#include "kv/time_rotation.h"

namespace longtake {
namespace {

constexpr int64_t kHeads = 2;
constexpr int64_t kDim = 32;
constexpr int64_t kTokens = 64;
constexpr int64_t kTimePairs = 4;

Tensor random_rows(uint32_t seed, int64_t tokens = kTokens, DType dtype = DType::kF32) {
  Tensor wide(Device{}, DType::kF32, {tokens, kHeads, kDim});
  fill_normal(99, seed, 0, wide.data<float>(), wide.numel());
  if (dtype == DType::kF32) return wide;
  Tensor out(Device{}, dtype, wide.shape());
  for (int64_t i = 0; i < wide.numel(); ++i) out.data<bf16>()[i] = bf16(wide.data<float>()[i]);
  return out;
}

// x plus `size` times noise.
Tensor near(const Tensor& x, float size, uint32_t seed) {
  Tensor out = x.clone();
  const Tensor noise = random_rows(seed, x.dim(0));
  for (int64_t i = 0; i < x.numel(); ++i) out.data<float>()[i] += size * noise.data<float>()[i];
  return out;
}

// Rotated as a model does at `frame`: the first pairs in time, the others not at all.
Tensor at_time(const Tensor& x, int64_t frame) {
  Tensor out = x.clone();
  const TimeRotation rotation(kTimePairs, 10000, frame);
  for (int64_t row = 0; row < x.dim(0) * kHeads; ++row)
    rotation.apply(out.data<float>() + row * kDim);
  return out;
}

CacheOptions options_of(const std::string& memory) {
  CacheOptions options;
  options.memory = memory;
  options.dtype = DType::kF32;
  options.num_heads = kHeads;
  options.head_dim = kDim;
  options.tokens_per_frame = kTokens;
  options.tempcache.exact_frames = 2;
  return options;
}

std::vector<float> attended(Context& ctx, const KvCache& cache, const Tensor& q) {
  Tensor out(Device{}, DType::kF32, q.shape());
  attend(ctx, q, cache.view(), 1.0F / std::sqrt(float{kDim}), out);
  return {out.data<float>(), out.data<float>() + out.numel()};
}

double relative_error(const std::vector<float>& found, const std::vector<float>& expected) {
  double error = 0;
  double norm = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    error += std::pow(double{found[i]} - double{expected[i]}, 2);
    norm += std::pow(double{expected[i]}, 2);
  }
  return std::sqrt(error / norm);
}

// The lemma itself, on groups alone: m equal keys are one key of the mean value with bias log m,
// however they are grouped and in whatever order the groups merge.
TEST(KeyGroups, EqualKeysMergeExactlyInAnyGroupingAndOrder) {
  constexpr int64_t kKinds = 12;
  constexpr int64_t kKeys = 200;
  const std::vector<float> kinds = [] {
    std::vector<float> out(kKinds * kDim);
    fill_normal(1, 0, 0, out.data(), kKinds * kDim);
    return out;
  }();
  std::vector<float> values(kKeys * kDim);
  fill_normal(2, 0, 0, values.data(), kKeys * kDim);
  std::vector<float> q(kDim);
  fill_normal(3, 0, 0, q.data(), kDim);
  const auto softmax = [&](const KeyGroups& groups, bool log_count) {
    std::vector<double> out(kDim, 0.0);
    double total = 0;
    for (int64_t g = 0; g < groups.size(); ++g) {
      double logit = log_count ? std::log(static_cast<double>(groups.count(g))) : 0;
      for (int64_t d = 0; d < kDim; ++d)
        logit += double{q[static_cast<size_t>(d)]} * double{groups.key(g)[d]} / std::sqrt(kDim);
      const double weight = std::exp(logit);
      total += weight;
      for (int64_t d = 0; d < kDim; ++d)
        out[static_cast<size_t>(d)] += weight * double{groups.value(g)[d]};
    }
    return std::vector<float>([&] {
      std::vector<float> mean;
      for (const double x : out) mean.push_back(static_cast<float>(x / total));
      return mean;
    }());
  };
  const auto kind_of = [](int64_t i) { return i * i % kKinds; };
  for (const GroupKey rule : {GroupKey::kMean, GroupKey::kNewest}) {
    KeyGroups plain(kDim, rule);
    for (int64_t i = 0; i < kKeys; ++i)
      plain.add(kinds.data() + kind_of(i) * kDim, values.data() + i * kDim, 1, i);
    const auto full = softmax(plain, true);
    for (uint32_t seed = 0; seed < 5; ++seed) {
      KeyGroups groups = plain;
      for (uint32_t turn = 0; turn < 600; ++turn) {
        const auto words = philox4x32_10({turn, seed, 0, 0}, 4);
        const auto a = static_cast<int64_t>(words[0] % static_cast<uint32_t>(groups.size()));
        const auto b = static_cast<int64_t>(words[1] % static_cast<uint32_t>(groups.size()));
        if (a == b || !std::equal(groups.key(a), groups.key(a) + kDim, groups.key(b))) continue;
        groups.merge(a, groups.key(b), groups.value(b), groups.count(b), groups.newest(b));
        groups.remove(b);
      }
      EXPECT_LT(groups.size(), kKeys / 2);
      EXPECT_LT(relative_error(softmax(groups, true), full), 1e-5);
      EXPECT_GT(relative_error(softmax(groups, false), full), 1e-3);  // the bias matters
    }
  }
}

TEST(KeyGroups, MeansAreAssociative) {
  const Tensor rows = random_rows(5);
  const float* x = rows.data<float>();
  const auto joined = [&](const std::vector<int64_t>& order) {
    KeyGroups groups(kDim, GroupKey::kMean);
    for (const int64_t i : order) {
      if (groups.size() == 0)
        groups.add(x + i * kDim, x + (i + 50) * kDim, 1, i);
      else
        groups.merge(0, x + i * kDim, x + (i + 50) * kDim, 1, i);
    }
    return groups;
  };
  const KeyGroups once = joined({0, 1, 2, 3, 4, 5, 6, 7});
  KeyGroups twice = joined({6, 2, 4});
  const KeyGroups other = joined({1, 7, 0, 5, 3});
  twice.merge(0, other.key(0), other.value(0), other.count(0), other.newest(0));
  EXPECT_EQ(twice.count(0), 8);
  EXPECT_EQ(twice.newest(0), 7);
  for (int64_t d = 0; d < kDim; ++d) {
    EXPECT_NEAR(twice.key(0)[d], once.key(0)[d], 1e-6);
    EXPECT_NEAR(twice.value(0)[d], once.value(0)[d], 1e-6);
  }
}

TEST(KeyGroups, TheStalestAreOldThenSmallThenFirst) {
  const std::vector<float> row(kDim, 1.0F);
  KeyGroups groups(kDim, GroupKey::kMean);
  const int64_t counts_and_frames[][2] = {{1, 9}, {5, 3}, {2, 3}, {2, 3}, {9, 2}};
  for (const auto& [count, frame] : counts_and_frames)
    groups.add(row.data(), row.data(), count, frame);
  EXPECT_EQ(groups.stalest(3), (std::vector<int64_t>{4, 3, 2}));
  EXPECT_EQ(groups.stalest(4), (std::vector<int64_t>{4, 3, 2, 1}));
  EXPECT_TRUE(groups.stalest(0).empty());
}

// Distances are the root mean square of logit differences over the queries seen.
TEST(KeyMetric, MeasuresExpectedLogitErrors) {
  constexpr int64_t kQueries = 400;
  std::vector<float> q(kQueries * kDim);
  fill_normal(7, 0, 0, q.data(), kQueries * kDim);
  for (int64_t i = 0; i < kQueries * kDim; ++i)  // some channels matter more; all share a part
    q[static_cast<size_t>(i)] = q[static_cast<size_t>(i)] * static_cast<float>(i % kDim % 5) + 0.7F;
  const Tensor keys = random_rows(8);
  KeyMetric metric(kDim, MergeRule::kNats);
  metric.observe(q.data(), kQueries);
  metric.refresh(keys.data<float>(), kTokens);
  for (int64_t pair = 0; pair < 10; ++pair) {
    const float* a = keys.data<float>() + pair * kDim;
    const float* b = a + 20 * kDim;
    double expected = 0;
    for (int64_t i = 0; i < kQueries; ++i) {
      double logit = 0;
      for (int64_t d = 0; d < kDim; ++d)
        logit += double{q[static_cast<size_t>(i * kDim + d)]} * (double{a[d]} - double{b[d]});
      expected += logit * logit / kDim / kQueries;
    }
    std::vector<float> x(kDim);
    std::vector<float> y(kDim);
    metric.map(a, x.data());
    metric.map(b, y.data());
    double found = 0;
    for (size_t d = 0; d < kDim; ++d) found += std::pow(double{x[d]} - double{y[d]}, 2);
    EXPECT_NEAR(std::sqrt(found), std::sqrt(expected), 1e-3 * std::sqrt(expected));
  }
}

class TempCacheTest : public testing::TestWithParam<AnnEngine> {
 protected:
  CacheOptions options(const std::string& memory = "tempcache") const {
    CacheOptions out = options_of(memory);
    out.tempcache.ann = GetParam();
    return out;
  }

  Context ctx_{Device{}, 2};
};

// A scene that stands still: the same keys in every frame, other values.
TEST_P(TempCacheTest, DuplicatedKeysAttendAsFullHistory) {
  CacheOptions merged_options = options();
  merged_options.tempcache.bias = GroupBias::kLogCount;
  merged_options.tempcache.merge_threshold = 1e-3;
  const auto merged = make_cache(ctx_, merged_options);
  const auto full = make_cache(ctx_, options("full"));
  const Tensor keys = random_rows(1);
  for (int64_t frame = 0; frame < 12; ++frame) {
    const Tensor values = random_rows(static_cast<uint32_t>(100 + frame));
    for (KvCache* cache : {merged.get(), full.get()}) cache->commit(ctx_, keys, values, {frame, 1});
  }
  // The sink, one frame of groups, two exact frames.
  EXPECT_EQ(merged->entries(), 4 * kTokens);
  EXPECT_EQ(merged->merge_counts().merged, kHeads * 8 * kTokens);
  const Tensor q = random_rows(2);
  EXPECT_LT(relative_error(attended(ctx_, *merged, q), attended(ctx_, *full, q)), 1e-5);
}

// The same, but the temporal rotation moves the keys: only without it do they match.
TEST_P(TempCacheTest, StillThingsMatchForEver) {
  CacheOptions turning = options();
  turning.tempcache.time_pairs = kTimePairs;
  turning.tempcache.merge_threshold = 0.05;
  CacheOptions blind = turning;
  blind.tempcache.time_pairs = 0;
  const auto merged = make_cache(ctx_, turning);
  const auto missed = make_cache(ctx_, blind);
  const Tensor keys = random_rows(1);
  for (int64_t frame = 0; frame < 9; ++frame) {
    const Tensor k = at_time(keys, 100 * frame);
    for (KvCache* cache : {merged.get(), missed.get()}) cache->commit(ctx_, k, k, {100 * frame, 1});
  }
  EXPECT_EQ(merged->entries(), 4 * kTokens);
  EXPECT_EQ(missed->merge_counts().merged, 0);
}

// The same thing seen at several times: every member counts with the logit of its own age, so that
// the query which the bias knows attends as over the full history.
TEST_P(TempCacheTest, BiasByAgesIsExactForTheMeanQuery) {
  CacheOptions turning = options();
  turning.tempcache.time_pairs = kTimePairs;
  turning.tempcache.merge_threshold = 0.05;
  CacheOptions by_count = turning;
  by_count.tempcache.bias = GroupBias::kLogCount;
  CacheOptions all = options("full");
  const auto merged = make_cache(ctx_, turning);
  const auto counted = make_cache(ctx_, by_count);
  const auto full = make_cache(ctx_, all);
  const Tensor keys = random_rows(1);
  Tensor q = random_rows(2);  // one query, which every token asks
  for (int64_t row = 1; row < kTokens; ++row)
    std::copy_n(q.data<float>(), kHeads * kDim, q.data<float>() + row * kHeads * kDim);
  constexpr int64_t kLast = 10;
  for (int64_t frame = 0; frame < kLast; ++frame) {
    const Tensor k = at_time(keys, frame);
    const Tensor v = random_rows(100);
    for (KvCache* cache : {merged.get(), counted.get(), full.get()}) {
      cache->observe_reads(ctx_, at_time(q, frame));
      cache->commit(ctx_, k, v, {frame, 1});
    }
  }
  EXPECT_EQ(merged->entries(), 4 * kTokens);
  const Tensor asks = at_time(q, kLast);
  const auto exact = attended(ctx_, *full, asks);
  EXPECT_LT(relative_error(attended(ctx_, *merged, asks), exact), 1e-5);
  EXPECT_GT(relative_error(attended(ctx_, *counted, asks), exact), 1e-2);
}

INSTANTIATE_TEST_SUITE_P(Ages, EachTarget, all_targets(), target_name);

// Biases against their definition in double, for numbers of pairs that fill no vector.
TEST_P(EachTarget, BiasesAreThoseOfTheDefinition) {
  constexpr int64_t kNow = 40;
  for (const int64_t pairs : {1, 4, 7, 8, 13}) {
    SCOPED_TRACE(pairs);
    const int64_t dim = 2 * pairs + 3;
    std::vector<float> rows(static_cast<size_t>(dim * 12));
    fill_normal(5, static_cast<uint32_t>(pairs), 0, rows.data(), dim * 12);
    const float* query = rows.data() + 11 * dim;
    KeyGroups groups(dim, GroupKey::kMean);
    for (int64_t group = 0; group < 11; ++group) {
      groups.add(rows.data() + group * dim, rows.data() + group * dim, 1, group);
      for (int64_t i = 0; i < group; ++i)  // seen in 1 .. 11 frames, of which 8 are told apart
        groups.merge(group, groups.key(group), groups.value(group), 1 + i % 2, group + 2 * i + 1);
    }
    KeyAges ages(dim, pairs, 10000);
    ages.reach(kNow);
    std::vector<float> biases(11), scratch;
    ages.biases(groups, query, kNow, biases.data(), scratch);
    for (int64_t group = 0; group < 11; ++group) {
      const auto logit = [&](int64_t frame) {
        double sum = 0;
        for (int64_t i = 0; i < pairs; ++i) {
          const double angle =
              static_cast<double>(kNow - frame) *
              std::pow(10000, -static_cast<double>(i) / static_cast<double>(pairs));
          const float* q = query + 2 * i;
          const float* k = groups.key(group) + 2 * i;
          sum += (double{q[0]} * double{k[0]} + double{q[1]} * double{k[1]}) * std::cos(angle) +
                 (double{q[0]} * double{k[1]} - double{q[1]} * double{k[0]}) * std::sin(angle);
        }
        return sum / std::sqrt(static_cast<double>(dim));
      };
      double mass = 0;
      for (const Sighting& seen : groups.sightings(group))
        mass += seen.count * std::exp(logit(seen.middle()) - logit(groups.newest(group)));
      EXPECT_NEAR(double{biases[static_cast<size_t>(group)]}, std::log(mass), 2e-5) << group;
    }
    EXPECT_EQ(biases[0], 0);
  }
}

// Sightings: the newest frames stand alone, older ones share, and none is lost.
TEST(KeyGroups, RemembersWhenItsMembersWereSeen) {
  const std::vector<float> row(kDim, 1.0F);
  KeyGroups groups(kDim, GroupKey::kMean);
  groups.add(row.data(), row.data(), 1, 0);
  for (int64_t frame = 1; frame < 300; ++frame) {
    groups.merge(0, row.data(), row.data(), 1, frame);
    const auto seen = groups.sightings(0);
    int64_t count = 0;
    for (size_t i = 0; i < seen.size(); ++i) {
      count += seen[i].count;
      EXPECT_EQ(seen[i].last - seen[i].first + 1, seen[i].count);
      if (i > 0) {
        EXPECT_EQ(seen[i].first, seen[i - 1].last + 1);
      }
    }
    EXPECT_EQ(count, frame + 1);
    EXPECT_EQ(seen.front().first, 0);
    EXPECT_EQ(seen.back().last, frame);
  }
  const auto seen = groups.sightings(0);
  EXPECT_EQ(seen.size(), kMostSightings);
  EXPECT_LE(seen.back().count, 2);
  EXPECT_GT(seen.front().count, 50);
}

TEST(KeyGroups, NoMemberIsOutsideTheRadius) {
  const Tensor rows = random_rows(6);
  const float* x = rows.data<float>();
  for (const GroupKey rule : {GroupKey::kMean, GroupKey::kNewest}) {
    KeyGroups groups(kDim, rule);
    groups.add(x, x, 1, 0);
    EXPECT_EQ(groups.radius(0), 0);
    for (int64_t i = 1; i < 20; ++i) {
      double square = 0;
      for (int64_t d = 0; d < kDim; ++d)
        square += std::pow(double{x[i * kDim + d]} - double{groups.key(0)[d]}, 2);
      const float predicted = groups.radius_with(0, static_cast<float>(std::sqrt(square)));
      groups.merge(0, x + i * kDim, x + i * kDim, 1, i);
      EXPECT_NEAR(groups.radius(0), predicted, 1e-4);
      for (int64_t j = 0; j <= i; ++j) {
        square = 0;
        for (int64_t d = 0; d < kDim; ++d)
          square += std::pow(double{x[j * kDim + d]} - double{groups.key(0)[d]}, 2);
        EXPECT_LE(std::sqrt(square), double{groups.radius(0)} * (1 + 1e-5));
      }
    }
  }
}

// With max_error no member's key is farther from what stands for it than so many nats.
TEST_P(TempCacheTest, MaxErrorLimitsMerging) {
  int64_t last = 0;
  for (const double most : {0.2, 1.0, 100.0}) {
    CacheOptions limited = options();
    limited.tempcache.max_error = most;
    limited.tempcache.merge_threshold = 0;  // means nothing beside it
    const auto cache = make_cache(ctx_, limited);
    const Tensor keys = random_rows(1);
    for (int64_t frame = 0; frame < 10; ++frame) {
      const Tensor k = near(keys, 0.1F, static_cast<uint32_t>(200 + frame));
      cache->observe_queries(ctx_, random_rows(static_cast<uint32_t>(400 + frame)), {frame, 1});
      cache->commit(ctx_, k, k, {frame, 1});
    }
    EXPECT_GE(cache->merge_counts().merged, last);
    if (most == 0.2) {
      EXPECT_EQ(cache->merge_counts().merged, 0);
    }
    last = cache->merge_counts().merged;
    std::vector<double> low(static_cast<size_t>(cache->entries()), 0.0), high = low;
    std::vector<float> q(kDim, 1.0F);  // no longer than the longest query of these frames
    cache->bound_log_mass(0, q.data(), 10, low.data(), high.data());
    for (size_t i = 0; i < low.size(); ++i) EXPECT_LE((high[i] - low[i]) / 2, most);
  }
  EXPECT_EQ(last, kHeads * 6 * kTokens);
}

TEST_P(TempCacheTest, ZeroToleranceChangesNoBit) {
  // Without time pairs the keys that come again are equal to the bit.
  for (const auto& [dtype, time_pairs] : {std::pair(DType::kF32, int64_t{0}),
                                          {DType::kF32, kTimePairs},
                                          {DType::kBF16, kTimePairs}}) {
    CacheOptions strict = options();
    strict.dtype = dtype;
    strict.tempcache.time_pairs = time_pairs;
    strict.tempcache.merge_threshold = 0;
    CacheOptions all = options("full");
    all.dtype = dtype;
    const auto merged = make_cache(ctx_, strict);
    const auto full = make_cache(ctx_, all);
    for (int64_t frame = 0; frame < 10; ++frame) {
      const Tensor k = random_rows(static_cast<uint32_t>(frame % 4), kTokens, dtype);
      const Tensor v = random_rows(static_cast<uint32_t>(50 + frame), kTokens, dtype);
      merged->observe_queries(ctx_, k, {frame, 1});
      for (KvCache* cache : {merged.get(), full.get()}) cache->commit(ctx_, k, v, {frame, 1});
    }
    const Tensor q = random_rows(77, kTokens, dtype);
    EXPECT_EQ(attended(ctx_, *merged, q), attended(ctx_, *full, q));
  }
}

// A group is in the bucket of its newest member; under a budget buckets move with their groups.
TEST_P(TempCacheTest, BucketsAreThoseOfTheNewestMembers) {
  CacheOptions merging = options();
  merging.tempcache.merge_threshold = 1e-3;
  CacheOptions bounded = options();
  bounded.tempcache.budget_tokens = 4 * kTokens + 9;
  bounded.tempcache.merge_threshold = 0;
  const auto merged = make_cache(ctx_, merging);
  const auto moved = make_cache(ctx_, bounded);
  for (int64_t frame = 0; frame < 9; ++frame) {
    const Tensor still = random_rows(1), values = random_rows(static_cast<uint32_t>(50 + frame));
    // The first number of a new key says which bucket it is in.
    Tensor fresh = random_rows(static_cast<uint32_t>(100 + frame));
    std::vector<Bucket> buckets;
    for (int64_t t = 0; t < kTokens; ++t) {
      buckets.push_back(static_cast<Bucket>(frame * kTokens + t));
      for (int64_t head = 0; head < kHeads; ++head)
        fresh.data<float>()[(t * kHeads + head) * kDim] = static_cast<float>(buckets.back());
    }
    for (KvCache* cache : {merged.get(), moved.get()}) cache->set_buckets(buckets);
    merged->commit(ctx_, still, values, {frame, 1});
    moved->commit(ctx_, fresh, values, {frame, 1});
  }
  // Sink, groups whose newest members are of frame 6, exact frames 7 and 8.
  const PageList& pages = merged->view().heads[1];
  ASSERT_EQ(pages.size(), 4U);
  for (const auto& [page, frame] : {std::pair(0U, 0), {1U, 6}, {2U, 7}, {3U, 8}}) {
    for (int64_t slot = 0; slot < kTokens; ++slot)
      EXPECT_EQ(pages[page].buckets[slot] / kTokens, frame) << page;
  }
  EXPECT_GT(moved->merge_counts().evicted, 0);
  std::vector<float> key(kDim), value(kDim);
  for (const KvPage& page : moved->view().heads[0]) {
    for (int64_t slot = 0; slot < page.num_keys; ++slot) {
      read_token(page, DType::kF32, kDim, slot, key.data(), value.data());
      EXPECT_EQ(static_cast<float>(page.buckets[slot]), key[0]);
    }
  }
}

// Look-alikes of one frame stay apart: each group takes one of them.
TEST_P(TempCacheTest, OneNewKeyPerGroupAndFrame) {
  CacheOptions loose = options();
  loose.tempcache.merge_threshold = 100;
  loose.tempcache.bias = GroupBias::kLogCount;
  const auto cache = make_cache(ctx_, loose);
  Tensor same = random_rows(1);
  for (int64_t row = 1; row < kTokens; ++row)
    std::copy_n(same.data<float>(), kHeads * kDim, same.data<float>() + row * kHeads * kDim);
  for (int64_t frame = 0; frame < 8; ++frame) cache->commit(ctx_, same, same, {frame, 1});
  // Five frames have joined the groups: no group has more members.
  float most = 0;
  for (const KvPage& page : cache->view().heads[0])
    most = std::max(most, *std::max_element(page.bias, page.bias + page.num_keys));
  EXPECT_FLOAT_EQ(most, std::log(5.0F));
}

TEST_P(TempCacheTest, TheBudgetHoldsAndSparesSinkAndNewest) {
  CacheOptions bounded = options();
  bounded.tempcache.budget_tokens = 5 * kTokens + 7;
  bounded.tempcache.merge_threshold = 0.05;
  const auto cache = make_cache(ctx_, bounded);
  const size_t bytes = cache->bytes();
  for (int64_t frame = 0; frame < 20; ++frame) {
    const Tensor k = random_rows(static_cast<uint32_t>(frame));
    cache->set_current(ctx_, k, k);
    cache->commit(ctx_, k, k, {frame, 1});
    EXPECT_LE(cache->entries(), bounded.tempcache.budget_tokens);
  }
  EXPECT_EQ(cache->entries(), bounded.tempcache.budget_tokens);
  EXPECT_EQ(cache->merge_counts().evicted, kHeads * (20 * kTokens - cache->entries()));
  EXPECT_EQ(cache->bytes(), bytes);
  // A query that is a remembered key finds its value; a forgotten one does not.
  for (const auto& [frame, kept] : {std::pair(0U, true), {19U, true}, {17U, true}, {3U, false}}) {
    Tensor q = random_rows(frame);
    for (int64_t i = 0; i < q.numel(); ++i) q.data<float>()[i] *= 20;
    const Tensor value = random_rows(frame);
    const std::vector<float> expected(value.data<float>(), value.data<float>() + value.numel());
    EXPECT_EQ(relative_error(attended(ctx_, *cache, q), expected) < 1e-3, kept) << frame;
  }
}

// One head sees a scene that stands still, the other ever new things: what the first does not need
// is the second's, and the sum holds.
// A layer's share counts beyond the least that works; the shares of all add up to the budgets.
TEST_P(TempCacheTest, LayersShareABudget) {
  constexpr int64_t kLeast = 4 * kTokens;  // sink, exact frames and one more
  CacheOptions bounded = options();
  bounded.tempcache.budget_tokens = kLeast + 2 * kTokens;
  bounded.tempcache.merge_threshold = 0;
  bounded.layer_shares = {0.5, 1.5};
  int64_t sum = 0;
  for (const int64_t layer : {0, 1}) {
    bounded.layer = layer;
    const auto cache = make_cache(ctx_, bounded);
    for (int64_t frame = 0; frame < 12; ++frame) {
      const Tensor k = random_rows(static_cast<uint32_t>(frame));
      cache->commit(ctx_, k, k, {frame, 1});
    }
    EXPECT_EQ(cache->entries(), kLeast + (1 + 2 * layer) * kTokens);
    sum += cache->entries();
  }
  EXPECT_EQ(sum, 2 * bounded.tempcache.budget_tokens);
  bounded.layer = 2;
  EXPECT_THROW(make_cache(ctx_, bounded), Error);
  bounded.layer = -1;
  EXPECT_NO_THROW(make_cache(ctx_, bounded));
}

TEST_P(TempCacheTest, HeadsShareABudgetByNeed) {
  CacheOptions even = options();
  even.tempcache.budget_tokens = 6 * kTokens;
  even.tempcache.merge_threshold = 0.05;
  CacheOptions need = even;
  need.tempcache.shares = BudgetShares::kNeed;
  const auto by_head = make_cache(ctx_, even);
  const auto shared = make_cache(ctx_, need);
  const size_t bytes = shared->bytes();
  const Tensor still = random_rows(1);
  for (int64_t frame = 0; frame < 24; ++frame) {
    const Tensor k = random_rows(static_cast<uint32_t>(100 + frame));
    for (int64_t t = 0; t < kTokens; ++t)
      std::copy_n(still.data<float>() + t * kHeads * kDim, kDim,
                  k.data<float>() + t * kHeads * kDim);
    for (KvCache* cache : {by_head.get(), shared.get()}) {
      cache->set_current(ctx_, k, k);
      cache->commit(ctx_, k, k, {frame, 1});
      EXPECT_LE(cache->total_entries(), kHeads * need.tempcache.budget_tokens);
    }
  }
  // Sink, 2 exact frames and one of groups in the first head.
  EXPECT_EQ(by_head->total_entries(), (4 + 6) * kTokens);
  EXPECT_EQ(shared->total_entries(), 2 * 6 * kTokens);
  EXPECT_EQ(shared->entries(), 8 * kTokens);
  EXPECT_EQ(shared->bytes(), bytes);
  EXPECT_EQ(shared->merge_counts().evicted, by_head->merge_counts().evicted - 2 * kTokens);
}

TEST_P(TempCacheTest, SavedAndLoadedItContinuesBitForBit) {
  CacheOptions bounded = options();
  bounded.tempcache.budget_tokens = 6 * kTokens;
  bounded.tempcache.time_pairs = kTimePairs;
  bounded.tempcache.shares = BudgetShares::kNeed;
  bounded.tempcache.max_error = 3;
  const auto one = make_cache(ctx_, bounded);
  const auto other = make_cache(ctx_, bounded);
  const Tensor keys = random_rows(1);
  const auto play = [&](KvCache& cache, int64_t frame) {
    const Tensor k = at_time(near(keys, 0.4F, static_cast<uint32_t>(200 + frame)), frame);
    const Tensor v = random_rows(static_cast<uint32_t>(300 + frame));
    cache.observe_queries(ctx_, at_time(random_rows(static_cast<uint32_t>(400 + frame)), frame),
                          {frame, 1});
    cache.observe_reads(ctx_, at_time(random_rows(static_cast<uint32_t>(500 + frame)), frame));
    cache.commit(ctx_, k, v, {frame, 1});
  };
  for (int64_t frame = 0; frame < 11; ++frame) play(*one, frame);
  EXPECT_GT(one->merge_counts().merged, 0);
  EXPECT_GT(one->merge_counts().evicted, 0);
  std::stringstream state;
  one->save(state);
  for (int64_t frame = 0; frame < 5; ++frame) play(*other, frame);  // load replaces it all
  other->load(state);
  const Tensor q = random_rows(2);
  EXPECT_EQ(attended(ctx_, *other, q), attended(ctx_, *one, q));
  for (int64_t frame = 11; frame < 25; ++frame) {
    play(*one, frame);
    play(*other, frame);
  }
  EXPECT_EQ(attended(ctx_, *other, q), attended(ctx_, *one, q));
  EXPECT_EQ(other->merge_counts().merged, one->merge_counts().merged);

  const std::string whole = state.str();
  for (size_t length : {whole.size() - 1, whole.size() / 2, size_t{100}}) {
    std::istringstream cut(whole.substr(0, length));
    EXPECT_THROW(other->load(cut), Error);
    EXPECT_EQ(other->entries(), 0);
  }
}

TEST_P(TempCacheTest, ThePapersRuleKeepsTheNewestKeyAndCounts) {
  CacheOptions paper = options();
  paper.tempcache.rule = MergeRule::kPaper;
  paper.tempcache.merge_threshold = kPaperThreshold;
  const auto cache = make_cache(ctx_, paper);
  const Tensor keys = random_rows(1);
  for (int64_t frame = 0; frame < 6; ++frame)
    cache->commit(ctx_, near(keys, 0.1F, static_cast<uint32_t>(10 + frame)),
                  random_rows(static_cast<uint32_t>(frame)), {frame, 1});
  EXPECT_EQ(cache->entries(), 4 * kTokens);
  const KvPage& groups = cache->view().heads[0][1];
  EXPECT_TRUE(groups.has_bias);
  EXPECT_FLOAT_EQ(groups.bias[0], std::log(3.0F));
}

INSTANTIATE_TEST_SUITE_P(Engines, TempCacheTest,
                         testing::Values(AnnEngine::kLsh, AnnEngine::kQuant),
                         [](const auto& engine) {
                           return engine.param == AnnEngine::kLsh ? "Lsh" : "Quant";
                         });

TEST(TempCacheErrors, AreOneClearLine) {
  Context ctx;
  CacheOptions small = options_of("tempcache");
  small.tempcache.budget_tokens = 3 * kTokens;
  EXPECT_THROW(make_cache(ctx, small), Error);
  CacheOptions negative = options_of("tempcache");
  negative.tempcache.merge_threshold = -1;
  EXPECT_THROW(make_cache(ctx, negative), Error);
  CacheOptions beyond = options_of("tempcache");
  beyond.tempcache.rule = MergeRule::kPaper;
  beyond.tempcache.merge_threshold = 1.5;
  EXPECT_THROW(make_cache(ctx, beyond), Error);
}

// Where nothing merges yet, a reading that moves or hides the sink shows what a window shows.
TEST(TempCache, MovesItsSinkAsAWindowDoes) {
  Context ctx({}, 1);
  std::vector<std::unique_ptr<KvCache>> caches;
  for (const char* memory : {"window", "tempcache"}) {
    CacheOptions options = options_of(memory);
    options.sink_frames = 2;
    options.window_frames = 6;
    options.tempcache.exact_frames = 6;
    options.tempcache.time_pairs = kTimePairs;
    caches.push_back(make_cache(ctx, options));
    for (int64_t frame = 10; frame < 16; ++frame) {
      const Tensor keys = random_rows(static_cast<uint32_t>(frame));
      caches.back()->commit(ctx, keys, keys, {frame, 1});
    }
  }
  using Sink = HistoryReading::Sink;
  for (const auto& [sink, next_frame] :
       {std::pair(Sink::kBeforeWindow, int64_t{16}), std::pair(Sink::kBeforeWindow, int64_t{1000}),
        std::pair(Sink::kHidden, int64_t{16}), std::pair(Sink::kInPlace, int64_t{16})}) {
    HistoryReading reading;
    reading.sink = sink;
    reading.next_frame = next_frame;
    reading.time_pairs = kTimePairs;
    std::vector<Tensor> attended;
    for (const auto& cache : caches) {
      cache->set_reading(ctx, reading);
      const Tensor q = random_rows(1);
      cache->set_current(ctx, q, q);
      attended.emplace_back(Device{}, DType::kF32, q.shape());
      attend(ctx, q, cache->view(), 0.2F, attended.back());
    }
    for (int64_t i = 0; i < attended[0].numel(); ++i)
      ASSERT_NEAR(attended[0].data<float>()[i], attended[1].data<float>()[i], 1e-5)
          << static_cast<int>(sink) << " at " << next_frame;
  }
  for (const auto& cache : caches) {
    cache->forget_window();
    EXPECT_EQ(cache->entries(), 2 * kTokens);
  }
}

}  // namespace
}  // namespace longtake
