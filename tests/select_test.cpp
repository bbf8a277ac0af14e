// AnnSA's choice of pages, against plain loops and against attention over everything.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <set>

#include "ann/project.h"
#include "attention/prompt_buckets.h"
#include "attention/prompt_select.h"
#include "attention/select.h"
#include "base/error.h"
#include "base/philox.h"
#include "core_support.h"
#include "metrics/attention.h"

namespace longtake {
namespace {

struct Problem {
  Problem(DType dtype, int64_t queries, int64_t keys, int64_t heads, int64_t dim)
      : q(random_tensor(dtype, {queries, heads, dim}, 0, 2.0F)),
        k(random_tensor(dtype, {keys, heads, dim}, 1)),
        v(random_tensor(dtype, {keys, heads, dim}, 2)),
        pages(ctx, k, v) {}

  float scale() const { return 1.0F / std::sqrt(static_cast<float>(q.dim(2))); }

  Context ctx;
  Tensor q, k, v;
  KvPages pages;
};

class Select : public testing::TestWithParam<std::tuple<AnnEngine, DType>> {
 protected:
  SelectOptions options(double density, int64_t tile = 32) const {
    return {std::get<0>(GetParam()), density, tile, 3};
  }

  DType dtype() const { return std::get<1>(GetParam()); }
};

TEST_P(Select, EverythingSelectedEqualsDenseBitForBit) {
  for (const auto& [queries, keys] : {std::pair<int64_t, int64_t>{1, 1}, {33, 200}, {128, 1000}}) {
    Problem p(dtype(), queries, keys, 3, 32);
    const auto selector = make_page_selector(p.ctx, 3, 32, options(1));
    const Selection all = selector->select(p.ctx, p.q, p.pages.view(), 0, 0, p.scale());
    const Tensor dense({}, DType::kF32, p.q.shape());
    const Tensor sparse({}, DType::kF32, p.q.shape());
    attend(p.ctx, p.q, p.pages.view(), p.scale(), dense);
    attend_blocks(p.ctx, p.q, p.pages.view(), all, p.scale(), sparse);
    EXPECT_EQ(test::values(sparse), test::values(dense)) << queries << " x " << keys;
    EXPECT_EQ(selector->density(), 1);
  }
}

TEST_P(Select, KeepsBothEndsAndTheDensity) {
  Problem p(dtype(), 70, 64 * 40 + 5, 2, 64);  // 41 pages, the last of 5 keys
  for (const double density : {0.0, 0.1, 0.5}) {
    const auto selector = make_page_selector(p.ctx, 2, 64, options(density, 16));
    const Selection chosen = selector->select(p.ctx, p.q, p.pages.view(), 2, 3, p.scale());
    ASSERT_EQ(chosen.offsets.size(), 2U * 5 + 1);
    for (size_t row = 0; row + 1 < chosen.offsets.size(); ++row) {
      const std::vector<int32_t> list(chosen.pages.begin() + chosen.offsets[row],
                                      chosen.pages.begin() + chosen.offsets[row + 1]);
      EXPECT_TRUE(std::is_sorted(list.begin(), list.end()));
      const std::set<int32_t> pages(list.begin(), list.end());
      EXPECT_EQ(pages.size(), list.size()) << "a page twice";
      for (const int32_t always : {0, 1, 38, 39, 40}) EXPECT_EQ(pages.count(always), 1U) << always;
      if (density == 0) {
        EXPECT_EQ(pages.size(), 5U);
      }
    }
    EXPECT_GE(selector->density(), density);
    EXPECT_LE(selector->density(), std::max(density, 5.0 / 41) + 1.0 / 40);
  }
}

// One page holds keys that look along the queries: both engines must find it.
TEST_P(Select, FindsThePageThatMatters) {
  Problem p(DType::kF32, 32, 64 * 30, 1, 64);
  float* q = p.q.data<float>();
  float* k = p.k.data<float>();
  for (int64_t t = 1; t < 32; ++t) std::copy_n(q, 64, q + t * 64);
  for (int64_t key = 64 * 17; key < 64 * 18; ++key) {
    for (int64_t d = 0; d < 64; ++d) k[key * 64 + d] += 1.5F * q[d];
  }
  const KvPages pages(p.ctx, p.k, p.v);
  const auto selector = make_page_selector(p.ctx, 1, 64, options(0.03));
  const Selection chosen = selector->select(p.ctx, p.q, pages.view(), 0, 0, p.scale());
  EXPECT_EQ(std::vector<int32_t>(chosen.pages.begin(), chosen.pages.end()),
            (std::vector<int32_t>{17}));
  const AttentionScore score =
      score_attention(p.q, pages.view(), pages.view(), &chosen, {}, p.scale(), 8).mean();
  EXPECT_GT(score.recall, 0.95);
  EXPECT_GE(score.oracle + 1e-9, score.recall);
}

TEST_P(Select, LooksAgainAtPagesThatChanged) {
  Problem p(DType::kF32, 32, 64 * 20, 1, 64);
  std::vector<PageList> lists(p.pages.view().heads.begin(), p.pages.view().heads.end());
  const KvView view{DType::kF32, 64, lists};
  const auto selector = make_page_selector(p.ctx, 1, 64, options(0.05));
  selector->select(p.ctx, p.q, view, 0, 0, p.scale());
  const std::vector<float> value(64, 0.0F);
  for (int64_t slot = 0; slot < 64; ++slot) {
    std::vector<float> key(p.q.data<float>(), p.q.data<float>() + 64);
    for (float& x : key) x *= 2;
    write_token(lists[0][9], DType::kF32, 64, slot, key.data(), value.data(), 0);
  }
  for (int64_t t = 1; t < 32; ++t) std::copy_n(p.q.data<float>(), 64, p.q.data<float>() + t * 64);
  const Selection chosen = selector->select(p.ctx, p.q, view, 0, 0, p.scale());
  EXPECT_EQ(std::vector<int32_t>(chosen.pages.begin(), chosen.pages.end()),
            (std::vector<int32_t>{9}));
}

INSTANTIATE_TEST_SUITE_P(All, Select,
                         testing::Combine(testing::Values(AnnEngine::kLsh, AnnEngine::kQuant),
                                          testing::Values(DType::kF32, DType::kBF16)),
                         [](const auto& param) {
                           return std::string(std::get<0>(param.param) == AnnEngine::kLsh
                                                  ? "lsh"
                                                  : "quant") +
                                  "_" + name_of(std::get<1>(param.param));
                         });

// The rule `prompt` in plain loops: pairs of a query and a key in one bucket, counted in double.
TEST(SelectByPrompt, EqualsPlainLoops) {
  constexpr int64_t kHeads = 2, kDim = 16, kQueries = 70, kTile = 32, kPages = 21, kLast = 17;
  constexpr int kBuckets = 12;
  const auto bucket_at = [](uint32_t i, uint32_t what) {
    const uint32_t word = philox4x32_10({i, what, 0, 0}, 9)[0] % (kBuckets + 2);
    return word < kBuckets ? static_cast<Bucket>(word * word) : kNoBucket;
  };
  Context ctx;
  PageStore store({}, DType::kF32, kDim);
  std::vector<PageList> lists(kHeads);
  const std::vector<float> zeros(kDim, 0.0F);
  for (uint32_t head = 0; head < kHeads; ++head) {
    for (uint32_t p = 0; p < kPages; ++p) {
      lists[head].push_back(store.take());
      const int64_t keys = p + 1 == kPages ? kLast : kPageTokens;
      for (uint32_t slot = 0; slot < keys; ++slot) {
        const float bias = p % 5 == 2 ? std::log(1.0F + static_cast<float>(slot % 7)) : 0;
        // Some pages hold one bucket only, that no query has.
        const Bucket bucket = p % 7 == 3 ? Bucket{999} : bucket_at(64 * p + slot, head);
        write_token(lists[head].back(), DType::kF32, kDim, slot, zeros.data(), zeros.data(), bias,
                    bucket);
      }
    }
  }
  std::vector<Bucket> queries;
  for (uint32_t t = 0; t < kQueries; ++t) queries.push_back(bucket_at(t, 77));
  const Tensor q = random_tensor(DType::kF32, {kQueries, kHeads, kDim}, 0);
  for (const double density : {0.0, 0.3, 1.0}) {
    SelectOptions options{AnnEngine::kLsh, density, kTile, 3};
    options.buckets = SelectBuckets::kPrompt;
    const auto selector = make_page_selector(ctx, kHeads, kDim, options);
    const Selection chosen =
        selector->select(ctx, q, {DType::kF32, kDim, lists}, 1, 2, 0.25F, queries);
    size_t row = 0;
    for (size_t head = 0; head < kHeads; ++head) {
      for (int64_t begin = 0; begin < kQueries; begin += kTile, ++row) {
        std::vector<std::pair<double, int32_t>> ranked;  // - pairs, page
        std::set<int32_t> expected;
        double keys = 0;
        for (int32_t p = 0; p < kPages; ++p) {
          const KvPage& page = lists[head][static_cast<size_t>(p)];
          double pairs = 0;
          for (int64_t t = begin; t < std::min(kQueries, begin + kTile); ++t) {
            for (int64_t slot = 0; slot < page.num_keys; ++slot) {
              const Bucket own = queries[static_cast<size_t>(t)];
              if (own != kNoBucket && own == page.buckets[slot])
                pairs += std::exp(double{page.bias[slot]});
            }
          }
          if (p < 1 || p >= kPages - 2) {
            expected.insert(p);
            keys += page.num_keys;
          } else {
            ranked.emplace_back(-pairs, p);
          }
        }
        std::sort(ranked.begin(), ranked.end());
        for (const auto& [pairs, p] : ranked) {
          if (keys >= density * (kPageTokens * (kPages - 1) + kLast) || pairs == 0) break;
          expected.insert(p);
          keys += lists[head][static_cast<size_t>(p)].num_keys;
        }
        const std::set<int32_t> found(chosen.pages.begin() + chosen.offsets[row],
                                      chosen.pages.begin() + chosen.offsets[row + 1]);
        EXPECT_EQ(found, expected) << "head " << head << ", query " << begin << ", " << density;
        EXPECT_EQ(found.count(10), 0U) << "no query is in its bucket";
      }
    }
  }
}

// A token's bucket in double: estimated softmax summed over heads, its largest.
TEST(PromptBuckets, EqualPlainLoops) {
  constexpr int64_t kHeads = 3, kDim = 32, kTokens = 90, kQueries = 120, kSigns = 64;
  constexpr uint64_t kSeed = 5;
  Problem p(DType::kF32, kQueries, kTokens, kHeads, kDim);
  const auto* q = p.q.data<float>();
  const auto* k = p.k.data<float>();
  std::vector<float> directions(kDim * kSigns);
  fill_normal(kSeed, 0, 0, directions.data(), kDim * kSigns);
  const auto rounded = [](std::vector<double> x) {
    double peak = 0;
    for (const double v : x) peak = std::max(peak, std::abs(v));
    for (double& v : x) v = peak / 127 * std::nearbyint(v / (peak / 127));
    return x;
  };
  const auto dot = [](const std::vector<double>& a, const std::vector<double>& b) {
    return std::inner_product(a.begin(), a.end(), b.begin(), 0.0);
  };
  const auto signs = [&](const std::vector<double>& x) {
    std::vector<bool> out;
    for (int64_t i = 0; i < kSigns; ++i) {
      double sum = 0;
      for (size_t d = 0; d < x.size(); ++d)
        sum += x[d] * double{directions[d * kSigns + static_cast<size_t>(i)]};
      out.push_back(sum > 0);
    }
    return out;
  };
  for (const AnnEngine engine : {AnnEngine::kLsh, AnnEngine::kQuant}) {
    PromptBuckets buckets(kHeads, kDim, engine, kSeed);
    buckets.set_prompt(p.pages.view());
    EXPECT_TRUE(buckets.buckets().empty());
    buckets.assign(p.ctx, p.q, p.scale());
    ASSERT_EQ(buckets.buckets().size(), size_t{kQueries});
    const auto row = [&](const float* x, int64_t token, int64_t head) {
      const float* from = x + (token * kHeads + head) * kDim;
      return std::vector<double>(from, from + kDim);
    };
    int64_t clear = 0;
    for (int64_t t = 0; t < kQueries; ++t) {
      std::vector<double> mass(kTokens, 0.0);
      for (int64_t head = 0; head < kHeads; ++head) {
        std::vector<double> mean(kDim, 0.0), weights;
        for (int64_t i = 0; i < kTokens; ++i) {
          for (size_t d = 0; d < kDim; ++d) mean[d] += row(k, i, head)[d] / kTokens;
        }
        const std::vector<double> query = row(q, t, head);
        double sum = 0;
        for (int64_t i = 0; i < kTokens; ++i) {
          std::vector<double> key = row(k, i, head);
          for (size_t d = 0; d < kDim; ++d) key[d] -= mean[d];
          double product = 0;
          if (engine == AnnEngine::kQuant) {
            product = dot(rounded(query), rounded(key));
          } else {
            const std::vector<bool> a = signs(query), b = signs(key);
            int differ = 0;
            for (size_t bit = 0; bit < a.size(); ++bit) differ += a[bit] != b[bit];
            product = std::sqrt(dot(query, query) * dot(key, key)) * std::cos(M_PI * differ / 64);
          }
          weights.push_back(std::exp(product / std::sqrt(double{kDim})));
          sum += weights.back();
        }
        for (size_t i = 0; i < kTokens; ++i) mass[i] += weights[i] / sum;
      }
      const auto best = std::max_element(mass.begin(), mass.end()) - mass.begin();
      const double most = mass[static_cast<size_t>(best)];
      mass[static_cast<size_t>(best)] = 0;
      if (*std::max_element(mass.begin(), mass.end()) > most - 0.01) continue;  // too near a tie
      ++clear;
      EXPECT_EQ(buckets.buckets()[static_cast<size_t>(t)], best) << t;
    }
    EXPECT_GT(clear, kQueries / 2);
  }
}

TEST(SelectOptions, AreChecked) {
  Context ctx;
  for (const SelectOptions& bad :
       {SelectOptions{AnnEngine::kLsh, 1.5, 32, 0}, SelectOptions{AnnEngine::kLsh, NAN, 32, 0},
        SelectOptions{AnnEngine::kQuant, 0.5, 0, 0}})
    EXPECT_THROW(make_page_selector(ctx, 1, 64, bad), Error);
}

class PromptSelect : public testing::TestWithParam<std::tuple<AnnEngine, PromptRule, DType>> {
 protected:
  PromptSelectOptions options(double density) const {
    return {std::get<0>(GetParam()), std::get<1>(GetParam()), density, 5};
  }

