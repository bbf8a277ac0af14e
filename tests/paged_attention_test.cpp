// Paged attention on the GPU against plain loops in double.
#include "attention/paged_attention.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <vector>

#include "base/dtype.h"
#include "gpu_support.h"

namespace longtake::cuda {
namespace {

struct Shape {
  int queries, keys, heads, head_dim;
};

// Inputs of one attention; keys and values as bf16 [keys, heads, D].
struct Problem {
  Shape shape;
  std::vector<bf16> q, k, v;
  std::vector<float> bias;  // [heads, keys] or empty
  float scale;

  Problem(const Shape& s, bool with_bias, uint32_t seed, float spread = 1)
      : shape(s), scale(1 / std::sqrt(static_cast<float>(s.head_dim))) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    const auto fill = [&](std::vector<bf16>& x, int rows, float factor) {
      x.resize(static_cast<size_t>(rows) * static_cast<size_t>(s.heads * s.head_dim));
      for (auto& value : x) value = bf16(factor * normal(random));
    };
    fill(q, s.queries, spread);
    fill(k, s.keys, spread);
    fill(v, s.keys, 1);
    if (with_bias) {
      bias.resize(static_cast<size_t>(s.heads * s.keys));
      for (auto& b : bias) b = 2 * normal(random);
      bias[0] = -INFINITY;
    }
  }

  size_t at(int row, int head) const {
    return static_cast<size_t>(row * shape.heads + head) * static_cast<size_t>(shape.head_dim);
  }
};

// Pages of keys [begin, end) of the list, by tile of queries: lists[head][tile].
using Lists = std::vector<std::vector<std::vector<int>>>;

int pages_of(int keys) {
  return (keys + kPageKeys - 1) / kPageKeys;
}

int tiles_of(int queries) {
  return (queries + kTileQueries - 1) / kTileQueries;
}

Lists all_pages(const Shape& s) {
  std::vector<int> all(static_cast<size_t>(pages_of(s.keys)));
  std::iota(all.begin(), all.end(), 0);
  return Lists(static_cast<size_t>(s.heads),
               std::vector<std::vector<int>>(static_cast<size_t>(tiles_of(s.queries)), all));
}

std::vector<float> reference(const Problem& p, const Lists& lists) {
  const auto [queries, keys, heads, dim] = p.shape;
  std::vector<float> out(p.q.size());
  for (int h = 0; h < heads; ++h) {
    for (int i = 0; i < queries; ++i) {
      std::vector<double> sum(static_cast<size_t>(dim)), logits;
      std::vector<int> read;
      for (int page : lists[static_cast<size_t>(h)][static_cast<size_t>(i / kTileQueries)]) {
        for (int j = page * kPageKeys; j < std::min(keys, (page + 1) * kPageKeys); ++j) {
          double dot = 0;
          for (int d = 0; d < dim; ++d) {
            dot += static_cast<double>(float(p.q[p.at(i, h) + static_cast<size_t>(d)])) *
                   float(p.k[p.at(j, h) + static_cast<size_t>(d)]);
          }
          const double b = p.bias.empty() ? 0 : p.bias[static_cast<size_t>(h * keys + j)];
          logits.push_back(dot * p.scale + b);
          read.push_back(j);
        }
      }
      const double most = logits.empty() ? 0 : *std::max_element(logits.begin(), logits.end());
      double total = 0;
      for (size_t n = 0; n < read.size(); ++n) {
        const double term = std::exp(logits[n] - most);
        total += term;
        for (int d = 0; d < dim; ++d) {
          sum[static_cast<size_t>(d)] +=
              term * float(p.v[p.at(read[n], h) + static_cast<size_t>(d)]);
        }
      }
      for (int d = 0; d < dim; ++d) {
        out[p.at(i, h) + static_cast<size_t>(d)] =
            total > 0 ? static_cast<float>(sum[static_cast<size_t>(d)] / total) : 0.0F;
      }
    }
  }
  return out;
}

// How lists reach the kernel.
struct ListOptions {
  bool share_rows = false;  // one list a head
  bool stride = false;      // lists begin at equal distances, with nothing good between them
  bool by_shares = false;   // the host knows no bound of use: the kernel works by shares
};

// Pages, lists and output on the device. The output starts as NaN between guard zones.
class Device {
 public:
  static constexpr size_t kGuard = 4096;
  static constexpr uint16_t kPoison = 0x7fff;  // NaN

