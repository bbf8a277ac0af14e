// Figures of merit against closed cases and plain loops.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "base/philox.h"
#include "core_support.h"
#include "kv/cache.h"
#include "kv/time_rotation.h"
#include "metrics/attention.h"
#include "metrics/error_bound.h"
#include "metrics/image.h"
#include "metrics/median.h"
#include "metrics/page_math.h"
#include "pipeline/comparison.h"
#include "pipeline/scenario.h"
#include "pipeline/truth.h"

namespace longtake {
namespace {

std::vector<uint8_t> picture(int64_t width, int64_t height, uint64_t salt) {
  std::vector<uint8_t> out(static_cast<size_t>(width * height * 3));
  uint64_t state = 0x9e3779b97f4a7c15ULL * (salt + 1);
  for (uint8_t& value : out) {
    state = state * 6364136223846793005ULL + 1442695040888963407ULL;
    value = static_cast<uint8_t>(state >> 56);
  }
  return out;
}

TEST(Psnr, ClosedCases) {
  const std::vector<uint8_t> black(12, 0), grey(12, 16);
  EXPECT_EQ(psnr(black, black), kMostPsnr);
  EXPECT_NEAR(psnr(black, grey), 20 * std::log10(255.0 / 16), 1e-9);
  std::vector<uint8_t> half = black;
  std::fill(half.begin() + 6, half.end(), 16);
  const std::vector<uint8_t> mask = {1, 1, 0, 0}, other = {0, 0, 1, 1};
  EXPECT_EQ(psnr(black, half, mask), kMostPsnr);
  EXPECT_NEAR(psnr(black, half, other), psnr(black, grey), 1e-9);
}

// Against tokens read one by one; what lies in unused slots counts for nothing.
TEST(PageMath, IsThatOfTheTokens) {
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    for (const int64_t dim : {16, 64, 128}) {
      for (const int64_t used : {1, 7, 63, 64}) {
        SCOPED_TRACE(str(name_of(dtype), ", ", dim, " channels, ", used, " keys"));
        PageStore store({}, dtype, dim);
        KvPage page = store.take();
        const Tensor k = random_tensor(dtype, {used, 1, dim}, 1);
        const Tensor v = random_tensor(dtype, {used, 1, dim}, 2);
        append_tokens(page, k, v, 0, 0, used);
        const Tensor biases = random_tensor(DType::kF32, {used}, 3);
        set_biases(page, biases.data<float>());
        const Tensor q = random_tensor(DType::kF32, {dim}, 4);
        std::vector<double> weights(static_cast<size_t>(used), 0.25), dots(weights.size(), -1);
        weights.back() = 1e-9;
        std::vector<double> found(static_cast<size_t>(dim), 0.5), expected = found;
        page_logits(q.data<float>(), page, dtype, dim, 0.125, dots.data());
        add_page_values(weights.data(), 1e-6, page, dtype, dim, found.data());
        std::vector<float> key(static_cast<size_t>(dim)), value(key.size());
        for (int64_t slot = 0; slot < used; ++slot) {
          read_token(page, dtype, dim, slot, key.data(), value.data());
          double dot = 0;
          for (size_t d = 0; d < key.size(); ++d) dot += double{q.data<float>()[d]} * key[d];
          const auto n = static_cast<size_t>(slot);
          EXPECT_NEAR(dots[n], dot * 0.125 + biases.data<float>()[slot], 1e-12);
          if (weights[n] < 1e-6) continue;
          for (size_t d = 0; d < key.size(); ++d) expected[d] += weights[n] * value[d];
        }
        for (size_t d = 0; d < key.size(); ++d) EXPECT_NEAR(found[d], expected[d], 1e-12);
      }
    }
  }
}

// The definition, window by window.
double plain_ssim(const std::vector<uint8_t>& a, const std::vector<uint8_t>& b, int64_t width,
                  int64_t height) {
  double sum = 0;
  int64_t count = 0;
  for (int64_t c = 0; c < 3; ++c) {
    for (int64_t y = 0; y + 11 <= height; ++y) {
      for (int64_t x = 0; x + 11 <= width; ++x) {
        double total = 0, ma = 0, mb = 0, aa = 0, bb = 0, ab = 0;
        for (int64_t i = 0; i < 11; ++i) {
          for (int64_t j = 0; j < 11; ++j) {
            const auto di = static_cast<double>(i - 5), dj = static_cast<double>(j - 5);
            const double w = std::exp(-(di * di + dj * dj) / 4.5);
            const auto at = static_cast<size_t>(((y + i) * width + x + j) * 3 + c);
            const double p = a[at], q = b[at];
            total += w;
            ma += w * p;
            mb += w * q;
            aa += w * p * p;
            bb += w * q * q;
            ab += w * p * q;
          }
        }
        ma /= total;
        mb /= total;
        const double va = aa / total - ma * ma, vb = bb / total - mb * mb,
                     cov = ab / total - ma * mb;
        constexpr double kC1 = 2.55 * 2.55, kC2 = 7.65 * 7.65;
        sum +=
            (2 * ma * mb + kC1) * (2 * cov + kC2) / ((ma * ma + mb * mb + kC1) * (va + vb + kC2));
        ++count;
      }
    }
  }
  return sum / static_cast<double>(count);
}

TEST(Ssim, EqualsItsDefinition) {
  const auto a = picture(17, 13, 1), b = picture(17, 13, 2);
  EXPECT_NEAR(ssim(a, a, 17, 13), 1, 1e-12);
  EXPECT_NEAR(ssim(a, b, 17, 13), plain_ssim(a, b, 17, 13), 1e-9);
}

TEST(Median, IsTheUpperOfTwo) {
  EXPECT_EQ(median({3, 1, 2}), 2);
  EXPECT_EQ(median({4, 1, 3, 2}), 3);
  EXPECT_TRUE(std::isnan(median({})));
}

TEST(RelativeL2, AndGradient) {
  EXPECT_NEAR(relative_l2(std::vector<float>{3, 0}, std::vector<float>{0, 4}), 1.25, 1e-7);
  EXPECT_NEAR(relative_l2(std::vector<double>{3, 0}, std::vector<double>{0, 4}), 1.25, 1e-12);
  EXPECT_EQ(gradient(std::vector<uint8_t>(5 * 4 * 3, 9), 5, 4), 0);
  std::vector<uint8_t> stripes(4 * 2 * 3);
  for (size_t i = 0; i < stripes.size(); ++i) stripes[i] = i / 3 % 2 != 0 ? 10 : 0;
  EXPECT_EQ(gradient(stripes, 4, 2), 10);
}

TEST(AttentionScore, OfMergedEqualKeysIsPerfectWithLogCount) {
  Context ctx;
  const Tensor q = test::random_tensor(DType::kF32, {8, 1, 16}, 0);
  const Tensor k = test::random_tensor(DType::kF32, {3, 1, 16}, 1);
  const Tensor v = test::random_tensor(DType::kF32, {3, 1, 16}, 2);
  Tensor twice_k({}, DType::kF32, {4, 1, 16}), twice_v({}, DType::kF32, {4, 1, 16});
  for (int64_t i = 0; i < 4; ++i) {  // key 0 comes twice, then 1 and 2
    std::copy_n(k.data<float>() + std::max<int64_t>(0, i - 1) * 16, 16,
                twice_k.data<float>() + i * 16);
    std::copy_n(v.data<float>() + std::max<int64_t>(0, i - 1) * 16, 16,
                twice_v.data<float>() + i * 16);
  }
  const KvPages dense(ctx, twice_k, twice_v);
  KvPages merged(ctx, k, v);
  std::vector<PageList> lists(merged.view().heads.begin(), merged.view().heads.end());
  lists[0][0].bias[0] = std::log(2.0F);
  lists[0][0].has_bias = true;
  const KvView kept{DType::kF32, 16, lists};
  const std::vector<std::vector<int32_t>> members = {{0, 0, 1}};  // the last key: chunk in work
  AttentionScore score = score_attention(q, dense.view(), kept, nullptr, members, 0.25F, 1);
  EXPECT_EQ(score.count, 8);
  EXPECT_NEAR(score.mean().overlap, 1, 1e-6);
  EXPECT_NEAR(score.mean().error, 0, 1e-5);
  EXPECT_NEAR(score.mean().density, 0.75, 1e-9);
  lists[0][0].bias[0] = 0;  // without log m the pair is starved
  score = score_attention(q, dense.view(), kept, nullptr, members, 0.25F, 1);
  EXPECT_LT(score.mean().overlap, 0.99);
  EXPECT_NEAR(score.mean().recall, 1, 1e-9);
  // An evicted key is nobody's.
  score = score_attention(q, dense.view(), kept, nullptr, {{-1, 0, 1}}, 0.25F, 1);
  EXPECT_LT(score.mean().recall, 0.99);
}

// Plain sums over one query of one head; q, k, v rounded to the dtype by the caller.
struct PlainAttention {
  std::vector<double> p, out;

