// Every op against its definition in double.
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "core_support.h"
#include "ops/conv.h"
#include "ops/elementwise.h"
#include "ops/heads.h"
#include "ops/image.h"
#include "ops/linear.h"
#include "ops/noise.h"
#include "ops/norm.h"
#include "ops/patchify.h"
#include "ops/pixel_shuffle.h"
#include "ops/residual.h"
#include "ops/rope.h"
#include "ops/stream_linear.h"
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

// On every device, for every type that goes in and comes out. Weights are prepared on the CPU.
class Types : public test::OnDevice<std::tuple<DeviceKind, DType, DType>> {
 protected:
  DeviceKind kind() const override { return std::get<0>(GetParam()); }

  DType in() const { return std::get<1>(GetParam()); }

  DType out() const { return std::get<2>(GetParam()); }

  bool has_products() const { return in() == kF32 || !on_cpu() || bf16_products_supported(); }
};

INSTANTIATE_TEST_SUITE_P(Ops, Types,
                         testing::Combine(testing::ValuesIn(test::device_kinds()),
                                          testing::Values(kF32, kBF16),
                                          testing::Values(kF32, kBF16)),
                         [](const auto& test) {
                           return str(test::name_of(std::get<0>(test.param)), "_",
                                      name_of(std::get<1>(test.param)), "_to_",
                                      name_of(std::get<2>(test.param)));
                         });

TEST_P(Types, Linear) {
  if (!has_products()) GTEST_SKIP() << "no bf16 products here";
  const int64_t shapes[][3] = {{1, 1, 1},      {7, 17, 31},      {127, 64, 384},
                               {128, 384, 64}, {129, 384, 1536}, {1, 384, 2304}};
  for (const auto& [rows, wide, tall] : shapes) {
    SCOPED_TRACE(str(rows, " x ", wide, " -> ", tall));
    const Tensor x = random(in(), {rows, wide}, 0);
    const Tensor w = random_tensor(in(), {tall, wide}, 1);
    const Tensor b = random_tensor(kF32, {tall}, 2);
    for (const bool biased : {false, true}) {
      const LinearWeight weight(ctx(), w, {}, biased ? b.view() : View(), in());
      for (const Activation act :
           {Activation::kNone, Activation::kSilu, Activation::kGeluTanh, Activation::kGelu}) {
        // oneDNN's activations err by 1e-7 of their argument, which a single small value shows.
        if (act != Activation::kNone && tall == 1) continue;
        const Guarded y(device(), out(), {rows, tall});
        linear(ctx(), x, weight, act, y);
        auto expected = reference::linear(
            values(x), values(w), biased ? values(b) : std::vector<double>(),
            static_cast<size_t>(rows), static_cast<size_t>(wide), static_cast<size_t>(tall));
        for (double& e : expected) {
          if (act == Activation::kSilu) e = reference::silu(e);
          if (act == Activation::kGeluTanh) e = reference::gelu_tanh(e);
          if (act == Activation::kGelu) e = reference::gelu(e);
        }
        expect_close(y, expected, product_bound(in(), out(), wide) + 2e-6);
      }
    }
  }
}

// i8 weights are i8 * scale of their row, rounded to the compute dtype.
TEST_P(Types, LinearFromBytes) {
  if (!has_products()) GTEST_SKIP() << "no bf16 products here";
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
  const Tensor x = random(in(), {kRows, kIn}, 0);
  const LinearWeight weight(ctx(), bytes, scale, {}, in());
  const Guarded y(device(), out(), {kRows, kOut});
  linear(ctx(), x, weight, Activation::kNone, y);
  expect_close(y, reference::linear(values(x), values(wide), {}, kRows, kIn, kOut),
               product_bound(in(), out(), kIn));
}

TEST_P(Types, Conv) {
  if (!has_products()) GTEST_SKIP() << "no bf16 products here";
  // height, width, in, out, kernel, stride
  const int64_t shapes[][6] = {
      {1, 1, 3, 5, 3, 1}, {7, 5, 12, 16, 3, 1},    {8, 10, 16, 24, 3, 2},  {16, 32, 64, 12, 3, 1},
      {9, 9, 8, 8, 1, 1}, {16, 32, 192, 16, 3, 1}, {121, 135, 32, 3, 3, 1}};
  for (const auto& [height, width, in_c, out_c, kernel, stride] : shapes) {
    SCOPED_TRACE(str(height, " x ", width, " x ", in_c, " -> ", out_c, ", stride ", stride));
    const auto padding = kernel / 2;
    const Tensor x = random(in(), {height, width, in_c}, 0);
    const Tensor w = random_tensor(in(), {out_c, in_c, kernel, kernel}, 1);
    const Tensor b = random_tensor(kF32, {out_c}, 2);
    const ConvWeight weight(ctx(), w, {}, b, static_cast<int>(stride), static_cast<int>(padding),
                            in());
    const Guarded y(device(), out(), {weight.out_height(height), weight.out_width(width), out_c});
    conv2d(ctx(), x, weight, y);
    expect_close(y,
                 reference::conv2d(values(x), values(w), values(b), height, width, in_c, out_c,
                                   kernel, stride, padding),
                 product_bound(in(), out(), in_c * kernel * kernel));
  }
}

