// AnnSA and AnnCA on the GPU, from the choice to the attention over it, against plain loops.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "attend_cuda_support.h"
#include "attention/attend.h"
#include "attention/paged_attention.h"
#include "attention/prompt_select.h"
#include "attention/select.h"
#include "device/graph.h"
#include "kv/device_pages.h"
#include "ops/copy.h"

namespace longtake::cuda {
namespace {

struct SelectCudaTest : testing::TestWithParam<DType> {
  void SetUp() override { skip_without_gpu(); }

  // Of a relative L2 error.
  static double most() { return GetParam() == DType::kF32 ? 2e-6 : 5e-3; }
};

template <typename T>
std::vector<T> from_device(const T* data, size_t count) {
  std::vector<T> out(count);
  check(cudaMemcpy(out.data(), data, count * sizeof(T), cudaMemcpyDeviceToHost), "copy");
  return out;
}

// What is read is dense attention over the listed pages, recorded once and replayed for other
// queries.
TEST_P(SelectCudaTest, AttentionReadsTheListedPages) {
  constexpr int64_t kHeads = 3;
  for (const auto& [queries, keys, dim] :
       {std::tuple<int64_t, int64_t, int64_t>{128, 4000, 64}, {1, 700, 64}, {300, 2500, 128}}) {
    Context gpu{kGpu};
    const Tensor k = test::random_tensor(GetParam(), {keys, kHeads, dim}, 2);
    const Tensor v = test::random_tensor(GetParam(), {keys, kHeads, dim}, 3);
    const KvPages pages(gpu, k.to(kGpu), v.to(kGpu));
    DevicePages known = *pages.view().device;
    const auto count = static_cast<int>(kHeads) * known.max_pages_per_head;
    PageSummaries summaries(count, static_cast<int>(dim), known.format);
    gpu.synchronize();
    summaries.update(known.store, known.heads.pages, count, nullptr);
    known.summaries = &summaries;
    known.first_pages = 1;
    known.last_pages = 2;
    check(cudaDeviceSynchronize(), "summaries");
    const KvView view{GetParam(), dim, {}, &known};
    const float scale = 1 / std::sqrt(static_cast<float>(dim));
    const auto selector =
        longtake::make_page_selector(gpu, kHeads, dim, {AnnEngine::kLsh, 0.3, kTileQueries, 0});
    const Tensor q(kGpu, GetParam(), {queries, kHeads, dim});
    const GuardedOut out(GetParam(), q.shape());
    Selection chosen;
    Graph graph;
    for (uint32_t round = 0; round < 3; ++round) {
      const Tensor asked = test::random_tensor(GetParam(), q.shape(), 10 + round);
      copy(gpu, asked, q);
      gpu.synchronize();
      check(cudaMemset(out.view().raw(), 0xff, out.view().bytes()), "poison");
      check(cudaDeviceSynchronize(), "poison");
      graph.run(gpu, [&] {
        chosen = selector->select(gpu, q, view, 0, 0, scale);
        attend_blocks(gpu, q, view, chosen, scale, out.view());
      });
      const Tensor got = out.on_cpu();
      const PageLists& lists = *chosen.device;
      const auto rows = static_cast<size_t>(lists.num_rows());
      const auto offsets = from_device(lists.offsets, rows + 1);
      std::vector<std::vector<char>> is_listed(rows, std::vector<char>(count));
      double read = 0;
      const int64_t tiles = lists.num_rows() / kHeads;
      for (size_t row = 0; row < rows; ++row) {
        const auto head = static_cast<int64_t>(row) / tiles;
        const auto listed = from_device(lists.pages + static_cast<int64_t>(row) * lists.stride,
                                        static_cast<size_t>(offsets[row + 1] - offsets[row]));
        for (const int page : listed) {
          ASSERT_EQ(page / known.max_pages_per_head, head);
          is_listed[row][static_cast<size_t>(page)] = 1;
          const int64_t begin = page % known.max_pages_per_head * kPageKeys;
          const int64_t own = static_cast<int64_t>(row) % tiles * kTileQueries;
          read += static_cast<double>(std::min<int64_t>(kPageKeys, keys - begin) *
                                      std::min<int64_t>(kTileQueries, queries - own));
        }
      }
      const auto is_read = [&](int64_t head, int64_t query, int64_t key) {
        const int64_t page = head * known.max_pages_per_head + key / kPageKeys;
        return is_listed[static_cast<size_t>(head * tiles + query / kTileQueries)]
                        [static_cast<size_t>(page)] != 0;
      };
      const auto what = str(queries, " x ", keys, ", round ", round);
      EXPECT_LE(distance(got, plain(asked, k, v, scale, is_read)), most()) << what;
      EXPECT_NEAR(selector->density(), read / static_cast<double>(keys * queries * kHeads), 1e-9)
          << what;
      const double ends = 3.0 / known.max_pages_per_head;
      EXPECT_GE(selector->density(), 0.3 - 1e-9) << what;
      EXPECT_LE(selector->density(),
                std::max(0.3, ends) + static_cast<double>(kPageKeys) / static_cast<double>(keys));
    }
    EXPECT_TRUE(graph.is_recorded());
  }
}

TEST_P(SelectCudaTest, BucketsOfThePromptAreRefused) {
  Context gpu{kGpu};
  SelectOptions options;
  options.buckets = SelectBuckets::kPrompt;
  EXPECT_THROW(longtake::make_page_selector(gpu, 2, 64, options), Error);
  options = {};
  options.density = 2;
  EXPECT_THROW(longtake::make_page_selector(gpu, 2, 64, options), Error);
}

// What every token of a head is worth to the queries.
std::vector<double> worth(View q, View k, int64_t head, double scale, PromptRule rule) {
  const int64_t heads = q.dim(1), dim = q.dim(2), tokens = k.dim(0);
  std::vector<double> out(static_cast<size_t>(tokens), rule == PromptRule::kMass ? 0 : -INFINITY);
  for (int64_t i = 0; i < q.dim(0); ++i) {
    std::vector<double> logits(static_cast<size_t>(tokens));
    double mean = 0, sum = 0;
    for (int64_t j = 0; j < tokens; ++j) {
      double dot = 0;
      for (int64_t d = 0; d < dim; ++d)
        dot += at(q, (i * heads + head) * dim + d) * at(k, (j * heads + head) * dim + d);
      logits[static_cast<size_t>(j)] = scale * dot;
      mean += scale * dot / static_cast<double>(tokens);
    }
    for (double& logit : logits) sum += std::exp(logit -= mean);
    for (size_t j = 0; j < logits.size(); ++j) {
      if (rule == PromptRule::kMass)
        out[j] += std::exp(logits[j]) / sum;
      else
        out[j] = std::max(out[j], logits[j]);
    }
  }
  return out;
}

TEST_P(SelectCudaTest, PromptKeepsTheBestTokensAndReadsNoOthers) {
  constexpr int64_t kHeads = 2;
  for (const PromptRule rule : {PromptRule::kMass, PromptRule::kMatch}) {
    for (const auto& [queries, tokens, dim, density] :
         {std::tuple<int64_t, int64_t, int64_t, double>{128, 120, 64, .33},
          {1, 1, 64, .5},
          {127, 65, 128, .5},
          {129, 63, 64, 0},
          {300, 512, 128, .33},
          {40, 300, 64, 1},
          {130, 512, 64, .6}}) {
      Context gpu{kGpu};
      const PromptSelectOptions options{AnnEngine::kQuant, rule, density, 0};
      const Tensor k = test::random_tensor(GetParam(), {tokens, kHeads, dim}, 2);
      const Tensor v = test::random_tensor(GetParam(), {tokens, kHeads, dim}, 3);
      const KvPages pages(gpu, k.to(kGpu), v.to(kGpu));
      const auto selector = longtake::make_prompt_selector(gpu, kHeads, dim, options);
      selector->set_prompt(gpu, pages.view());
      const float scale = 2 / std::sqrt(static_cast<float>(dim));
      const Tensor q(kGpu, GetParam(), {queries, kHeads, dim});
      const GuardedOut out(GetParam(), q.shape());
      const auto kept = static_cast<size_t>(num_tokens_kept(options, tokens));
      Graph graph;
      for (uint32_t round = 0; round < 4; ++round) {
        const Tensor asked = test::random_tensor(GetParam(), q.shape(), 10 + round);
        copy(gpu, asked, q);
        check(cudaMemset(out.view().raw(), 0xff, out.view().bytes()), "poison");
        check(cudaDeviceSynchronize(), "poison");
        const bool chooses = round > 0;
        const auto read = [&] { attend(gpu, q, selector->kept(), scale, out.view()); };
        if (!chooses) {
          read();
        } else {
          graph.run(gpu, [&] {
            selector->choose(gpu, q, scale);
            read();
          });
        }
        const Tensor got = out.on_cpu();
        const auto what = str(queries, " x ", tokens, " x ", dim, ", round ", round);
        const auto members = selector->members();
        EXPECT_NEAR(selector->density(),
                    chooses ? static_cast<double>(kept) / static_cast<double>(tokens) : 1, 1e-12);
        for (int64_t h = 0; h < kHeads && chooses; ++h) {
          int32_t entry = 0;
          const auto value = worth(asked, k, h, static_cast<double>(scale), rule);
          std::vector<double> chosen;
          for (size_t i = 0; i < value.size(); ++i) {
            const int32_t member = members[static_cast<size_t>(h)][i];
            if (member < 0) continue;
            ASSERT_EQ(member, entry++) << what;
            chosen.push_back(value[i]);
          }
          ASSERT_EQ(chosen.size(), kept) << what;
          auto best = value;
          std::sort(best.rbegin(), best.rend());
          // Near ties may fall either way: f32 keys and queries are rounded to bf16.
          const double least = *std::min_element(chosen.begin(), chosen.end());
          EXPECT_GE(least, best[kept - 1] - 2e-2 * std::abs(best[kept - 1])) << what;
        }
        const auto is_read = [&](int64_t head, int64_t, int64_t token) {
          return members[static_cast<size_t>(head)][static_cast<size_t>(token)] >= 0;
        };
        EXPECT_LE(distance(got, plain(asked, k, v, scale, is_read)), most()) << what;
      }
      EXPECT_TRUE(graph.is_recorded());
    }
  }
}

INSTANTIATE_TEST_SUITE_P(DTypes, SelectCudaTest, testing::Values(DType::kF32, DType::kBF16),
                         [](const auto& instance) { return name_of(instance.param); });

}  // namespace
}  // namespace longtake::cuda