  PlainAttention(View q, View k, View v, int64_t token, int64_t head, double scale,
                 const std::vector<char>& read) {
    const int64_t count = k.dim(0), heads = k.dim(1), dim = k.dim(2);
    const auto qs = test::values(q), ks = test::values(k), vs = test::values(v);
    const auto at = [&](int64_t row, int64_t d) {
      return static_cast<size_t>((row * heads + head) * dim + d);
    };
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) {
      double dot = 0;
      for (int64_t d = 0; d < dim; ++d) dot += qs[at(token, d)] * ks[at(i, d)];
      p.push_back(read[static_cast<size_t>(i)] ? std::exp(dot * scale) : 0);
      sum += p.back();
    }
    out.assign(static_cast<size_t>(dim), 0.0);
    for (int64_t i = 0; i < count; ++i) {
      p[static_cast<size_t>(i)] /= sum;
      for (int64_t d = 0; d < dim; ++d)
        out[static_cast<size_t>(d)] += p[static_cast<size_t>(i)] * vs[at(i, d)];
    }
  }
};

// 150 keys of 2 heads are 2 full pages and one of 22; 37 queries are 2 full tiles and one of 5.
class SelectedScore : public ::testing::TestWithParam<DType> {};

TEST_P(SelectedScore, EqualsPlainSums) {
  constexpr int64_t kKeys = 150, kQueries = 37, kTile = 16, kStride = 3;
  constexpr float kScale = 0.25F;
  Context ctx;
  const Tensor q = test::random_tensor(GetParam(), {kQueries, 2, 16}, 0, 2);
  const Tensor k = test::random_tensor(GetParam(), {kKeys, 2, 16}, 1);
  const Tensor v = test::random_tensor(GetParam(), {kKeys, 2, 16}, 2);
  const KvPages pages(ctx, k, v);
  const std::vector<int32_t> offsets = {0, 1, 3, 4, 7, 9, 10},
                             list = {2, 0, 2, 1, 0, 1, 2, 1, 2, 0};
  const Selection selection{kTile, offsets, list};
  AttentionScore expected;
  for (int64_t head = 0; head < 2; ++head) {
    for (int64_t token = kStride / 2; token < kQueries; token += kStride) {
      const auto row = static_cast<size_t>(head * 3 + token / kTile);
      std::vector<char> read(kKeys, 0);
      for (int32_t i = offsets[row]; i < offsets[row + 1]; ++i) {
        const int64_t begin = list[static_cast<size_t>(i)] * kPageTokens;
        for (int64_t key = begin; key < std::min(kKeys, begin + kPageTokens); ++key)
          read[static_cast<size_t>(key)] = 1;
      }
      const PlainAttention dense(q, k, v, token, head, kScale, std::vector<char>(kKeys, 1));
      const PlainAttention own(q, k, v, token, head, kScale, read);
      AttentionScore one;
      one.count = 1;
      int64_t num_read = 0;
      double difference = 0, norm = 0;
      for (size_t i = 0; i < read.size(); ++i) {
        num_read += read[i];
        one.recall += read[i] ? dense.p[i] : 0;
        one.overlap += std::min(dense.p[i], own.p[i]);
      }
      auto best = dense.p;
      std::sort(best.rbegin(), best.rend());
      for (int64_t i = 0; i < num_read; ++i) one.oracle += best[static_cast<size_t>(i)];
      for (size_t d = 0; d < own.out.size(); ++d) {
        difference += std::pow(own.out[d] - dense.out[d], 2);
        norm += std::pow(dense.out[d], 2);
      }
      one.error = std::sqrt(difference / norm);
      one.density = static_cast<double>(num_read) / kKeys;
      one.tile_density = static_cast<double>(offsets[row + 1] - offsets[row]) * kPageTokens / kKeys;
      expected.add(one);
    }
  }
  const AttentionScore score =
      score_attention(q, pages.view(), pages.view(), &selection, {}, kScale, kStride);
  EXPECT_EQ(score.count, expected.count);
  EXPECT_NEAR(score.recall, expected.recall, 1e-9);
  EXPECT_NEAR(score.oracle, expected.oracle, 1e-9);
  EXPECT_NEAR(score.overlap, expected.overlap, 1e-9);
  EXPECT_NEAR(score.error, expected.error, 1e-9);
  EXPECT_NEAR(score.density, expected.density, 1e-9);
  EXPECT_NEAR(score.tile_density, expected.tile_density, 1e-9);
  EXPECT_LT(score.recall, score.oracle);
}