// Images side by side are one; few pixels and many, which a GPU reads by another kernel.
TEST_P(Types, ConvOfParts) {
  if (!has_products()) GTEST_SKIP() << "no bf16 products here";
  const std::vector<int64_t> widths[] = {{5, 12}, {32, 64}, {32, 32, 32}};
  for (const auto& [height, width, out_c] :
       {std::tuple<int64_t, int64_t, int64_t>{3, 7, 8}, {130, 117, 4}, {33, 240, 70}}) {
    for (const std::vector<int64_t>& channels : widths) {
      int64_t in_c = 0;
      for (const int64_t part : channels) in_c += part;
      SCOPED_TRACE(str(height, " x ", width, " x ", in_c, " -> ", out_c));
      const Tensor w = random_tensor(in(), {out_c, in_c, 3, 3}, 1);
      const ConvWeight weight(ctx(), w, {}, {}, 1, 1, in());
      std::vector<Tensor> parts;
      std::vector<View> views;
      for (const int64_t part : channels)
        parts.push_back(random(in(), {height, width, part}, static_cast<uint32_t>(parts.size())));
      for (const Tensor& part : parts) views.push_back(part);
      const Tensor whole(device(), in(), {height, width, in_c});
      concat_channels(ctx(), views, whole);
      const Guarded y(device(), out(), {height, width, out_c});
      conv2d(ctx(), views, weight, y);
      expect_close(
          y, reference::conv2d(values(whole), values(w), {}, height, width, in_c, out_c, 3, 1, 1),
          product_bound(in(), out(), in_c * 9));
    }
  }
}

// Tiles whose weights add up to 1 make the picture again; what was there before does not show.
TEST_P(Types, TilesMakeThePictureAgain) {
  constexpr int64_t kHeight = 11, kWidth = 17, kChannels = 3;
  const Tensor planes = random(kF32, {kChannels, kHeight, kWidth}, 0);
  const Tensor image(device(), kF32, {kHeight, kWidth, kChannels});
  to_channels_last(ctx(), planes, View(), View(), image);
  const Guarded out(device(), kF32, image.shape());

  struct Cut {
    int64_t begin, size, fresh;
    std::vector<float> weights;
  };

  const Cut down[] = {{0, 7, 0, {1, 1, 1, 1, 1, 0.75F, 0.25F}},
                      {5, 6, 2, {0.25F, 0.75F, 1, 1, 1, 1}}};
  const Cut across[] = {{0, 17, 0, std::vector<float>(17, 1.0F)}};
  for (const Cut& y : down) {
    for (const Cut& x : across) {
      const Tensor part(device(), kF32, {kChannels, y.size, x.size});
      crop(ctx(), planes, y.begin, x.begin, part);
      const Tensor tile(device(), kF32, {y.size, x.size, kChannels});
      to_channels_last(ctx(), part, View(), View(), tile);
      const auto weights = [&](const Cut& cut) {
        Tensor w({}, kF32, {cut.size});
        std::copy(cut.weights.begin(), cut.weights.end(), w.data<float>());
        return w.to(device());
      };
      blend(ctx(), tile, weights(y), weights(x), {y.begin, x.begin, y.fresh, x.fresh}, out);
      ctx().synchronize();
    }
  }
  expect_close(out, values(image), 2 * test::epsilon(kF32));
}

TEST_P(Types, RmsNorm) {
  for (const int64_t dim : {1, 7, 15, 16, 17, 64, 384}) {
    for (const int64_t rows : {1, 3, 129}) {
      SCOPED_TRACE(str(rows, " x ", dim));
      const Tensor x = random(in(), {rows, dim}, 0, 3.0F);
      const Tensor w = random(kF32, {dim}, 1);
      const Guarded y(device(), out(), {rows, dim});
      const auto expected = reference::rms_norm(values(x), values(w), 1e-4);
      rms_norm(ctx(), x, w, 1e-4F, y);
      expect_close(y, expected, 8 * test::epsilon(kF32) + 2 * test::epsilon(out()));
      const Guarded activated(device(), out(), {rows, dim});
      auto silued = expected;
      for (double& e : silued) e = reference::silu(e);
      rms_norm_silu(ctx(), x, w, 1e-4F, activated);
      expect_close(activated, silued, 16 * test::epsilon(kF32) + 2 * test::epsilon(out()));
    }
  }
}

TEST_P(Types, SiluAndConvert) {
  for (const int64_t count : {1, 15, 16, 17, 40001}) {
    SCOPED_TRACE(count);
    const Tensor x = random(in(), {count}, 0, 5.0F);
    const Guarded converted(device(), out(), {count});
    convert(ctx(), x, converted);
    auto expected = values(x);
    for (double& e : expected) {
      if (out() == kBF16) e = static_cast<float>(bf16(static_cast<float>(e)));
    }
    EXPECT_EQ(values(converted), expected);
    const Guarded y(device(), out(), {count});
    silu(ctx(), x, y);
    expected = values(x);
    for (double& e : expected) e = reference::silu(e);
    expect_close(y, expected, 16 * test::epsilon(kF32) + 2 * test::epsilon(out()));
  }
}