  Device(const Problem& problem, const Lists& lists, const ListOptions& options,
         PageFormat format = PageFormat::kBf16)
      : problem_(problem), q_(on_device(problem.q)) {
    const auto& s = problem.shape;
    // Pages lie in the store in random order.
    const int pages = pages_of(s.keys);
    std::vector<int32_t> place(static_cast<size_t>(s.heads * pages));
    std::iota(place.begin(), place.end(), 0);
    std::shuffle(place.begin(), place.end(), std::mt19937(7));
    place_ = on_device(place);
    store_ = DeviceArray<unsigned char>(place.size() * paged_bytes(s.head_dim, format));
    check(cudaMemset(store_.data(), 0xff, store_.size()), "poison");
    const auto k = on_device(problem.k), v = on_device(problem.v);
    const auto bias = on_device(problem.bias);
    pack_pages(k.data(), v.data(), bias.data(), s.keys, s.heads, s.head_dim, format, place_.data(),
               store_.data(), nullptr);
    std::vector<int32_t> offsets = {0}, listed;
    const auto tiles = static_cast<int32_t>(lists[0].size());
    const int32_t stride = options.stride ? pages + 3 : 0;
    for (int h = 0; h < s.heads; ++h) {
      for (const auto& row : lists[static_cast<size_t>(h)]) {
        offsets.push_back(offsets.back() + static_cast<int32_t>(row.size()));
        for (int page : row) listed.push_back(place[static_cast<size_t>(h * pages + page)]);
        if (stride > 0) listed.resize((offsets.size() - 1) * static_cast<size_t>(stride), -1);
        if (options.share_rows) break;
      }
    }
    offsets_ = on_device(offsets);
    pages_ = on_device(listed);
    const auto num_lists = static_cast<int32_t>(offsets.size()) - 1;
    const int32_t longest = options.by_shares ? 100'000 : pages;
    lists_ = {num_lists,    options.share_rows ? tiles : 1, longest, stride, offsets_.data(),
              pages_.data()};
    bf16 poison;
    poison.bits = kPoison;
    out_ = on_device(std::vector<bf16>(problem.q.size() + 2 * kGuard, poison));
  }

  void run(PagedAttention& attention, cudaStream_t stream) {
    const auto& s = problem_.shape;
    attention.run(q_.data(), s.queries, s.heads, store_.data(), lists_, problem_.scale,
                  out_.data() + kGuard, stream);
  }

  // The output; guard zones are checked.
  std::vector<bf16> out() const {
    check(cudaDeviceSynchronize(), "attention");
    const std::vector<bf16> host = on_host(out_);
    for (size_t i = 0; i < kGuard; ++i) {
      EXPECT_EQ(host[i].bits, kPoison) << "before the output";
      EXPECT_EQ(host[host.size() - 1 - i].bits, kPoison) << "behind the output";
    }
    return {host.begin() + kGuard, host.end() - kGuard};
  }

 private:
  const Problem& problem_;
  DeviceArray<bf16> q_, out_;
  DeviceArray<int32_t> place_, offsets_, pages_;
  DeviceArray<unsigned char> store_;
  PageLists lists_;
};

// Relative L2 of all, and the largest error of one value.
void expect_near(const std::vector<bf16>& got, const std::vector<float>& want,
                 const std::string& what, double most = 6e-3) {
  double error = 0, size = 0, worst = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    const double difference = float(got[i]) - want[i];
    ASSERT_TRUE(std::isfinite(difference)) << what << ", value " << i;
    error += difference * difference;
    size += static_cast<double>(want[i]) * want[i];
    worst = std::max(worst, std::abs(difference));
  }
  EXPECT_LE(std::sqrt(error), most * std::sqrt(size)) << what;
  EXPECT_LE(worst, 7 * most) << what;
}

constexpr ListOptions kWays[] = {{}, {false, true, false}, {false, false, true}};

class PagedAttentionTest : public testing::TestWithParam<std::tuple<AttentionKernel, int>> {
 protected:
  void SetUp() override { skip_without_gpu(kernel() == AttentionKernel::kHopper); }

  static AttentionKernel kernel() { return std::get<0>(GetParam()); }

  static int head_dim() { return std::get<1>(GetParam()); }

  static std::vector<bf16> result(const Problem& problem, const Lists& lists,
                                  const ListOptions& options = {}) {
    PagedAttention attention(head_dim(), kernel());
    Device device(problem, lists, options);
    device.run(attention, nullptr);
    return device.out();
  }
};

