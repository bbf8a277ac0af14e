// Page lists made on the GPU against plain loops in double.
#include "attention/page_lists.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <set>
#include <vector>

#include "base/dtype.h"
#include "gpu_support.h"

namespace longtake::cuda {
namespace {

struct Shape {
  int queries, keys, heads;
};

class PageListsTest : public testing::TestWithParam<int> {
 protected:
  void SetUp() override { skip_without_gpu(); }
};

// One choice for random keys, some heads shorter than others.
struct Choice {
  int head_dim, pages, tiles;
  Shape shape;
  float scale;
  std::vector<bf16> q, k;
  std::vector<float> bias;
  std::vector<int32_t> begin, numbers;  // pages by head, numbers in the store
  std::vector<int32_t> offsets, listed;
  int stride = 0;
  double density = 0;

  Choice(const Shape& s, int dim, const ListOptions& options, bool ragged)
      : head_dim(dim),
        pages((s.keys + kPageKeys - 1) / kPageKeys),
        tiles((s.queries + kTileQueries - 1) / kTileQueries),
        shape(s),
        scale(3 / std::sqrt(static_cast<float>(dim))) {
    std::mt19937 random(17);
    std::normal_distribution<float> normal;
    const auto width = static_cast<size_t>(s.heads * dim);
    q.resize(static_cast<size_t>(s.queries) * width);
    k.resize(static_cast<size_t>(s.keys) * width);
    bias.resize(static_cast<size_t>(s.heads * s.keys));
    // Keys of a page have something in common, as in a video.
    std::vector<float> common(static_cast<size_t>(pages) * width);
    for (auto& x : common) x = normal(random);
    for (auto& x : q) x = bf16(normal(random));
    for (size_t i = 0; i < k.size(); ++i) {
      k[i] = bf16(common[i / width / kPageKeys * width + i % width] + 0.5F * normal(random));
    }
    for (auto& b : bias) b = normal(random);
    std::vector<int32_t> place(static_cast<size_t>(s.heads * pages));
    std::iota(place.begin(), place.end(), 0);
    std::shuffle(place.begin(), place.end(), random);
    const auto dk = on_device(k);
    const auto dbias = on_device(bias);
    const auto dplace = on_device(place);
    const DeviceArray<unsigned char> store(place.size() * paged_bytes(dim));
    pack_pages(dk.data(), dk.data(), dbias.data(), s.keys, s.heads, dim, PageFormat::kBf16,
               dplace.data(), store.data(), nullptr);
    begin = {0};
    for (int h = 0; h < s.heads; ++h) {
      const int own = ragged ? std::max(0, pages - 3 * h) : pages;
      for (int p = 0; p < own; ++p) numbers.push_back(place[static_cast<size_t>(h * pages + p)]);
      begin.push_back(static_cast<int32_t>(numbers.size()));
    }
    PageSummaries summaries(static_cast<int64_t>(place.size()), dim);
    summaries.update(store.data(), dplace.data(), static_cast<int>(place.size()), nullptr);
    PageLister lister(s.heads * tiles, pages, dim);
    // What another one needs is no limit for this one.
    const PageLister other(1, 1, dim);
    const auto dq = on_device(q);
    const auto dbegin = on_device(begin), dnumbers = on_device(numbers);
    const PageLists lists =
        lister.list(dq.data(), false, s.queries, {s.heads, dbegin.data(), dnumbers.data()},
                    summaries, scale, options, nullptr);
    check(cudaDeviceSynchronize(), "lists");
    offsets.resize(static_cast<size_t>(lists.num_rows()) + 1);
    check(cudaMemcpy(offsets.data(), lists.offsets, offsets.size() * 4, cudaMemcpyDeviceToHost),
          "copy");
    stride = lists.stride;
    listed.resize(static_cast<size_t>(lists.num_rows() * stride));
    check(cudaMemcpy(listed.data(), lists.pages, listed.size() * 4, cudaMemcpyDeviceToHost),
          "copy");
    density = lister.density();
  }

  int keys_of(int page) const { return std::min(kPageKeys, shape.keys - page * kPageKeys); }

  // Of every page of a head, summed over a tile's queries.
  std::vector<double> mass(int head, int tile) const {
    const int own = begin[static_cast<size_t>(head) + 1] - begin[static_cast<size_t>(head)];
    std::vector<std::vector<double>> means(static_cast<size_t>(own));
    std::vector<double> weights(static_cast<size_t>(own)), total(static_cast<size_t>(own));
    const auto at = [&](int row) {
      return static_cast<size_t>((row * shape.heads + head) * head_dim);
    };
    for (int p = 0; p < own; ++p) {
      auto& mean = means[static_cast<size_t>(p)];
      mean.resize(static_cast<size_t>(head_dim));
      const int end = std::min(shape.keys, (p + 1) * kPageKeys);
      for (int j = p * kPageKeys; j < end; ++j) {
        for (int d = 0; d < head_dim; ++d)
          mean[static_cast<size_t>(d)] +=
              static_cast<double>(float(k[at(j) + static_cast<size_t>(d)]));
        weights[static_cast<size_t>(p)] +=
            std::exp(static_cast<double>(bias[static_cast<size_t>(head * shape.keys + j)]));
      }
      for (auto& x : mean) x /= end - p * kPageKeys;
    }
    for (int i = tile * kTileQueries; i < std::min(shape.queries, (tile + 1) * kTileQueries); ++i) {
      std::vector<double> terms(static_cast<size_t>(own));
      double sum = 0;
      for (size_t p = 0; p < terms.size(); ++p) {
        double dot = 0;
        for (int d = 0; d < head_dim; ++d)
          dot += static_cast<double>(float(q[at(i) + static_cast<size_t>(d)])) *
                 means[p][static_cast<size_t>(d)];
        terms[p] = weights[p] * std::exp(dot * static_cast<double>(scale));
        sum += terms[p];
      }
      for (size_t p = 0; p < terms.size(); ++p) total[p] += terms[p] / sum;
    }
    return total;
  }