// cos and sin of angles that grow from pair to pair.
std::pair<Tensor, Tensor> rotations(Device device, int64_t length, int64_t pairs) {
  const Tensor cos({}, kF32, {length, pairs});
  const Tensor sin({}, kF32, {length, pairs});
  for (int64_t i = 0; i < cos.numel(); ++i) {
    cos.data<float>()[i] = std::cos(0.1F * static_cast<float>(i));
    sin.data<float>()[i] = std::sin(0.1F * static_cast<float>(i));
  }
  return {cos.to(device), sin.to(device)};
}

// x [L, N D] rotated; cos, sin [L, D / 2].
std::vector<double> rotated(std::vector<double> x, const std::vector<double>& cos,
                            const std::vector<double>& sin, size_t heads, size_t head_dim) {
  for (size_t i = 0; i < x.size(); i += 2) {
    const size_t angle = i / (heads * head_dim) * (head_dim / 2) + i % head_dim / 2;
    const double a = x[i];
    const double b = x[i + 1];
    x[i] = a * cos[angle] - b * sin[angle];
    x[i + 1] = a * sin[angle] + b * cos[angle];
  }
  return x;
}

TEST_P(Types, Rope) {
  constexpr int64_t kHeads = 3;
  for (const int64_t dim : {2, 10, 64}) {
    for (const int64_t length : {1, 33}) {
      const Tensor x = random(in(), {length, kHeads, dim}, 0);
      const auto [cos, sin] = rotations(device(), length, dim / 2);
      const auto expected =
          rotated(values(x), values(cos), values(sin), kHeads, static_cast<size_t>(dim));
      const Guarded y(device(), out(), x.shape());
      rope(ctx(), x, cos, sin, y);
      expect_close(y, expected, 4 * test::epsilon(kF32) + 2 * test::epsilon(out()));
      if (in() == out()) {
        rope(ctx(), x, cos, sin, x);  // in place
        EXPECT_TRUE(test::same_bits(x, y));
      }
    }
  }
}

// x += y * gate per frame, rounded; then the norm of what is in x, per frame.
TEST_P(Types, AddLayerNorm) {
  struct Case {
    int64_t rows, dim;
    size_t frames;
    bool gated;
    DType residual;
  };

  const Case cases[] = {{6, 1, 3, true, kF32},     {6, 17, 3, true, kF32},
                        {99, 64, 1, false, kBF16}, {128, 384, 1, true, kF32},
                        {30, 384, 3, true, kBF16}, {6, 1536, 2, false, kF32},
                        {6, 2560, 2, true, kF32},  {4100, 128, 4, true, kF32}};
  for (const auto& [rows, dim, frames, gated, residual] : cases) {
    SCOPED_TRACE(str(rows, " x ", dim, ", frames ", frames));
    const Tensor x = random(kF32, {rows, dim}, 0, 2.0F);
    const Tensor y = random(in(), {rows, dim}, 1);
    std::vector<Tensor> matrices;
    std::vector<View> views;
    for (size_t f = 0; f < frames; ++f) {
      matrices.push_back(random(kF32, {3, dim}, 2 + static_cast<uint32_t>(f)));
      views.push_back(matrices.back());
    }
    const FrameVectors gate{gated ? std::span<const View>(views) : std::span<const View>(), 2};
    const FrameVectors scale{views, 1};
    const FrameVectors shift{views, 0};
    auto sum = values(x);
    const auto more = values(y);
    const size_t frame_values = sum.size() / frames;
    std::vector<std::array<std::vector<double>, 3>> vectors(frames);
    for (size_t f = 0; f < frames; ++f) {
      for (int64_t row = 0; row < 3; ++row)
        vectors[f][static_cast<size_t>(row)] = values(matrices[f].view().rows(row, row + 1));
    }
    for (size_t i = 0; i < sum.size(); ++i)
      sum[i] +=
          more[i] * (gated ? vectors[i / frame_values][2][i % static_cast<size_t>(dim)] : 1.0);

    const Tensor added = x.clone();
    add_frames(ctx(), added, y, gate, residual);
    expect_close(added, sum, 2 * test::epsilon(kF32) + 2 * test::epsilon(residual));

    const Tensor both = x.clone();
    const Guarded h(device(), out(), x.shape());
    add_layer_norm(ctx(), both, y, gate, residual, scale, shift, 1e-6F, true, h);
    EXPECT_TRUE(test::same_bits(both, added));
    std::vector<double> expected;
    const auto stream = values(both);
    for (size_t f = 0; f < frames; ++f) {
      const auto begin = stream.begin() + static_cast<std::ptrdiff_t>(f * frame_values);
      const auto normed = reference::layer_norm(
          std::vector<double>(begin, begin + static_cast<std::ptrdiff_t>(frame_values)),
          vectors[f][1], vectors[f][0], 1e-6, true);
      expected.insert(expected.end(), normed.begin(), normed.end());
    }
    const double bound = dim == 1 ? 0.02 : 16 * test::epsilon(kF32) + 2 * test::epsilon(out());
    expect_close(h, expected, bound);
    const Guarded alone(device(), out(), x.shape());
    frame_layer_norm(ctx(), both, scale, shift, 1e-6F, true, alone);
    EXPECT_TRUE(test::same_bits(alone, h));
  }
}