TEST_P(PagedAttentionTest, DenseEqualsPlainLoops) {
  uint32_t seed = 1;
  for (const auto& [queries, keys, heads] : {std::tuple{1, 1, 1},
                                             {7, 5, 3},
                                             {64, 128, 2},
                                             {127, 129, 1},
                                             {128, 127, 1},
                                             {129, 1000, 3},
                                             {300, 640, 5},
                                             {65, 5000, 2},
                                             {2, 40000, 1},
                                             {1000, 257, 31}}) {
    for (const bool with_bias : {false, true}) {
      const Problem problem({queries, keys, heads, head_dim()}, with_bias, seed++);
      const Lists lists = all_pages(problem.shape);
      const auto want = reference(problem, lists);
      for (const bool by_shares : {false, true}) {
        expect_near(result(problem, lists, {true, false, by_shares}), want,
                    str(queries, " x ", keys, " x ", heads, with_bias ? ", biased" : "",
                        by_shares ? ", by shares" : ""));
      }
    }
  }
}

TEST_P(PagedAttentionTest, ListsOfAnyLengthEqualPlainLoops) {
  std::mt19937 random(3);
  for (const auto& [queries, keys, heads] :
       {std::tuple{500, 3000, 3}, {2600, 1500, 8}, {128, 9000, 6}, {90, 600, 2}, {4000, 129, 40}}) {
    const Problem problem({queries, keys, heads, head_dim()}, true, 50);
    Lists lists = all_pages(problem.shape);
    for (auto& head : lists) {
      for (auto& row : head) {
        std::shuffle(row.begin(), row.end(), random);
        row.resize(random() % (row.size() + 1));  // some read nothing
      }
    }
    const auto want = reference(problem, lists);
    for (const ListOptions& options : kWays) {
      expect_near(result(problem, lists, options), want,
                  str(queries, " x ", keys, " x ", heads, options.by_shares ? ", by shares" : ""));
    }
  }
}

TEST_P(PagedAttentionTest, NoPagesGiveZeros) {
  // One page a head: a row is one block's; many: a cluster's.
  for (const int keys : {100, 4000}) {
    const Problem problem({200, keys, 2, head_dim()}, false, 1);
    Lists lists = all_pages(problem.shape);
    for (auto& head : lists) {
      for (auto& row : head) row.clear();
    }
    for (const ListOptions& options : kWays) {
      for (const bf16 value : result(problem, lists, options)) ASSERT_EQ(float(value), 0);
    }
  }
}

// The world's shape: few rows, heads of very different lengths, one without a page.
TEST_P(PagedAttentionTest, RaggedHeadsOfOneTileEqualPlainLoops) {
  for (const int queries : {1, 127, 128}) {
    const Problem problem({queries, 4000, 6, head_dim()}, true, 12);
    Lists lists = all_pages(problem.shape);
    const int lengths[] = {32, 1, 0, 17, 5, 31};
    for (size_t h = 0; h < lists.size(); ++h) {
      for (auto& row : lists[h]) row.resize(static_cast<size_t>(lengths[h]));
    }
    const auto want = reference(problem, lists);
    for (const ListOptions& options : kWays) {
      expect_near(result(problem, lists, options), want, str(queries, " queries"));
    }
  }
}

// Logits far from zero on either side, and one that stands out late in the list.
TEST_P(PagedAttentionTest, ExtremeLogits) {
  for (const float spread : {5.0F, 12.0F}) {
    const Problem problem({130, 700, 2, head_dim()}, true, 9, spread);
    const Lists lists = all_pages(problem.shape);
    expect_near(result(problem, lists), reference(problem, lists), str("spread ", spread));
  }
  for (const float sign : {-1.0F, 1.0F}) {
    Problem problem({130, 700, 1, head_dim()}, false, 9);
    for (auto& x : problem.q) x = bf16(std::abs(float(x)) * 5);
    for (auto& x : problem.k) x = bf16(sign * std::abs(float(x)) * 5);
    const Lists lists = all_pages(problem.shape);
    expect_near(result(problem, lists), reference(problem, lists), str("all of sign ", sign));
  }
}

// The lemma that merging rests on: one key of weight m is m equal keys.
TEST_P(PagedAttentionTest, OneKeyOfWeightStandsForEqualKeys) {
  constexpr int kTimes = 3;
  const Problem once({150, 400, 2, head_dim()}, false, 4);
  Problem many = once, weighted = once;
  many.shape.keys = once.shape.keys * kTimes;
  many.k.clear();
  many.v.clear();
  for (int i = 0; i < kTimes; ++i) {
    many.k.insert(many.k.end(), once.k.begin(), once.k.end());
    many.v.insert(many.v.end(), once.v.begin(), once.v.end());
  }
  weighted.bias.assign(static_cast<size_t>(2 * once.shape.keys), std::log(3.0F));
  const auto want = reference(many, all_pages(many.shape));
  expect_near(result(many, all_pages(many.shape)), want, "repeated");
  expect_near(result(weighted, all_pages(weighted.shape)), want, "weighted");
}

