// Errors, types, random numbers, buffers, workspace.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "base/dtype.h"
#include "base/error.h"
#include "base/philox.h"
#include "device/context.h"

namespace longtake {
namespace {

// Known answers of Random123 for philox4x32-10.
TEST(Philox, KnownAnswers) {
  const PhiloxBlock zero = philox4x32_10({0, 0, 0, 0}, 0);
  EXPECT_EQ(zero, (PhiloxBlock{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  const uint32_t ones = 0xffffffff;
  const PhiloxBlock full = philox4x32_10({ones, ones, ones, ones}, ~uint64_t{0});
  EXPECT_EQ(full, (PhiloxBlock{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
}

TEST(Philox, NormalsAreStandardAndIndependentOfLength) {
  std::vector<float> many(100000);
  fill_normal(3, 5, 7, many.data(), 100000);
  double sum = 0;
  double square = 0;
  for (const float x : many) {
    ASSERT_TRUE(std::isfinite(x));
    sum += x;
    square += static_cast<double>(x) * x;
  }
  EXPECT_NEAR(sum / 1e5, 0.0, 5 / std::sqrt(1e5));
  EXPECT_NEAR(square / 1e5, 1.0, 5 * std::sqrt(2 / 1e5));
  std::vector<float> few(7);
  fill_normal(3, 5, 7, few.data(), 7);
  EXPECT_TRUE(std::equal(few.begin(), few.end(), many.begin()));
}

TEST(F16, WidensExactly) {
  const auto wide = [](uint16_t bits) {
    f16 half;
    half.bits = bits;
    return static_cast<float>(half);
  };
  EXPECT_EQ(wide(0x3c00), 1.0F);
  EXPECT_EQ(wide(0xc248), -3.140625F);
  EXPECT_EQ(wide(0x7bff), 65504.0F);  // the largest
  EXPECT_EQ(wide(0x0001), 0x1p-24F);  // the smallest, denormal
  EXPECT_EQ(wide(0x83ff), -1023.0F / 0x1p24F);
  EXPECT_TRUE(std::signbit(wide(0x8000)));
  EXPECT_TRUE(std::isinf(wide(0x7c00)));
  EXPECT_TRUE(std::isnan(wide(0x7e00)));
}

TEST(Bf16, RoundsToNearestEvenAndKeepsNan) {
  EXPECT_EQ(bf16(1.0F).bits, 0x3f80);
  EXPECT_EQ(bf16(std::bit_cast<float>(0x3f808000U)).bits, 0x3f80);  // a tie goes to even
  EXPECT_EQ(bf16(std::bit_cast<float>(0x3f818000U)).bits, 0x3f82);
  EXPECT_EQ(bf16(std::bit_cast<float>(0x3f808001U)).bits, 0x3f81);
  EXPECT_EQ(bf16(std::numeric_limits<float>::infinity()).bits, 0x7f80);
  EXPECT_TRUE(std::isnan(static_cast<float>(bf16(std::bit_cast<float>(0x7f800001U)))));
}

TEST(Workspace, GivesMemoryBackAndGrowsOnlyOnce) {
  Context ctx({}, 1);
  uint64_t allocations = 0;
  for (int step = 0; step < 3; ++step) {
    const Workspace::Scope scope(ctx.workspace());
    const View a = ctx.workspace().take(DType::kF32, {1000, 1000});
    const View b = ctx.workspace().take(DType::kBF16, {3});
    EXPECT_NE(a.raw(), b.raw());
    EXPECT_EQ(reinterpret_cast<uintptr_t>(b.raw()) % 64, 0U);
    if (step == 0) allocations = num_buffer_allocations();
  }
  EXPECT_EQ(num_buffer_allocations(), allocations);
}

TEST(View, NamesAWrongType) {
  const Tensor t({}, DType::kF32, {2, 3});
  EXPECT_THROW(t.data<bf16>(), InternalError);
  EXPECT_THROW(t.view().rows(1, 3), InternalError);
  EXPECT_EQ(t.view().rows(1, 2).shape(), (Shape{1, 3}));
}

}  // namespace
}  // namespace longtake