// Products on the residual stream, at sizes that one launch serves on a GPU and at others.
struct StreamCase {
  int64_t rows, in, out;
  size_t frames;
};

constexpr StreamCase kStreamCases[] = {
    {1, 16, 2, 1},     {7, 384, 384, 1},    {128, 384, 1536, 1}, {129, 384, 100, 3},
    {256, 512, 64, 2}, {257, 384, 1152, 1}, {6, 1536, 384, 3},   {128, 1536, 384, 1},
    {5, 30, 37, 1},    {120, 400, 1154, 2}, {128, 640, 96, 1}};

// Vectors 0 ... 2 of every frame.
std::vector<Tensor> frame_matrices(Device device, size_t frames, int64_t dim) {
  std::vector<Tensor> out;
  for (size_t f = 0; f < frames; ++f)
    out.push_back(random_tensor(kF32, {3, dim}, 2 + static_cast<uint32_t>(f)).to(device));
  return out;
}

// The norm of x [rows, dim] by the vectors of its frames, scale in row 1 and shift in row 0,
// rounded to `compute`.
std::vector<double> normed_by_frame(View x, const std::vector<Tensor>& matrices, DType compute) {
  const int64_t rows = x.dim(0) / static_cast<int64_t>(matrices.size());
  std::vector<double> out;
  for (size_t f = 0; f < matrices.size(); ++f) {
    const auto begin = static_cast<int64_t>(f) * rows;
    const auto more = reference::layer_norm(values(x.rows(begin, begin + rows)),
                                            values(matrices[f].view().rows(1, 2)),
                                            values(matrices[f].view().rows(0, 1)), 1e-6, true);
    out.insert(out.end(), more.begin(), more.end());
  }
  if (compute == kBF16) {
    for (double& e : out) e = static_cast<double>(static_cast<float>(bf16(static_cast<float>(e))));
  }
  return out;
}

// Norms in f32 and in double fall on different sides of a few roundings to bf16.
double normed_bound(DType compute, DType out, int64_t length) {
  return product_bound(compute, out, length) + (compute == kBF16 ? 5e-4 : 4e-6);
}

TEST_P(Types, NormLinear) {
  if (!has_products()) GTEST_SKIP() << "no bf16 products here";
  for (const auto& [rows, wide, tall, frames] : kStreamCases) {
    SCOPED_TRACE(str(rows, " x ", wide, " -> ", tall, ", frames ", frames));
    const Tensor x = random(kF32, {rows, wide}, 0, 3.0F);
    const auto matrices = frame_matrices(device(), frames, wide);
    const std::vector<View> views(matrices.begin(), matrices.end());
    const Tensor b = random_tensor(kF32, {tall}, 1);
    const StreamNorm norm{{views, 1}, {views, 0}, 1e-6F, true};
    for (const bool biased : {false, true}) {
      const LinearWeight weight(ctx(), random_tensor(in(), {tall, wide}, 9), {},
                                biased ? b.view() : View(), in());
      auto expected = reference::linear(
          normed_by_frame(x, matrices, in()), values(random_tensor(in(), {tall, wide}, 9)),
          biased ? values(b) : std::vector<double>(), static_cast<size_t>(rows),
          static_cast<size_t>(wide), static_cast<size_t>(tall));
      if (biased) {
        for (double& e : expected) e = reference::gelu_tanh(e);
      }
      const Guarded y(device(), out(), {rows, tall});
      norm_linear(ctx(), x, norm, weight, biased ? Activation::kGeluTanh : Activation::kNone, y);
      expect_close(y, expected, normed_bound(in(), out(), wide) + 2e-6);
    }
  }
}