TEST_P(PagedAttentionTest, SameListsGiveTheSameBits) {
  const Problem problem({700, 4000, 3, head_dim()}, true, 5);
  const Lists lists = all_pages(problem.shape);
  const auto bits = [&](const ListOptions& options) {
    std::vector<uint16_t> all;
    for (const bf16 value : result(problem, lists, options)) all.push_back(value.bits);
    return all;
  };
  for (const bool by_shares : {false, true}) {
    const auto once = bits({false, false, by_shares});
    EXPECT_EQ(once, bits({false, false, by_shares}));
    EXPECT_EQ(once, bits({true, false, by_shares})) << "rows that share a list";
    EXPECT_EQ(once, bits({false, true, by_shares})) << "lists at equal distances";
  }
}

TEST_P(PagedAttentionTest, RunsInACapturedGraph) {
  const Problem problem({300, 2000, 3, head_dim()}, true, 6);
  const Lists lists = all_pages(problem.shape);
  for (const ListOptions& options : kWays) {
    PagedAttention attention(head_dim(), kernel());
    Device device(problem, lists, options);
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t instance;
    check(cudaStreamCreate(&stream), "stream");
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
    device.run(attention, stream);
    check(cudaStreamEndCapture(stream, &graph), "capture");
    check(cudaGraphInstantiate(&instance, graph, 0), "graph");
    check(cudaGraphLaunch(instance, stream), "graph");
    const auto got = device.out();
    expect_near(got, reference(problem, lists), "graph");
    check(cudaGraphExecDestroy(instance), "graph");
    check(cudaGraphDestroy(graph), "graph");
    check(cudaStreamDestroy(stream), "stream");
  }
}

TEST_P(PagedAttentionTest, OtherHeadDimsAreRefused) {
  EXPECT_THROW(PagedAttention(96, kernel()), Error);
}

// Pages in 8 bits: 3 bits of mantissa in keys, values and terms, so 2^-4 / sqrt(3) each at most on
// average, less by averaging over keys.
class Fp8AttentionTest : public testing::Test {
 protected:
  void SetUp() override { skip_without_gpu(true); }
};

TEST_F(Fp8AttentionTest, EqualsPlainLoopsWithinItsRounding) {
  uint32_t seed = 100;
  for (const auto& [queries, keys, heads] :
       {std::tuple{1, 1, 1}, {129, 1000, 3}, {300, 640, 5}, {65, 5000, 2}, {1000, 257, 31}}) {
    for (const bool with_bias : {false, true}) {
      const Problem problem({queries, keys, heads, 128}, with_bias, seed++);
      const Lists lists = all_pages(problem.shape);
      for (const bool by_shares : {false, true}) {
        PagedAttention attention(128, AttentionKernel::kBest, PageFormat::kFp8);
        Device device(problem, lists, {true, false, by_shares}, PageFormat::kFp8);
        device.run(attention, nullptr);
        expect_near(device.out(), reference(problem, lists),
                    str(queries, " x ", keys, " x ", heads, with_bias ? ", biased" : ""), 8e-2);
      }
    }
  }
}

// Values and weights far from one are what the page's scales are for.
TEST_F(Fp8AttentionTest, ScalesFollowThePage) {
  Problem problem({130, 700, 2, 128}, true, 9);
  for (auto& x : problem.k) x = bf16(float(x) * 1e-3F);
  for (auto& x : problem.q) x = bf16(float(x) * 1e3F);
  for (auto& b : problem.bias) b *= 3;
  const Lists lists = all_pages(problem.shape);
  PagedAttention attention(128, AttentionKernel::kBest, PageFormat::kFp8);
  Device device(problem, lists, {}, PageFormat::kFp8);
  device.run(attention, nullptr);
  expect_near(device.out(), reference(problem, lists), "scaled", 8e-2);
}

TEST_F(Fp8AttentionTest, OtherHeadDimsAreRefused) {
  EXPECT_THROW(PagedAttention(64, AttentionKernel::kBest, PageFormat::kFp8), Error);
}

INSTANTIATE_TEST_SUITE_P(
    Kernels, PagedAttentionTest,
    testing::Combine(testing::Values(AttentionKernel::kPortable, AttentionKernel::kHopper),
                     testing::Values(64, 128)),
    [](const auto& instance) {
      return str(std::get<0>(instance.param) == AttentionKernel::kHopper ? "Hopper" : "Portable",
                 "D", std::get<1>(instance.param));
    });

}  // namespace
}  // namespace longtake::cuda