INSTANTIATE_TEST_SUITE_P(DTypes, SelectedScore, ::testing::Values(DType::kF32, DType::kBF16));

TEST(AttentionScore, OfNothingReadIsAFigure) {
  Context ctx;
  const Tensor q = test::random_tensor(DType::kF32, {4, 1, 16}, 0);
  const KvPages pages(ctx, test::random_tensor(DType::kF32, {70, 1, 16}, 1),
                      test::random_tensor(DType::kF32, {70, 1, 16}, 2));
  const std::vector<int32_t> offsets = {0, 0};
  const Selection nothing{4, offsets, {}};
  const AttentionScore score =
      score_attention(q, pages.view(), pages.view(), &nothing, {}, 0.25F, 1).mean();
  EXPECT_EQ(score.recall, 0);
  EXPECT_EQ(score.oracle, 0);
  EXPECT_EQ(score.overlap, 0);
  EXPECT_EQ(score.density, 0);
  EXPECT_EQ(score.error, 1) << "attend gives zeros";
}

// Two atoms at odds e^(2 eta) are as bad as it gets; what stands for itself makes it better.
TEST(MovedMassBound, ClosedCases) {
  for (const double eta : {0.01, 0.5, 3.0}) {
    const std::vector<double> even = {0, 0}, low(2, -eta), high(2, eta);
    EXPECT_NEAR(moved_mass_bound(even, low, high), std::tanh(eta / 2), 1e-9);
    EXPECT_EQ(moved_mass_bound(even, even, even), 0);
    // One merged entry beside 99 exact ones: P = e^eta / (e^eta + 99) at most.
    std::vector<double> many(100, 1.0);
    std::vector<double> least = many, most = many;
    least[7] -= eta;
    most[7] += eta;
    const double exact = std::exp(eta) / (std::exp(eta) + 99) - 0.01;
    EXPECT_GE(moved_mass_bound(many, least, most), exact);
    EXPECT_LE(moved_mass_bound(many, least, most), 1.02 * exact);
  }
}