TEST_P(Types, AddLinear) {
  if (!has_products()) GTEST_SKIP() << "no bf16 products here";
  for (const auto& [rows, wide, tall, frames] : kStreamCases) {
    SCOPED_TRACE(str(rows, " x ", wide, " -> ", tall, ", frames ", frames));
    const Tensor y = random(in(), {rows, wide}, 0);
    const Tensor x = random(kF32, {rows, tall}, 1, 4.0F);
    const auto matrices = frame_matrices(device(), frames, tall);
    const std::vector<View> views(matrices.begin(), matrices.end());
    const Tensor w = random_tensor(in(), {tall, wide}, 9);
    const Tensor b = random_tensor(kF32, {tall}, 10);
    const LinearWeight weight(ctx(), w, {}, b, in());
    const auto more = reference::linear(values(y), values(w), values(b), static_cast<size_t>(rows),
                                        static_cast<size_t>(wide), static_cast<size_t>(tall));
    for (const bool gated : {false, true}) {
      const FrameVectors gate{gated ? std::span<const View>(views) : std::span<const View>(), 2};
      std::vector<double> factors;  // a row of the stream's, for every frame
      for (const Tensor& matrix : matrices) {
        const auto row = values(matrix.view().rows(2, 3));
        factors.insert(factors.end(), row.begin(), row.end());
      }
      auto expected = values(x);
      const auto dim = static_cast<size_t>(tall);
      for (size_t i = 0; i < expected.size(); ++i) {
        const size_t frame = i / (expected.size() / frames);
        expected[i] += more[i] * (gated ? factors[frame * dim + i % dim] : 1.0);
      }
      const Guarded sum(device(), kF32, x.shape());
      add_linear(ctx(), y, weight, gate, out(), x, sum);
      expect_close(sum, expected, product_bound(in(), out(), wide));
      const Tensor same = x.clone();
      add_linear(ctx(), y, weight, gate, out(), same, same);
      EXPECT_TRUE(test::same_bits(same, sum));
    }
  }
}

// Part `index` of `count` of all [L, count N D] as heads are split: normed where the part has a
// norm, rotated where it says so.
std::vector<double> heads_of(const std::vector<double>& all, size_t index, size_t count,
                             int64_t heads, int64_t head_dim, const HeadPart& part, View cos,
                             View sin) {
  const auto dim = static_cast<size_t>(heads * head_dim);
  std::vector<double> out;
  for (size_t begin = index * dim; begin < all.size(); begin += count * dim) {
    const auto from = all.begin() + static_cast<std::ptrdiff_t>(begin);
    out.insert(out.end(), from, from + static_cast<std::ptrdiff_t>(dim));
  }
  if (!part.norm.empty()) out = reference::rms_norm(out, values(part.norm), 1e-6);
  if (part.rotates)
    out = rotated(out, values(cos), values(sin), static_cast<size_t>(heads),
                  static_cast<size_t>(head_dim));
  return out;
}

TEST_P(Types, NormLinearHeads) {
  if (!has_products()) GTEST_SKIP() << "no bf16 products here";

  struct Case {
    int64_t rows, in, heads, head_dim;
    size_t frames;
    std::vector<bool> wanted;
  };

  const Case cases[] = {{1, 384, 1, 64, 1, {true}},
                        {128, 384, 6, 64, 1, {true, true, true}},
                        {129, 384, 6, 64, 3, {true, true, true}},
                        {7, 384, 6, 64, 1, {false, true, true}},
                        {256, 64, 4, 128, 2, {true, true, true}},
                        {33, 30, 3, 10, 3, {true, true, true}},
                        {300, 384, 6, 64, 3, {true, false, true}},
                        {64, 48, 10, 64, 1, {true, true, true}}};
  for (const auto& [rows, wide, heads, head_dim, frames, wanted] : cases) {
    SCOPED_TRACE(str(rows, " x ", wide, " -> ", heads, " x ", head_dim));
    const int64_t dim = heads * head_dim;
    const auto count = static_cast<int64_t>(wanted.size());
    const Tensor x = random(kF32, {rows, wide}, 0, 3.0F);
    const auto matrices = frame_matrices(device(), frames, wide);
    const std::vector<View> views(matrices.begin(), matrices.end());
    const Tensor w = random_tensor(in(), {count * dim, wide}, 9);
    const Tensor b = random_tensor(kF32, {count * dim}, 10);
    const LinearWeight weight(ctx(), w, {}, b, in());
    const Tensor norms = random(kF32, {2, dim}, 1);
    const auto [cos, sin] = rotations(device(), rows, head_dim / 2);
    std::vector<std::unique_ptr<Guarded>> outs;
    std::vector<HeadPart> parts;
    for (size_t p = 0; p < wanted.size(); ++p) {
      outs.push_back(std::make_unique<Guarded>(device(), out(), Shape{rows, heads, head_dim}));
      const auto at = static_cast<int64_t>(p);
      parts.push_back({p < 2 ? norms.view().rows(at, at + 1).reshape({dim}) : View(), p == 0,
                       wanted[p] ? outs.back()->view() : View()});
    }
    norm_linear_heads(ctx(), x, {{views, 1}, {views, 0}, 1e-6F, true}, weight, parts, cos, sin,
                      1e-6F);
    const auto all = reference::linear(normed_by_frame(x, matrices, in()), values(w), values(b),
                                       static_cast<size_t>(rows), static_cast<size_t>(wide),
                                       static_cast<size_t>(count * dim));
    for (size_t p = 0; p < wanted.size(); ++p) {
      if (!wanted[p]) continue;
      const auto expected = heads_of(all, p, wanted.size(), heads, head_dim, parts[p], cos, sin);
      expect_close(*outs[p], expected, normed_bound(in(), out(), wide) + 4e-6);
    }
  }
}

class Out : public test::OnDevice<std::tuple<DeviceKind, DType>> {
 protected:
  DeviceKind kind() const override { return std::get<0>(GetParam()); }

  DType dtype() const { return std::get<1>(GetParam()); }
};

