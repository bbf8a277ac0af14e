// Every op against its definition in double.
#include <gtest/gtest.h>

#include <cmath>
#include <tuple>

#include "core_support.h"
#include "ops/conv.h"
#include "ops/elementwise.h"
#include "ops/image.h"
#include "ops/linear.h"
#include "ops/norm.h"
#include "ops/patchify.h"
#include "ops/pixel_shuffle.h"
#include "ops/rope.h"
#include "reference/linear.h"
#include "reference/norm.h"

namespace longtake {
namespace {

constexpr DType kF32 = DType::kF32;
constexpr DType kBF16 = DType::kBF16;

// Products of rounded inputs are exact in f32 or nearly so; what remains is summing `length` terms
// and rounding the result.
double product_bound(DType compute, DType out, int64_t length) {
  return 2 * test::epsilon(kF32) * std::sqrt(static_cast<double>(length)) + 2 * test::epsilon(out) +
         (compute == kBF16 ? 1e-6 : 0.0);
}

class Types : public testing::TestWithParam<std::tuple<DType, DType>> {
 protected:
  DType in() const { return std::get<0>(GetParam()); }

  DType out() const { return std::get<1>(GetParam()); }

  Context ctx_{{}, 2};
};

INSTANTIATE_TEST_SUITE_P(Ops, Types,
                         testing::Combine(testing::Values(kF32, kBF16),
                                          testing::Values(kF32, kBF16)),
                         [](const auto& test) {
                           return std::string(name_of(std::get<0>(test.param))) + "_to_" +
                                  name_of(std::get<1>(test.param));
                         });

TEST_P(Types, Linear) {
  if (in() == kBF16 && !bf16_products_supported()) GTEST_SKIP() << "no bf16 products here";
  const int64_t shapes[][3] = {{1, 1, 1},      {7, 17, 31},      {127, 64, 384},
                               {128, 384, 64}, {129, 384, 1536}, {1, 384, 2304}};
  for (const auto& [rows, wide, tall] : shapes) {
    SCOPED_TRACE(str(rows, " x ", wide, " -> ", tall));
    const Tensor x = random_tensor(in(), {rows, wide}, 0);
    const Tensor w = random_tensor(in(), {tall, wide}, 1);
    const Tensor b = random_tensor(kF32, {tall}, 2);
    for (const bool biased : {false, true}) {
      const LinearWeight weight(ctx_, w, {}, biased ? b.view() : View(), in());
      for (const Activation act : {Activation::kNone, Activation::kSilu, Activation::kGeluTanh}) {
        // oneDNN's activations err by 1e-7 of their argument, which a single small value shows.
        if (act != Activation::kNone && tall == 1) continue;
        const Guarded y(out(), {rows, tall});
        linear(ctx_, x, weight, act, y);
        auto expected = reference::linear(
            values(x), values(w), biased ? values(b) : std::vector<double>(),
            static_cast<size_t>(rows), static_cast<size_t>(wide), static_cast<size_t>(tall));
        for (double& e : expected) {
          if (act == Activation::kSilu) e = reference::silu(e);
          if (act == Activation::kGeluTanh) e = reference::gelu_tanh(e);
        }
        expect_close(y, expected, product_bound(in(), out(), wide) + 2e-6);
      }
    }
  }
}

// i8 weights are i8 * scale of their row, rounded to the compute dtype.
TEST_P(Types, LinearFromBytes) {
  if (in() == kBF16 && !bf16_products_supported()) GTEST_SKIP() << "no bf16 products here";
  constexpr int64_t kRows = 5;
  constexpr int64_t kIn = 48;
  constexpr int64_t kOut = 37;
  Tensor bytes({}, DType::kI8, {kOut, kIn});
  Tensor scale({}, kF32, {kOut});
  Tensor wide({}, kF32, {kOut, kIn});
  for (int64_t o = 0; o < kOut; ++o) scale.data<float>()[o] = 0.01F * static_cast<float>(o + 1);
  for (int64_t i = 0; i < bytes.numel(); ++i) {
    bytes.data<int8_t>()[i] = static_cast<int8_t>(i * 37 % 255 - 127);
    const float value = static_cast<float>(bytes.data<int8_t>()[i]) * scale.data<float>()[i / kIn];
    wide.data<float>()[i] = in() == kBF16 ? static_cast<float>(bf16(value)) : value;
  }
  const Tensor x = random_tensor(in(), {kRows, kIn}, 0);
  const LinearWeight weight(ctx_, bytes, scale, {}, in());
  const Guarded y(out(), {kRows, kOut});
  linear(ctx_, x, weight, Activation::kNone, y);
  expect_close(y, reference::linear(values(x), values(wide), {}, kRows, kIn, kOut),
               product_bound(in(), out(), kIn));
}

TEST_P(Types, Conv) {
  if (in() == kBF16 && !bf16_products_supported()) GTEST_SKIP() << "no bf16 products here";
  // height, width, in, out, kernel, stride
  const int64_t shapes[][6] = {{1, 1, 3, 5, 3, 1},    {7, 5, 12, 16, 3, 1},
                               {8, 10, 16, 24, 3, 2}, {16, 32, 64, 12, 3, 1},
                               {9, 9, 8, 8, 1, 1},    {16, 32, 192, 16, 3, 1}};
  for (const auto& [height, width, in_c, out_c, kernel, stride] : shapes) {
    SCOPED_TRACE(str(height, " x ", width, " x ", in_c, " -> ", out_c, ", stride ", stride));
    const auto padding = kernel / 2;
    const Tensor x = random_tensor(in(), {height, width, in_c}, 0);
    const Tensor w = random_tensor(in(), {out_c, in_c, kernel, kernel}, 1);
    const Tensor b = random_tensor(kF32, {out_c}, 2);
    const ConvWeight weight(ctx_, w, {}, b, static_cast<int>(stride), static_cast<int>(padding),
                            in());
    const Guarded y(out(), {weight.out_height(height), weight.out_width(width), out_c});
    conv2d(ctx_, x, weight, y);
    expect_close(y,
                 reference::conv2d(values(x), values(w), values(b), height, width, in_c, out_c,
                                   kernel, stride, padding),
                 product_bound(in(), out(), in_c * kernel * kernel));
  }
}

TEST_P(Types, RmsNorm) {
  for (const int64_t dim : {1, 7, 15, 16, 17, 64, 384}) {
    for (const int64_t rows : {1, 3, 129}) {
      SCOPED_TRACE(str(rows, " x ", dim));
      const Tensor x = random_tensor(in(), {rows, dim}, 0, 3.0F);
      const Tensor w = random_tensor(kF32, {dim}, 1);
      const Guarded y(out(), {rows, dim});
      const auto expected = reference::rms_norm(values(x), values(w), 1e-4);
      rms_norm(ctx_, x, w, 1e-4F, y);
      expect_close(y, expected, 8 * test::epsilon(kF32) + 2 * test::epsilon(out()));
      const Guarded activated(out(), {rows, dim});
      auto silued = expected;
      for (double& e : silued) e = reference::silu(e);
      rms_norm_silu(ctx_, x, w, 1e-4F, activated);
      expect_close(activated, silued, 16 * test::epsilon(kF32) + 2 * test::epsilon(out()));
    }
  }
}

TEST_P(Types, SiluAndConvert) {
  for (const int64_t count : {1, 15, 16, 17, 40001}) {
    SCOPED_TRACE(count);
    const Tensor x = random_tensor(in(), {count}, 0, 5.0F);
    const Guarded converted(out(), {count});
    convert(ctx_, x, converted);
    auto expected = values(x);
    for (double& e : expected) {
      if (out() == kBF16) e = static_cast<float>(bf16(static_cast<float>(e)));
    }
    EXPECT_EQ(values(converted), expected);
    const Guarded y(out(), {count});
    silu(ctx_, x, y);
    expected = values(x);
    for (double& e : expected) e = reference::silu(e);
    expect_close(y, expected, 16 * test::epsilon(kF32) + 2 * test::epsilon(out()));
  }
}

TEST_P(Types, Rope) {
  for (const int64_t length : {1, 33}) {
    constexpr int64_t kHeads = 3;
    constexpr int64_t kDim = 10;
    const Tensor x = random_tensor(in(), {length, kHeads, kDim}, 0);
    Tensor cos({}, kF32, {length, kDim / 2});
    Tensor sin({}, kF32, {length, kDim / 2});
    for (int64_t i = 0; i < cos.numel(); ++i) {
      cos.data<float>()[i] = std::cos(0.1F * static_cast<float>(i));
      sin.data<float>()[i] = std::sin(0.1F * static_cast<float>(i));
    }
    auto expected = values(x);
    const auto c = values(cos);
    const auto s = values(sin);
    for (size_t i = 0; i < expected.size(); i += 2) {
      const size_t angle = i / (kHeads * kDim) * (kDim / 2) + i % kDim / 2;
      const double a = expected[i];
      const double b = expected[i + 1];
      expected[i] = a * c[angle] - b * s[angle];
      expected[i + 1] = a * s[angle] + b * c[angle];
    }
    const Guarded y(out(), x.shape());
    rope(ctx_, x, cos, sin, y);
    expect_close(y, expected, 4 * test::epsilon(kF32) + 2 * test::epsilon(out()));
    if (in() == out()) {
      rope(ctx_, x, cos, sin, x);  // in place
      EXPECT_TRUE(test::same_bits(x, y));
    }
  }
}

class Out : public testing::TestWithParam<DType> {
 protected:
  Context ctx_{{}, 2};
};

INSTANTIATE_TEST_SUITE_P(Ops, Out, testing::Values(kF32, kBF16),
                         [](const auto& test) { return name_of(test.param); });

TEST_P(Out, LayerNorm) {
  for (const int64_t dim : {1, 17, 64, 384}) {
    for (const bool plus_one : {false, true}) {
      SCOPED_TRACE(str(dim, plus_one ? " modulated" : " affine"));
      Tensor x = random_tensor(kF32, {37, dim}, 0);
      // A large common part: the variance must not be computed as E[x^2] - E[x]^2.
      for (int64_t i = 0; i < x.numel(); ++i) x.data<float>()[i] += 100.0F;
      const Tensor scale = random_tensor(kF32, {dim}, 1);
      const Tensor shift = random_tensor(kF32, {dim}, 2);
      const Guarded y(GetParam(), x.shape());
      layer_norm(ctx_, x, scale, shift, 1e-6F, plus_one, y);
      // The mean carries an error of eps * 100, the spread is 1.
      expect_close(y,
                   reference::layer_norm(values(x), values(scale), values(shift), 1e-6, plus_one),
                   dim == 1 ? 0.02 : 200 * test::epsilon(kF32) + 2 * test::epsilon(GetParam()));
    }
  }
}

TEST_P(Out, AddAndAddGated) {
  for (const int64_t dim : {1, 17, 384}) {
    SCOPED_TRACE(dim);
    const Tensor x = random_tensor(kF32, {101, dim}, 0);
    const Tensor y = random_tensor(GetParam(), {101, dim}, 1);
    const Tensor gate = random_tensor(kF32, {dim}, 2);
    auto plain = values(x);
    auto gated = plain;
    const auto more = values(y);
    const auto factor = values(gate);
    for (size_t i = 0; i < plain.size(); ++i) {
      plain[i] += more[i];
      gated[i] += more[i] * factor[i % factor.size()];
    }
    const Tensor a = x.clone();
    add(ctx_, a, y);
    expect_close(a, plain, 2 * test::epsilon(kF32));
    const Tensor b = x.clone();
    add_gated(ctx_, b, y, gate);
    expect_close(b, gated, 2 * test::epsilon(kF32));
  }
}

TEST_P(Out, Multiply) {
  for (const int64_t count : {1, 17, 40000}) {
    const Tensor x = random_tensor(kF32, {count}, 0);
    const Tensor y = random_tensor(kF32, {count}, 1);
    auto expected = values(x);
    const auto factor = values(y);
    for (size_t i = 0; i < expected.size(); ++i) expected[i] *= factor[i];
    const Guarded out(GetParam(), {count});
    multiply(ctx_, x, y, out);
    expect_close(out, expected, 2 * test::epsilon(GetParam()));
  }
}

TEST_P(Out, Relu) {
  const Tensor x = random_tensor(GetParam(), {1001}, 0);
  auto expected = values(x);
  for (double& value : expected) value = std::max(value, 0.0);
  const Guarded out(GetParam(), {1001});
  relu(ctx_, x, out);
  expect_close(out, expected, 0);
}

TEST_P(Out, UpsampleRepeatsPixelsAndConcatJoinsChannels) {
  constexpr int64_t kHeight = 9;
  constexpr int64_t kWidth = 5;
  const Tensor a = random_tensor(GetParam(), {kHeight, kWidth, 3}, 0);
  const Tensor b = random_tensor(GetParam(), {kHeight, kWidth, 2}, 1);
  const Guarded joined(GetParam(), {kHeight, kWidth, 5});
  const View parts[] = {a, b};
  concat_channels(ctx_, parts, joined);
  const Guarded large(GetParam(), {2 * kHeight, 2 * kWidth, 5});
  upsample_nearest(ctx_, joined, large);
  const auto first = values(a);
  const auto second = values(b);
  const auto found = values(large);
  for (int64_t y = 0; y < 2 * kHeight; ++y) {
    for (int64_t x = 0; x < 2 * kWidth; ++x) {
      const int64_t small = y / 2 * kWidth + x / 2;
      for (int64_t c = 0; c < 5; ++c) {
        const double expected = c < 3 ? first[static_cast<size_t>(small * 3 + c)]
                                      : second[static_cast<size_t>(small * 2 + c - 3)];
        EXPECT_EQ(found[static_cast<size_t>((y * 2 * kWidth + x) * 5 + c)], expected);
      }
    }
  }
}

TEST_P(Out, PixelShuffleIsPyTorchsAndInvertible) {
  Context ctx({}, 2);
  constexpr int64_t kHeight = 9;
  constexpr int64_t kWidth = 5;
  constexpr int64_t kChannels = 3;
  const Tensor x = random_tensor(GetParam(), {kHeight, kWidth, 4 * kChannels}, 0);
  const Guarded large(GetParam(), {2 * kHeight, 2 * kWidth, kChannels});
  pixel_shuffle(ctx, x, large);
  const auto in = values(x);
  const auto out = values(large);
  for (int64_t y = 0; y < 2 * kHeight; ++y) {
    for (int64_t col = 0; col < 2 * kWidth; ++col) {
      for (int64_t c = 0; c < kChannels; ++c) {
        const int64_t channel = 4 * c + 2 * (y % 2) + col % 2;
        const int64_t from = (y / 2 * kWidth + col / 2) * 4 * kChannels + channel;
        EXPECT_EQ(out[static_cast<size_t>((y * 2 * kWidth + col) * kChannels + c)],
                  in[static_cast<size_t>(from)]);
      }
    }
  }
  const Guarded back(GetParam(), x.shape());
  pixel_unshuffle(ctx, large, back);
  EXPECT_TRUE(test::same_bits(back, x));
}

TEST_P(Out, PatchifyOrdersChannelsThenPatchRows) {
  constexpr int64_t kChannels = 3;
  constexpr int64_t kHeight = 4;
  constexpr int64_t kWidth = 6;
  constexpr int64_t kPatch = 2;
  Tensor z({}, kF32, {kChannels, kHeight, kWidth});
  for (int64_t i = 0; i < z.numel(); ++i) z.data<float>()[i] = static_cast<float>(i);
  const Guarded tokens(GetParam(), {6, 12});
  patchify(ctx_, z, kPatch, tokens);
  const auto found = values(tokens);
  // Token 4 is the patch at row 1, column 1; value 7 of it is channel 1, py 1, px 1.
  EXPECT_EQ(found[4 * 12 + 7], 1 * kHeight * kWidth + 3 * kWidth + 3);
  if (GetParam() == kF32) {
    const Guarded back(kF32, z.shape());
    unpatchify(ctx_, tokens, kPatch, back);
    EXPECT_TRUE(test::same_bits(back, z));
  }
}

TEST(Axpby, MayWriteIntoAnInput) {
  Context ctx({}, 2);
  const Tensor x = random_tensor(kF32, {1003}, 0);
  const Tensor y = random_tensor(kF32, {1003}, 1);
  auto expected = values(x);
  for (size_t i = 0; i < expected.size(); ++i)
    expected[i] = 0.25 * expected[i] - 3.0 * static_cast<double>(y.data<float>()[i]);
  axpby(ctx, 0.25F, x, -3.0F, y, y);
  expect_close(y, expected, 2 * test::epsilon(kF32));
}

TEST(Expect, NamesTheThingTheExpectedAndTheFound) {
  Context ctx({}, 1);
  const Tensor x = random_tensor(kF32, {2, 4}, 0);
  const Tensor w = random_tensor(kF32, {3}, 0);
  try {
    rms_norm(ctx, x, w, 1e-6F, x);
    FAIL() << "a weight of the wrong size was taken";
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(), "rms_norm weight: expected [4], found [3]");
  }
}

}  // namespace
}  // namespace longtake