TEST(MovedMassBound, HoldsForEveryCornerOfTheBox) {
  constexpr size_t kEntries = 8;
  for (uint32_t seed = 0; seed < 20; ++seed) {
    float draws[4 * kEntries];
    fill_normal(3, seed, 0, draws, 4 * kEntries);
    std::vector<double> logits, low, high;
    for (size_t i = 0; i < kEntries; ++i) {
      logits.push_back(double{draws[i]});
      low.push_back(logits[i] + double{draws[kEntries + i]});
      high.push_back(low[i] + std::abs(double{draws[2 * kEntries + i]}));
      if (draws[3 * kEntries + i] > 0) low[i] = high[i] = logits[i];  // stands for itself
    }
    const double bound = moved_mass_bound(logits, low, high);
    double worst = 0;
    for (uint32_t corner = 0; corner < 1U << kEntries; ++corner) {
      double total = 0, shown = 0, moved = 0;
      const auto at = [&](size_t i) { return corner >> i & 1U ? high[i] : low[i]; };
      for (size_t i = 0; i < kEntries; ++i) {
        total += std::exp(at(i));
        shown += std::exp(logits[i]);
      }
      for (size_t i = 0; i < kEntries; ++i)
        moved += std::abs(std::exp(at(i)) / total - std::exp(logits[i]) / shown) / 2;
      worst = std::max(worst, moved);
    }
    EXPECT_LE(worst, bound + 1e-12) << seed;
    EXPECT_LE(bound, 1.5 * worst + 1e-12) << seed << ": a bound that says something";
  }
}