INSTANTIATE_TEST_SUITE_P(Ops, Out,
                         testing::Combine(testing::ValuesIn(test::device_kinds()),
                                          testing::Values(kF32, kBF16)),
                         [](const auto& test) {
                           return str(test::name_of(std::get<0>(test.param)), "_",
                                      name_of(std::get<1>(test.param)));
                         });

TEST_P(Out, LayerNorm) {
  for (const int64_t dim : {1, 17, 64, 384}) {
    for (const bool plus_one : {false, true}) {
      SCOPED_TRACE(str(dim, plus_one ? " modulated" : " affine"));
      const Tensor shifted = random_tensor(kF32, {37, dim}, 0);
      // A large common part: the variance must not be computed as E[x^2] - E[x]^2.
      for (int64_t i = 0; i < shifted.numel(); ++i) shifted.data<float>()[i] += 100.0F;
      const Tensor x = shifted.to(device());
      const Tensor scale = random(kF32, {dim}, 1);
      const Tensor shift = random(kF32, {dim}, 2);
      const Guarded y(device(), dtype(), x.shape());
      layer_norm(ctx(), x, scale, shift, 1e-6F, plus_one, y);
      // The mean carries an error of eps * 100, the spread is 1.
      expect_close(y,
                   reference::layer_norm(values(x), values(scale), values(shift), 1e-6, plus_one),
                   dim == 1 ? 0.02 : 200 * test::epsilon(kF32) + 2 * test::epsilon(dtype()));
    }
  }
}

TEST_P(Out, SplitHeads) {
  struct Case {
    int64_t rows, heads, head_dim;
    std::vector<bool> wanted;
  };

  const Case cases[] = {{1, 1, 2, {true}},
                        {33, 3, 10, {true, true, true}},
                        {128, 6, 64, {true, true, true}},
                        {77, 6, 64, {false, true, true}},
                        {5, 12, 128, {true, true}},
                        {3, 20, 128, {true, false, true}}};
  for (const auto& [rows, heads, head_dim, wanted] : cases) {
    SCOPED_TRACE(str(rows, " x ", heads, " x ", head_dim));
    const int64_t dim = heads * head_dim;
    const auto count = static_cast<int64_t>(wanted.size());
    const Tensor x = random(kF32, {rows, count * dim}, 0, 3.0F);
    const Tensor norms = random(kF32, {2, dim}, 1);
    const auto [cos, sin] = rotations(device(), rows, head_dim / 2);
    std::vector<std::unique_ptr<Guarded>> outs;
    std::vector<HeadPart> parts;
    for (size_t p = 0; p < wanted.size(); ++p) {
      outs.push_back(std::make_unique<Guarded>(device(), dtype(), Shape{rows, heads, head_dim}));
      const auto at = static_cast<int64_t>(p);
      // Queries are normalised and rotated, keys only normalised, values neither.
      parts.push_back({p < 2 ? norms.view().rows(at, at + 1).reshape({dim}) : View(), p == 0,
                       wanted[p] ? outs.back()->view() : View()});
    }
    split_heads(ctx(), x, parts, cos, sin, 1e-6F);
    const auto all = values(x);
    for (size_t p = 0; p < wanted.size(); ++p) {
      if (!wanted[p]) continue;
      const auto expected = heads_of(all, p, wanted.size(), heads, head_dim, parts[p], cos, sin);
      expect_close(*outs[p], expected, 8 * test::epsilon(kF32) + 2 * test::epsilon(dtype()));
    }
  }
}

TEST_P(Out, AddAndAddGated) {
  for (const int64_t dim : {1, 17, 384}) {
    SCOPED_TRACE(dim);
    const Tensor x = random(kF32, {101, dim}, 0);
    const Tensor y = random(dtype(), {101, dim}, 1);
    const Tensor gate = random(kF32, {dim}, 2);
    auto plain = values(x);
    auto gated = plain;
    const auto more = values(y);
    const auto factor = values(gate);
    for (size_t i = 0; i < plain.size(); ++i) {
      plain[i] += more[i];
      gated[i] += more[i] * factor[i % factor.size()];
    }
    const Tensor a = x.clone();
    add(ctx(), a, y);
    expect_close(a, plain, 2 * test::epsilon(kF32));
    const Tensor b = x.clone();
    add_gated(ctx(), b, y, gate);
    expect_close(b, gated, 2 * test::epsilon(kF32));
  }
}

TEST_P(Out, Multiply) {
  for (const int64_t count : {1, 17, 40000}) {
    const Tensor x = random(kF32, {count}, 0);
    const Tensor y = random(kF32, {count}, 1);
    auto expected = values(x);
    const auto factor = values(y);
    for (size_t i = 0; i < expected.size(); ++i) expected[i] *= factor[i];
    const Guarded out(device(), dtype(), {count});
    multiply(ctx(), x, y, out);
    expect_close(out, expected, 2 * test::epsilon(dtype()));
  }
}

