// The baseline cache policy `flowcache` against plain loops.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <sstream>

#include "attention/attend.h"
#include "base/error.h"
#include "core_support.h"
#include "device/dispatch.h"
#include "kv/cache.h"

namespace longtake {
namespace {

constexpr int64_t kTokens = 24, kHeads = 2, kDim = 16;

CacheOptions options(DType dtype, int64_t budget, const char* memory = "flowcache") {
  CacheOptions out;
  out.memory = memory;
  out.dtype = dtype;
  out.num_heads = kHeads;
  out.head_dim = kDim;
  out.tokens_per_frame = kTokens;
  out.budget_tokens = budget;
  return out;
}

Tensor frame(DType dtype, int64_t index, uint32_t what) {
  return random_tensor(dtype, {kTokens, kHeads, kDim}, static_cast<uint32_t>(10 * index) + what);
}

void play(Context& ctx, KvCache& cache, DType dtype, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    cache.observe_queries(ctx, frame(dtype, i, 0), {i, 1});
    cache.commit(ctx, frame(dtype, i, 1), frame(dtype, i, 2), {i, 1});
  }
}

class FlowCache : public testing::TestWithParam<DType> {};

TEST_P(FlowCache, UnderItsBudgetItIsTheFullHistory) {
  Context ctx;
  const auto cache = make_cache(ctx, options(GetParam(), 5 * kTokens));
  const auto full = make_cache(ctx, options(GetParam(), 0, "full"));
  play(ctx, *cache, GetParam(), 0, 5);
  play(ctx, *full, GetParam(), 0, 5);
  const Tensor q = frame(GetParam(), 9, 0);
  const Tensor a({}, DType::kF32, q.shape());
  const Tensor b({}, DType::kF32, q.shape());
  attend(ctx, q, cache->view(), 0.25F, a);
  attend(ctx, q, full->view(), 0.25F, b);
  EXPECT_EQ(test::values(a), test::values(b));
  EXPECT_EQ(cache->merge_counts().evicted, 0);
}

TEST_P(FlowCache, BucketsStayWithTheirKeys) {
  Context ctx;
  const auto cache = make_cache(ctx, options(GetParam(), 3 * kTokens + 5));
  for (int64_t i = 0; i < 9; ++i) {
    // The first number of a key says which bucket it is in.
    const Tensor k = frame(GetParam(), i, 1);
    std::vector<Bucket> buckets;
    for (int64_t t = 0; t < kTokens; ++t) {
      buckets.push_back(static_cast<Bucket>(i * kTokens + t));
      for (int64_t head = 0; head < kHeads; ++head) {
        const int64_t at = (t * kHeads + head) * kDim;
        for_float_type(GetParam(), [&]<typename T>() {
          k.data<T>()[at] = static_cast<T>(static_cast<float>(buckets.back()));
        });
      }
    }
    cache->set_buckets(buckets);
    cache->observe_queries(ctx, frame(GetParam(), i, 0), {i, 1});
    cache->commit(ctx, k, frame(GetParam(), i, 2), {i, 1});
  }
  EXPECT_GT(cache->merge_counts().evicted, 0);
  std::vector<float> key(kDim), value(kDim);
  for (const KvPage& page : cache->view().heads[1]) {
    for (int64_t slot = 0; slot < page.num_keys; ++slot) {
      read_token(page, GetParam(), kDim, slot, key.data(), value.data());
      EXPECT_EQ(static_cast<float>(page.buckets[slot]), key[0]);  // below 256: exact in bf16
    }
  }
}

// Which keys stay, by the formula in double over all that was kept so far.
TEST_P(FlowCache, KeepsTheKeysOfHighestScore) {
  constexpr int64_t kBudget = 70, kFrames = 5;
  Context ctx;
  const auto cache = make_cache(ctx, options(GetParam(), kBudget));
  cache->trace_members();
  play(ctx, *cache, GetParam(), 0, kFrames);
  EXPECT_EQ(cache->entries(), kBudget);
  EXPECT_EQ(cache->merge_counts().evicted, kHeads * (kFrames * kTokens - kBudget));
  std::vector<std::vector<double>> frames;  // queries, keys and values of each
  for (int64_t f = 0; f < kFrames; ++f) {
    for (uint32_t what = 0; what < 3; ++what)
      frames.push_back(test::values(frame(GetParam(), f, what)));
  }
  for (int64_t head = 0; head < kHeads; ++head) {
    const auto element = [&](int64_t id, uint32_t what, int64_t d) {
      return frames[static_cast<size_t>(3 * (id / kTokens) + what)]
                   [static_cast<size_t>((id % kTokens * kHeads + head) * kDim + d)];
    };
    std::vector<int64_t> kept;
    for (int64_t f = 0; f < kFrames; ++f) {
      for (int64_t t = 0; t < kTokens; ++t) kept.push_back(f * kTokens + t);
      const auto count = static_cast<int64_t>(kept.size());
      if (count <= kBudget) continue;
      std::vector<std::vector<double>> keys, queries;
      for (const int64_t id : kept) {
        keys.emplace_back();
        for (int64_t d = 0; d < kDim; ++d) keys.back().push_back(element(id, 1, d));
      }
      for (int64_t t = 0; t < kTokens; ++t) {
        queries.emplace_back();
        for (int64_t d = 0; d < kDim; ++d) queries.back().push_back(element(f * kTokens + t, 0, d));
      }
      const auto dot = [](const std::vector<double>& a, const std::vector<double>& b) {
        return std::inner_product(a.begin(), a.end(), b.begin(), 0.0);
      };
      std::vector<double> importance(kept.size(), 0.0), redundancy(kept.size(), 0.0);
      for (const auto& q : queries) {
        double sum = 0;
        for (const auto& k : keys) sum += std::exp(dot(q, k) / 4);
        for (size_t i = 0; i < keys.size(); ++i)
          importance[i] += std::exp(dot(q, keys[i]) / 4) / sum / kTokens;
      }
      double sum = 0;
      for (size_t i = 0; i < keys.size(); ++i) {
        double mean = 0;
        for (size_t j = 0; j < keys.size(); ++j) {
          if (i != j)
            mean += dot(keys[i], keys[j]) /
                    std::sqrt(dot(keys[i], keys[i]) * dot(keys[j], keys[j])) /
                    static_cast<double>(count);
        }
        sum += redundancy[i] = std::exp(mean);
      }
      std::vector<std::pair<double, int64_t>> scores;
      for (int64_t i = 0; i < count; ++i) {
        double best = 0;
        for (int64_t j = std::max<int64_t>(0, i - 3); j <= std::min(count - 1, i + 3); ++j)
          best = std::max(best, importance[static_cast<size_t>(j)]);
        scores.emplace_back(0.07 * best - 0.93 * redundancy[static_cast<size_t>(i)] / sum,
                            kept[static_cast<size_t>(i)]);
      }
      std::sort(scores.rbegin(), scores.rend());
      kept.clear();
      for (int64_t i = 0; i < kBudget; ++i) kept.push_back(scores[static_cast<size_t>(i)].second);
      std::sort(kept.begin(), kept.end());
    }
    std::vector<int64_t> found;
    const std::vector<int32_t> members = cache->members(head, kFrames * kTokens);
    for (int64_t id = 0; id < kFrames * kTokens; ++id) {
      const int32_t entry = members[static_cast<size_t>(id)];
      if (entry < 0) continue;
      EXPECT_EQ(entry, static_cast<int32_t>(found.size())) << "in their order";
      found.push_back(id);
      std::vector<float> key(kDim), value(kDim);
      const KvView view = cache->view();
      read_token(view.heads[static_cast<size_t>(head)][static_cast<size_t>(entry / kPageTokens)],
                 GetParam(), kDim, entry % kPageTokens, key.data(), value.data());
      for (int64_t d = 0; d < kDim; ++d) {
        EXPECT_EQ(key[static_cast<size_t>(d)], element(id, 1, d));
        EXPECT_EQ(value[static_cast<size_t>(d)], element(id, 2, d));
      }
    }
    EXPECT_EQ(found, kept) << "head " << head;
  }
}

TEST_P(FlowCache, StaysConstantAndGoesOnFromASavedState) {
  Context ctx;
  const auto cache = make_cache(ctx, options(GetParam(), 70));
  play(ctx, *cache, GetParam(), 0, 4);
  const size_t bytes = cache->bytes();
  std::stringstream state;
  cache->save(state);
  const auto other = make_cache(ctx, options(GetParam(), 70));
  other->load(state);
  const Tensor q = frame(GetParam(), 9, 0);
  std::vector<std::vector<double>> outputs;
  for (KvCache* each : {cache.get(), other.get()}) {
    play(ctx, *each, GetParam(), 4, 12);
    const Tensor out({}, DType::kF32, q.shape());
    attend(ctx, q, each->view(), 0.25F, out);
    outputs.push_back(test::values(out));
  }
  EXPECT_EQ(outputs[0], outputs[1]);
  EXPECT_EQ(cache->bytes(), bytes);
  EXPECT_EQ(cache->merge_counts().evicted, other->merge_counts().evicted);
}

TEST(FlowCacheOptions, AreChecked) {
  Context ctx;
  EXPECT_THROW(make_cache(ctx, options(DType::kF32, kTokens - 1)), Error);
}

INSTANTIATE_TEST_SUITE_P(All, FlowCache, testing::Values(DType::kF32, DType::kBF16),
                         [](const auto& param) { return std::string(name_of(param.param)); });

}  // namespace
}  // namespace longtake