struct MergeCase {
  GroupKey key;
  GroupBias bias;
  int64_t time_pairs;
  double threshold, max_error;
};

class MergeBound : public ::testing::TestWithParam<MergeCase> {};

// Every query by itself: the mass that merging moved is never more than the cache says.
TEST_P(MergeBound, IsNotExceeded) {
  constexpr int64_t kTokens = 32, kDim = 16, kFrames = 24;
  const MergeCase& one = GetParam();
  const auto scale = 0.25F;
  Context ctx;
  CacheOptions options;
  options.dtype = DType::kF32;
  options.num_heads = 1;
  options.head_dim = kDim;
  options.tokens_per_frame = kTokens;
  options.tempcache = {.exact_frames = 2,
                       .merge_threshold = one.threshold,
                       .max_error = one.max_error,
                       .key = one.key,
                       .bias = one.bias,
                       .time_pairs = one.time_pairs};
  const auto full = make_cache(ctx, options);
  options.memory = "tempcache";
  const auto merged = make_cache(ctx, options);
  merged->trace_members();
  const auto at_time = [&](const Tensor& x, int64_t frame) {
    const TimeRotation rotation(one.time_pairs, 10000, frame);
    for (int64_t t = 0; t < x.dim(0); ++t) rotation.apply(x.data<float>() + t * kDim);
  };
  const Tensor scene = test::random_tensor(DType::kF32, {kTokens, 1, kDim}, 1);
  for (int64_t frame = 0; frame < kFrames; ++frame) {
    const auto stream = static_cast<uint32_t>(100 + frame);
    const Tensor k = test::random_tensor(DType::kF32, scene.shape(), stream, 0.3F);
    for (int64_t i = 0; i < k.numel(); ++i) k.data<float>()[i] += scene.data<float>()[i];
    at_time(k, frame);
    const Tensor q = test::random_tensor(DType::kF32, scene.shape(), 1000 + stream);
    const Tensor v = test::random_tensor(DType::kF32, scene.shape(), 2000 + stream);
    merged->observe_reads(ctx, q);
    merged->observe_queries(ctx, q, {frame, 1});
    for (KvCache* cache : {full.get(), merged.get()}) cache->commit(ctx, k, v, {frame, 1});
  }
  ASSERT_GT(merged->merge_counts().merged, 100);
  const std::vector<std::vector<int32_t>> members = {merged->members(0, kFrames * kTokens)};
  double least_bound = 1, most_moved = 0;
  for (uint32_t n = 0; n < 50; ++n) {
    const Tensor q = test::random_tensor(DType::kF32, {1, 1, kDim}, 5000 + n);
    at_time(q, kFrames);
    const double moved =
        1 - score_attention(q, full->view(), merged->view(), nullptr, members, scale, 1).overlap;
    const double bound = moved_mass_bound(q, *merged, kFrames, scale, 1);
    EXPECT_LE(moved, bound + 1e-6) << "query " << n;
    least_bound = std::min(bound, least_bound);
    most_moved = std::max(moved, most_moved);
  }
  EXPECT_GT(most_moved, 1e-3);
  // The newest key wanders, and its radius counts every step.
  if (one.key == GroupKey::kMean) {
    EXPECT_LT(least_bound, 0.9);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Options, MergeBound,
    ::testing::Values(MergeCase{GroupKey::kMean, GroupBias::kLogCount, 0, 0.6, 0},
                      MergeCase{GroupKey::kNewest, GroupBias::kLogCount, 0, 0.6, 0},
                      MergeCase{GroupKey::kMean, GroupBias::kLogCount, 2, 0.6, 0},
                      MergeCase{GroupKey::kMean, GroupBias::kAges, 2, 0.6, 0},
                      MergeCase{GroupKey::kMean, GroupBias::kNone, 0, 0.6, 0},
                      MergeCase{GroupKey::kMean, GroupBias::kAges, 2, 0, 2.0}));

// The trainer's measures and ours are one: the expected figures are what seen_land_psnr,
// return_psnr and gradient of training/evaluate.py print for two maps from seed 5, 200 frames, and
// the truth with every byte of frame f xor 1 + f % 7 in place of a rollout.
TEST(Truth, FiguresAreTheTrainers) {
  struct Expected {
    Route route;
    double seen, returned;
    int64_t pairs;
  };

  constexpr Expected kExpected[] = {{Route::kExact, 38.99459, 31.16149, 12},
                                    {Route::kOffPhase, 39.05559, 31.23834, 12}};
  for (const Expected& expected : kExpected) {
    Mean seen, returned;
    for (const Scenario& scenario : map_scenarios(5, 2, expected.route, 200)) {
      std::vector<std::vector<uint8_t>> truth, made;
      for (int64_t frame = 0; frame < scenario.num_frames(); ++frame) {
        truth.emplace_back(128 * 256 * 3);
        scenario.render_truth(frame, truth.back());
        made.push_back(truth.back());
        for (uint8_t& value : made.back()) value ^= static_cast<uint8_t>(1 + frame % 7);
        const auto mask = seen_mask(scenario, frame);
        const auto share = static_cast<double>(std::count(mask.begin(), mask.end(), 1)) /
                           static_cast<double>(mask.size());
        if (frame >= scenario.num_primed && share >= kSeenShare)
          seen.add(psnr(made.back(), truth.back(), mask));
      }
      for (const ReturnPair pair : return_pairs(scenario))
        returned.add(return_psnr(scenario, pair, made[static_cast<size_t>(pair.late)],
                                 made[static_cast<size_t>(pair.early)]));
      if (expected.route == Route::kExact && scenario.seed == 5) {
        EXPECT_NEAR(gradient(made[100], 256, 128) / gradient(truth[100], 256, 128), 1.22999, 1e-4);
      }
    }
    EXPECT_NEAR(seen.value(), expected.seen, 1e-3);
    EXPECT_NEAR(returned.value(), expected.returned, 1e-3);
    EXPECT_EQ(returned.count(), expected.pairs);
  }
}

TEST(Truth, SeenLandAndReturns) {
  const auto scenarios = map_scenarios(5, 2, Route::kExact, 240);
  const Scenario& scenario = scenarios[0];
  ASSERT_EQ(scenario.num_frames(), 240);
  ASSERT_EQ(scenario.num_primed, kPrimedFrames);
  const auto share = [&](int64_t frame) {
    const auto mask = seen_mask(scenario, frame);
    double sum = 0;
    for (const uint8_t value : mask) sum += value;
    return sum / static_cast<double>(mask.size());
  };
  EXPECT_EQ(share(0), 1);
  EXPECT_EQ(share(40), 1) << "the way back over primed land";
  EXPECT_EQ(share(110), 0) << "far out";
  const auto pairs = return_pairs(scenario);
  ASSERT_FALSE(pairs.empty());
  for (const ReturnPair& pair : pairs) {
    EXPECT_GT(pair.late - pair.early, kReturnLag);
    EXPECT_EQ(scenario.cameras[static_cast<size_t>(pair.late)].x,
              scenario.cameras[static_cast<size_t>(pair.early)].x);
  }
  // The renderer at one pose twice: only what moves differs.
  std::vector<uint8_t> late(128 * 256 * 3), early(late.size());
  scenario.render_truth(pairs[0].late, late);
  scenario.render_truth(pairs[0].early, early);
  EXPECT_GT(return_psnr(scenario, pairs[0], late, early), 20);
  // Shifted by hand: the common part of two views of one still picture is equal.
  Scenario shifted = scenario;
  shifted.cameras = {{0, 0}, {8, -4}};
  std::vector<uint8_t> at_origin = picture(256, 128, 3), moved(at_origin.size(), 0);
  for (int64_t y = 4; y < 128; ++y) {
    for (int64_t x = 0; x < 248; ++x) {
      for (int64_t c = 0; c < 3; ++c)
        moved[static_cast<size_t>((y * 256 + x) * 3 + c)] =
            at_origin[static_cast<size_t>(((y - 4) * 256 + x + 8) * 3 + c)];
    }
  }
  EXPECT_EQ(return_psnr(shifted, {1, 0}, moved, at_origin), kMostPsnr);
}

}  // namespace
}  // namespace longtake