TEST_P(Out, Relu) {
  const Tensor x = random(dtype(), {1001}, 0);
  auto expected = values(x);
  for (double& value : expected) value = std::max(value, 0.0);
  const Guarded out(device(), dtype(), {1001});
  relu(ctx(), x, out);
  expect_close(out, expected, 0);
}

TEST_P(Out, UpsampleRepeatsPixelsAndConcatJoinsChannels) {
  constexpr int64_t kHeight = 9;
  constexpr int64_t kWidth = 5;
  const Tensor a = random(dtype(), {kHeight, kWidth, 3}, 0);
  const Tensor b = random(dtype(), {kHeight, kWidth, 2}, 1);
  const Guarded joined(device(), dtype(), {kHeight, kWidth, 5});
  const View parts[] = {a, b};
  concat_channels(ctx(), parts, joined);
  const Guarded large(device(), dtype(), {2 * kHeight, 2 * kWidth, 5});
  upsample_nearest(ctx(), joined, large);
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

TEST_P(Out, PlanesToChannelsLastAndBack) {
  constexpr size_t kChannels = 5;
  constexpr size_t kArea = 7 * 3;
  const Tensor z = random(kF32, {kChannels, 7, 3}, 0);
  const Tensor scale = random(kF32, {kChannels}, 1);
  const Tensor shift = random(kF32, {kChannels}, 2);
  const Guarded image(device(), dtype(), {7, 3, kChannels});
  to_channels_last(ctx(), z, scale, shift, image);
  const auto in = values(z);
  const auto a = values(scale);
  const auto b = values(shift);
  std::vector<double> expected(in.size());
  for (size_t i = 0; i < kArea; ++i) {
    for (size_t c = 0; c < kChannels; ++c)
      expected[i * kChannels + c] = in[c * kArea + i] * a[c] + b[c];
  }
  expect_close(image, expected, 4 * test::epsilon(kF32) + 2 * test::epsilon(dtype()));
  const Guarded plain(device(), dtype(), {7, 3, kChannels});
  to_channels_last(ctx(), z, View(), View(), plain);
  for (size_t i = 0; i < kArea; ++i) {
    for (size_t c = 0; c < kChannels; ++c) expected[i * kChannels + c] = in[c * kArea + i];
  }
  expect_close(plain, expected, 2 * test::epsilon(dtype()));
  if (dtype() == kBF16) return;
  const Guarded back(device(), kF32, z.shape());
  to_planes(ctx(), plain, View(), View(), back);
  EXPECT_TRUE(test::same_bits(back, z));
  const Guarded restored(device(), kF32, z.shape());
  to_planes(ctx(), image, scale, shift, restored);
  expect_close(restored, in, 1e-5);  // a small scale loses places of the shift
}

TEST_P(Out, SoftLimit) {
  const Tensor x = random(kF32, {1003}, 0, 4.0F);
  auto expected = values(x);
  for (double& value : expected) value = 3 * std::tanh(value / 3);
  const Guarded y(device(), dtype(), {1003});
  soft_limit(ctx(), x, 3, y);
  expect_close(y, expected, 4 * test::epsilon(kF32) + 2 * test::epsilon(dtype()));
}

TEST_P(Out, SliceTakesChannels) {
  for (const int64_t unit : {1, 8}) {
    const Tensor x = random(dtype(), {5, 3, 7 * unit}, 0);
    const Guarded part(device(), dtype(), {5, 3, 3 * unit});
    slice_channels(ctx(), x, 2 * unit, part);
    const auto all = values(x);
    const auto found = values(part);
    for (size_t i = 0; i < found.size(); ++i) {
      const auto channels = static_cast<size_t>(3 * unit);
      EXPECT_EQ(found[i], all[i / channels * static_cast<size_t>(7 * unit) +
                              static_cast<size_t>(2 * unit) + i % channels]);
    }
  }
}

// Views that begin anywhere: vector accesses must not be used, or must be put right.
TEST_P(Out, AnyFirstElement) {
  const Tensor x = random(kF32, {103}, 0);
  const Tensor y = random(dtype(), {103}, 1);
  for (const int64_t begin : {1, 2, 3}) {
    const View from = x.view().rows(begin, 103);
    const Guarded sum(device(), kF32, {103 - begin});
    const Guarded product(device(), dtype(), {103 - begin});
    axpby(ctx(), 1, from, 0, from, sum);
    add(ctx(), sum, y.view().rows(begin, 103));
    multiply(ctx(), from, from, product);
    auto expected = values(from);
    const auto more = values(y.view().rows(begin, 103));
    auto squares = expected;
    for (size_t i = 0; i < expected.size(); ++i) {
      squares[i] *= squares[i];
      expected[i] += more[i];
    }
    expect_close(sum, expected, 2 * test::epsilon(kF32));
    expect_close(product, squares, 2 * test::epsilon(dtype()));
  }
}

TEST_P(Out, PixelShuffleIsPyTorchsAndInvertible) {
  constexpr int64_t kHeight = 9;
  constexpr int64_t kWidth = 5;
  constexpr int64_t kChannels = 3;
  const Tensor x = random(dtype(), {kHeight, kWidth, 4 * kChannels}, 0);
  const Guarded large(device(), dtype(), {2 * kHeight, 2 * kWidth, kChannels});
  pixel_shuffle(ctx(), x, large);
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
  const Guarded back(device(), dtype(), x.shape());
  pixel_unshuffle(ctx(), large, back);
  EXPECT_TRUE(test::same_bits(back, x));
}

TEST_P(Out, PatchifyOrdersChannelsThenPatchRows) {
  constexpr int64_t kChannels = 3;
  constexpr int64_t kHeight = 4;
  constexpr int64_t kWidth = 6;
  constexpr int64_t kPatch = 2;
  const Tensor counted({}, kF32, {kChannels, kHeight, kWidth});
  for (int64_t i = 0; i < counted.numel(); ++i) counted.data<float>()[i] = static_cast<float>(i);
  const Tensor z = counted.to(device());
  const Guarded tokens(device(), dtype(), {6, 12});
  patchify(ctx(), z, kPatch, tokens);
  const auto found = values(tokens);
  // Token 4 is the patch at row 1, column 1; value 7 of it is channel 1, py 1, px 1.
  EXPECT_EQ(found[4 * 12 + 7], 1 * kHeight * kWidth + 3 * kWidth + 3);
  if (dtype() == kF32) {
    const Guarded back(device(), kF32, z.shape());
    unpatchify(ctx(), tokens, kPatch, back);
    EXPECT_TRUE(test::same_bits(back, z));
  }
}

class Devices : public test::OnDevice<DeviceKind> {
 protected:
  DeviceKind kind() const override { return GetParam(); }
};

INSTANTIATE_TEST_SUITE_P(Ops, Devices, testing::ValuesIn(test::device_kinds()),
                         [](const auto& test) { return test::name_of(test.param); });

TEST_P(Devices, AxpbyMayWriteIntoAnInput) {
  const Tensor x = random(kF32, {1003}, 0);
  const Tensor y = random(kF32, {1003}, 1);
  auto expected = values(x);
  const auto more = values(y);
  for (size_t i = 0; i < expected.size(); ++i) expected[i] = 0.25 * expected[i] - 3.0 * more[i];
  axpby(ctx(), 0.25F, x, -3.0F, y, y);
  expect_close(y, expected, 2 * test::epsilon(kF32));
}

// The same numbers as on the CPU, but for the last place of a few; a frame's do not depend on what
// else is drawn.
TEST_P(Devices, NoiseIsPhiloxs) {
  constexpr uint64_t kSeed = (uint64_t{7} << 40) + 5;
  constexpr int64_t kFrames = 3;
  constexpr int64_t kFirst = 2;
  for (const int64_t count : {1, 6, 8193}) {
    Tensor clock({}, DType::kI64, {1});
    *clock.data<int64_t>() = 1000;
    const Tensor on_device = clock.to(device());
    const Guarded noise(device(), kF32, {kFrames, count});
    fill_normal(ctx(), kSeed, on_device, 3, noise, kFirst, kFrames);
    std::vector<float> expected(static_cast<size_t>(kFrames * count));
    for (int64_t f = 0; f < kFrames; ++f)
      fill_normal(kSeed, static_cast<uint32_t>(1000 + kFirst + f), 3, expected.data() + f * count,
                  count);
    const Tensor found = test::on_host(noise);
    int64_t different = 0;
    for (int64_t i = 0; i < found.numel(); ++i) {
      const float value = found.data<float>()[i];
      const float wanted = expected[static_cast<size_t>(i)];
      if (value == wanted) continue;
      ++different;
      EXPECT_TRUE(value == std::nextafter(wanted, 10.0F) || value == std::nextafter(wanted, -10.0F))
          << "element " << i << ": " << value << ", expected " << wanted;
    }
    EXPECT_LE(different, on_cpu() ? 0 : found.numel() / 1000);
    RecordProperty(str("different_of_", found.numel()), static_cast<int>(different));
  }
}

TEST_P(Devices, ColoursAreClampedAndComeBack) {
  Tensor pixels({}, kF32, {1, 2, 5});
  const float in[] = {-1.0F, 1.0F, -2.0F, 3.0F, 0.0F, std::nanf(""), 0.5F, -0.999F, 0.999F, 0.001F};
  std::copy(std::begin(in), std::end(in), pixels.data<float>());
  const Tensor from = pixels.to(device());
  const Tensor rgb(device(), DType::kU8, pixels.shape());
  to_rgb(ctx(), from, rgb);
  const Tensor found = test::on_host(rgb);
  const int expected[] = {0, 255, 0, 255, 128, 0, 191, 0, 255, 128};
  for (size_t i = 0; i < std::size(expected); ++i) EXPECT_EQ(found.data<uint8_t>()[i], expected[i]);
  const Guarded back(device(), kF32, pixels.shape());
  from_rgb(ctx(), rgb, back);
  std::vector<double> values_back;
  for (const int e : expected) values_back.push_back(static_cast<float>(e) / 127.5F - 1.0F);
  expect_close(back, values_back, 2 * test::epsilon(kF32));
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
