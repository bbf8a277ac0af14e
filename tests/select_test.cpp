// AnnSA's choice of pages, against plain loops and against attention over everything.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <set>

#include "ann/project.h"
#include "attention/prompt_select.h"
#include "attention/select.h"
#include "base/error.h"
#include "core_support.h"
#include "metrics/attention.h"

namespace longtake {
namespace {

using test::random_tensor;

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
    PageSelector selector(3, 32, options(1));
    const Selection all = selector.select(p.ctx, p.q, p.pages.view(), 0, 0, p.scale());
    const Tensor dense({}, DType::kF32, p.q.shape());
    const Tensor sparse({}, DType::kF32, p.q.shape());
    attend(p.ctx, p.q, p.pages.view(), p.scale(), dense);
    attend_blocks(p.ctx, p.q, p.pages.view(), all, p.scale(), sparse);
    EXPECT_EQ(test::values(sparse), test::values(dense)) << queries << " x " << keys;
    EXPECT_EQ(selector.density(), 1);
  }
}

TEST_P(Select, KeepsBothEndsAndTheDensity) {
  Problem p(dtype(), 70, 64 * 40 + 5, 2, 64);  // 41 pages, the last of 5 keys
  for (const double density : {0.0, 0.1, 0.5}) {
    PageSelector selector(2, 64, options(density, 16));
    const Selection chosen = selector.select(p.ctx, p.q, p.pages.view(), 2, 3, p.scale());
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
    EXPECT_GE(selector.density(), density);
    EXPECT_LE(selector.density(), std::max(density, 5.0 / 41) + 1.0 / 40);
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
  PageSelector selector(1, 64, options(0.03));
  const Selection chosen = selector.select(p.ctx, p.q, pages.view(), 0, 0, p.scale());
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
  PageSelector selector(1, 64, options(0.05));
  selector.select(p.ctx, p.q, view, 0, 0, p.scale());
  const std::vector<float> value(64, 0.0F);
  for (int64_t slot = 0; slot < 64; ++slot) {
    std::vector<float> key(p.q.data<float>(), p.q.data<float>() + 64);
    for (float& x : key) x *= 2;
    write_token(lists[0][9], DType::kF32, 64, slot, key.data(), value.data(), 0);
  }
  for (int64_t t = 1; t < 32; ++t) std::copy_n(p.q.data<float>(), 64, p.q.data<float>() + t * 64);
  const Selection chosen = selector.select(p.ctx, p.q, view, 0, 0, p.scale());
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

TEST(SelectOptions, AreChecked) {
  for (const SelectOptions& bad :
       {SelectOptions{AnnEngine::kLsh, 1.5, 32, 0}, SelectOptions{AnnEngine::kLsh, NAN, 32, 0},
        SelectOptions{AnnEngine::kQuant, 0.5, 0, 0}})
    EXPECT_THROW(PageSelector(1, 64, bad), Error);
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
    PromptSelector selector(3, 32, options(1));
    selector.set_prompt(p.ctx, p.pages.view());
    const Tensor dense({}, DType::kF32, p.q.shape());
    const Tensor pruned({}, DType::kF32, p.q.shape());
    attend(p.ctx, p.q, p.pages.view(), p.scale(), dense);
    for (const bool chosen : {false, true}) {
      if (chosen) selector.choose(p.ctx, p.q, p.scale());
      attend(p.ctx, p.q, selector.kept(), p.scale(), pruned);
      EXPECT_EQ(test::values(pruned), test::values(dense)) << tokens << " tokens, " << chosen;
      EXPECT_EQ(selector.density(), 1);
    }
  }
}

// What is read is dense attention over the kept tokens alone, in the prompt's order.
TEST_P(PromptSelect, ReadsTheKeptTokensAndNoOthers) {
  Problem p(dtype(), 40, 131, 2, 32);
  PromptSelector selector(2, 32, options(0.5));
  selector.set_prompt(p.ctx, p.pages.view());
  for (int round = 0; round < 2; ++round) {  // choosing again starts anew
    selector.choose(p.ctx, p.q, p.scale());
    EXPECT_NEAR(selector.density(), 66.0 / 131, 1e-9);
    const Tensor out({}, DType::kF32, p.q.shape());
    attend(p.ctx, p.q, selector.kept(), p.scale(), out);
    for (int64_t head = 0; head < 2; ++head) {
      const std::vector<int32_t>& members = selector.members()[static_cast<size_t>(head)];
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
  PromptSelector selector(1, 64, options(4.0 / 90));
  selector.set_prompt(p.ctx, pages.view());
  selector.choose(p.ctx, p.q, p.scale());
  std::vector<int64_t> kept;
  for (int64_t token = 0; token < 90; ++token) {
    if (selector.members()[0][static_cast<size_t>(token)] >= 0) kept.push_back(token);
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
  for (const double density : {-0.1, 1.1, static_cast<double>(NAN)})
    EXPECT_THROW(PromptSelector(1, 64, {AnnEngine::kLsh, PromptRule::kMass, density, 0}), Error);
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