  DType dtype() const { return std::get<2>(GetParam()); }
};

TEST_P(PromptSelect, EverythingKeptEqualsDenseBitForBit) {
  for (const int64_t tokens : {1, 63, 64, 65, 150}) {
    Problem p(dtype(), 33, tokens, 3, 32);
    const auto selector = make_prompt_selector(p.ctx, 3, 32, options(1));
    selector->set_prompt(p.ctx, p.pages.view());
    const Tensor dense({}, DType::kF32, p.q.shape());
    const Tensor pruned({}, DType::kF32, p.q.shape());
    attend(p.ctx, p.q, p.pages.view(), p.scale(), dense);
    for (const bool chosen : {false, true}) {
      if (chosen) selector->choose(p.ctx, p.q, p.scale());
      attend(p.ctx, p.q, selector->kept(), p.scale(), pruned);
      EXPECT_EQ(test::values(pruned), test::values(dense)) << tokens << " tokens, " << chosen;
      EXPECT_EQ(selector->density(), 1);
    }
  }
}

// What is read is dense attention over the kept tokens alone, in the prompt's order.
TEST_P(PromptSelect, ReadsTheKeptTokensAndNoOthers) {
  Problem p(dtype(), 40, 131, 2, 32);
  const auto selector = make_prompt_selector(p.ctx, 2, 32, options(0.5));
  selector->set_prompt(p.ctx, p.pages.view());
  for (int round = 0; round < 2; ++round) {  // choosing again starts anew
    selector->choose(p.ctx, p.q, p.scale());
    EXPECT_NEAR(selector->density(), 66.0 / 131, 1e-9);
    const Tensor out({}, DType::kF32, p.q.shape());
    attend(p.ctx, p.q, selector->kept(), p.scale(), out);
    for (int64_t head = 0; head < 2; ++head) {
      const std::vector<int32_t> members = selector->members()[static_cast<size_t>(head)];
      std::vector<int64_t> kept;
      for (int64_t token = 0; token < 131; ++token) {
        const int32_t entry = members[static_cast<size_t>(token)];
        if (entry < 0) continue;
        EXPECT_EQ(entry, static_cast<int32_t>(kept.size()));
        kept.push_back(token);
      }
      ASSERT_EQ(kept.size(), 66U);
      const auto element = [&](const Tensor& x, int64_t token, int64_t d) {
        return double{test::values(x)[static_cast<size_t>((token * 2 + head) * 32 + d)]};
      };
      for (const int64_t t : {0, 39}) {
        double sum = 0;
        std::vector<double> mean(32, 0.0);
        for (const int64_t token : kept) {
          double dot = 0;
          for (int64_t d = 0; d < 32; ++d) dot += element(p.q, t, d) * element(p.k, token, d);
          const double weight = std::exp(dot * double{p.scale()});
          sum += weight;
          for (int64_t d = 0; d < 32; ++d)
            mean[static_cast<size_t>(d)] += weight * element(p.v, token, d);
        }
        for (int64_t d = 0; d < 32; ++d)
          EXPECT_NEAR(element(out, t, d), mean[static_cast<size_t>(d)] / sum,
                      dtype() == DType::kF32 ? 1e-4 : 3e-2);
      }
    }
  }
}

// Tokens that look along one query each: every engine and rule must keep them.
TEST_P(PromptSelect, KeepsWhatTheQueriesMatch) {
  Problem p(DType::kF32, 32, 90, 1, 64);
  const std::vector<int64_t> wanted = {3, 40, 64, 89};
  for (size_t i = 0; i < wanted.size(); ++i) {
    for (int64_t d = 0; d < 64; ++d)
      p.k.data<float>()[wanted[i] * 64 + d] =
          3 * p.q.data<float>()[static_cast<int64_t>(7 * i) * 64 + d];
  }
  const KvPages pages(p.ctx, p.k, p.v);
  const auto selector = make_prompt_selector(p.ctx, 1, 64, options(4.0 / 90));
  selector->set_prompt(p.ctx, pages.view());
  selector->choose(p.ctx, p.q, p.scale());
  std::vector<int64_t> kept;
  for (int64_t token = 0; token < 90; ++token) {
    if (selector->members()[0][static_cast<size_t>(token)] >= 0) kept.push_back(token);
  }
  EXPECT_EQ(kept, wanted);
}

INSTANTIATE_TEST_SUITE_P(
    All, PromptSelect,
    testing::Combine(testing::Values(AnnEngine::kLsh, AnnEngine::kQuant),
                     testing::Values(PromptRule::kMatch, PromptRule::kMass),
                     testing::Values(DType::kF32, DType::kBF16)),
    [](const auto& param) {
      return std::string(std::get<0>(param.param) == AnnEngine::kLsh ? "lsh" : "quant") +
             (std::get<1>(param.param) == PromptRule::kMatch ? "_match_" : "_mass_") +
             name_of(std::get<2>(param.param));
    });

TEST(PromptSelectOptions, AreChecked) {
  Context ctx;
  for (const double density : {-0.1, 1.1, static_cast<double>(NAN)})
    EXPECT_THROW(make_prompt_selector(ctx, 1, 64, {AnnEngine::kLsh, PromptRule::kMass, density, 0}),
                 Error);
}

TEST(Project, EqualsPlainLoops) {
  for (const int64_t rows : {1, 3, 4, 9}) {
    for (const int64_t outputs : {1, 15, 16, 48, 65}) {
      constexpr int64_t kDim = 37;
      const Tensor x = random_tensor(DType::kF32, {rows, kDim}, 0);
      const Tensor m = random_tensor(DType::kF32, {kDim, outputs}, 1);
      std::vector<float> out(static_cast<size_t>(rows * outputs), NAN);
      project(x.data<float>(), rows, kDim, m.data<float>(), outputs, out.data());
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t e = 0; e < outputs; ++e) {
          double sum = 0;
          for (int64_t i = 0; i < kDim; ++i)
            sum += double{x.data<float>()[r * kDim + i]} * double{m.data<float>()[i * outputs + e]};
          EXPECT_NEAR(out[static_cast<size_t>(r * outputs + e)], sum, 1e-4);
        }
      }
      std::vector<float> products(static_cast<size_t>(rows), NAN);
      dots(x.data<float>(), rows, kDim, x.data<float>(), products.data());
      EXPECT_NEAR(
          square_distance(x.data<float>(), x.data<float>() + (rows - 1) * kDim, kDim),
          products[0] +
              std::inner_product(x.data<float>() + (rows - 1) * kDim, x.data<float>() + rows * kDim,
                                 x.data<float>() + (rows - 1) * kDim, 0.0F) -
              2 * products[static_cast<size_t>(rows - 1)],
          1e-3);
    }
  }
  std::vector<float> logits = {1, 2, 3, -100, 3}, mass(5, 1.0F);
  add_softmax(logits.data(), 5, mass.data());
  const double sum = std::exp(-2) + std::exp(-1) + 2;
  EXPECT_NEAR(mass[0], 1 + std::exp(-2) / sum, 1e-5);
  EXPECT_NEAR(mass[4], 1 + 1 / sum, 1e-5);
  EXPECT_NEAR(mass[3], 1, 1e-6);
}

}  // namespace
}  // namespace longtake