  void expect_best(const ListOptions& options) const {
    size_t row = 0;
    double read = 0, there = 0;
    for (int h = 0; h < shape.heads; ++h) {
      const int32_t* own = numbers.data() + begin[static_cast<size_t>(h)];
      const int count = begin[static_cast<size_t>(h) + 1] - begin[static_cast<size_t>(h)];
      int total = 0, always = 0;
      const auto is_always = [&](int p) {
        return p < options.first_pages || p >= count - options.last_pages;
      };
      for (int p = 0; p < count; ++p) {
        total += keys_of(p);
        if (is_always(p)) always += keys_of(p);
      }
      const int wanted = std::max(always, static_cast<int>(std::ceil(options.density * total)));
      for (int t = 0; t < tiles; ++t, ++row) {
        const auto what = str("head ", h, ", tile ", t);
        std::vector<int> got;
        for (int i = 0; i < offsets[row + 1] - offsets[row]; ++i) {
          const int32_t page = listed[row * static_cast<size_t>(stride) + static_cast<size_t>(i)];
          got.push_back(static_cast<int>(std::find(own, own + count, page) - own));
        }
        ASSERT_TRUE(std::is_sorted(got.begin(), got.end())) << what;
        const std::set<int> set(got.begin(), got.end());
        ASSERT_EQ(set.size(), got.size()) << what;
        int keys = 0;
        for (const int p : got) {
          ASSERT_LT(p, count) << what;
          keys += keys_of(p);
        }
        ASSERT_GE(keys, wanted) << what;
        if (wanted > always) {
          ASSERT_LT(keys - kPageKeys, wanted) << what << ", without the last one chosen";
        } else {
          ASSERT_EQ(keys, always) << what;
        }
        const int queries = std::min(kTileQueries, shape.queries - t * kTileQueries);
        read += static_cast<double>(keys) * queries;
        there += static_cast<double>(total) * queries;
        std::vector<std::pair<double, int>> free;  // mass, keys
        double chosen = 0, best = 0;
        const auto all = mass(h, t);
        for (int p = 0; p < count; ++p) {
          if (is_always(p)) {
            ASSERT_TRUE(set.count(p)) << what << ", page " << p << " of those always listed";
          } else {
            free.emplace_back(all[static_cast<size_t>(p)], keys_of(p));
            if (set.count(p)) chosen += all[static_cast<size_t>(p)];
          }
        }
        std::sort(free.rbegin(), free.rend());
        int taken = always;
        for (size_t i = 0; i < free.size() && taken < wanted; ++i) {
          best += free[i].first;
          taken += free[i].second;
        }
        // Near ties may fall either way: means are rounded to bf16.
        EXPECT_GE(chosen, (1 - 2e-3) * best) << what;
      }
    }
    EXPECT_NEAR(density, there > 0 ? read / there : 1, 1e-12);
  }
};

TEST_P(PageListsTest, ListsHoldThePagesOfMostMass) {
  for (const auto& shape : {Shape{128, 5000, 2}, {300, 12345, 3}, {1, 700, 1}, {500, 40000, 2}}) {
    for (const ListOptions& options : {ListOptions{0.25, 0, 0}, {0.1, 1, 2}, {0.5, 2, 1}}) {
      const Choice choice(shape, GetParam(), options, false);
      choice.expect_best(options);
    }
  }
}

TEST_P(PageListsTest, ThousandsOfPages) {
  const ListOptions options = {0.02, 3, 0};
  const Choice choice({3, 128 * 7000, 1}, GetParam(), options, false);
  choice.expect_best(options);
}

TEST_P(PageListsTest, HeadsMayDifferInLength) {
  const ListOptions options = {0.3, 1, 1};
  const Choice choice({200, 4000, 12}, GetParam(), options, true);  // the last heads have no pages
  choice.expect_best(options);
}

TEST_P(PageListsTest, AtBothEndsOfDensity) {
  const Choice all({140, 2000, 2}, GetParam(), {1, 0, 0}, false);
  all.expect_best({1, 0, 0});
  const Choice none({140, 2000, 2}, GetParam(), {0, 0, 0}, false);
  EXPECT_EQ(none.offsets.back(), 0);
  const Choice ends({140, 2000, 2}, GetParam(), {0, 2, 3}, false);
  ends.expect_best({0, 2, 3});
  PageLister lister(1, 1, GetParam());
  const PageSummaries summaries(1, GetParam());
  EXPECT_THROW(lister.list(nullptr, false, 1, {}, summaries, 1, {1.5, 0, 0}, nullptr), Error);
}

INSTANTIATE_TEST_SUITE_P(HeadDim, PageListsTest, testing::Values(64, 128));

}  // namespace
}  // namespace longtake::cuda
