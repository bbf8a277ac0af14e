// Figures of merit against closed cases and plain loops.
#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "core_support.h"
#include "metrics/attention.h"
#include "metrics/image.h"
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

TEST(RelativeL2, AndGradient) {
  EXPECT_NEAR(relative_l2(std::vector<float>{3, 0}, std::vector<float>{0, 4}), 1.25, 1e-7);
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
