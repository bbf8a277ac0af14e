// attend against its definition, on every instruction set of this machine, and its properties.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>

#include "attention/attend.h"
#include "attention/over_time.h"
#include "attention/relative.h"
#include "core_support.h"
#include "each_target.h"
#include "kv/page.h"
#include "reference/attention.h"

namespace longtake {
namespace {

constexpr DType kF32 = DType::kF32;
constexpr DType kBF16 = DType::kBF16;
constexpr float kInf = std::numeric_limits<float>::infinity();

// In bf16 the probabilities are rounded (2^-9 each, unrelated to one another) and so is a bf16
// result; in f32 what remains is summing up to a few thousand terms and the exponential.
double bound(DType compute, DType out) {
  return (compute == kBF16 ? 2 * test::epsilon(kBF16) : 4e-6) + 2 * test::epsilon(out);
}

// q [L, N, D], k, v [T, N, D], and the pages made of them.
struct Problem {
  Problem(DType dtype, int64_t queries, int64_t keys, int64_t heads, int64_t dim,
          float spread = 1.0F)
      : q(random_tensor(dtype, {queries, heads, dim}, 0, spread)),
        k(random_tensor(dtype, {keys, heads, dim}, 1)),
        v(random_tensor(dtype, {keys, heads, dim}, 2)),
        pages(ctx, k, v) {
    for (const PageList& list : pages.view().heads) lists.push_back(list);
  }

  KvView view() const { return {q.dtype(), q.dim(2), lists}; }

  float scale() const { return 1.0F / std::sqrt(static_cast<float>(q.dim(2))); }

  std::vector<double> expected(const std::vector<double>& bias = {}) const {
    const auto size = [](int64_t n) { return static_cast<size_t>(n); };
    return reference::attention(values(q), values(k), values(v), bias, size(q.dim(0)),
                                size(k.dim(0)), size(q.dim(1)), size(q.dim(2)),
                                static_cast<double>(scale()));
  }

  // Adds the same bias to a key of every head.
  void set_bias(int64_t key, float bias) {
    for (PageList& list : lists) {
      KvPage& page = list[static_cast<size_t>(key / kPageTokens)];
      page.bias[key % kPageTokens] = bias;
      page.has_bias = true;
    }
  }

  Context ctx{{}, 2};
  Tensor q, k, v;
  KvPages pages;
  std::vector<PageList> lists;  // ours to reorder and to give biases
};

INSTANTIATE_TEST_SUITE_P(Attend, EachTarget, all_targets(), target_name);

TEST_P(EachTarget, MatchesTheDefinition) {
  // queries, keys, heads, dim: one, tile - 1, tile, tile + 1, primes, the models'
  const int64_t shapes[][4] = {{1, 1, 1, 16},     {1, 63, 2, 64},    {5, 64, 1, 32},
                               {6, 65, 2, 64},    {7, 131, 3, 80},   {13, 384, 4, 64},
                               {127, 129, 2, 64}, {128, 640, 6, 64}, {129, 191, 1, 128},
                               {31, 200, 1, 256}};
  for (const auto& [queries, keys, heads, dim] : shapes) {
    for (const DType dtype : {kF32, kBF16}) {
      for (const DType out : {kF32, kBF16}) {
        SCOPED_TRACE(str(name_of(dtype), " -> ", name_of(out), " ", queries, " x ", keys, " x ",
                         heads, " x ", dim));
        Problem p(dtype, queries, keys, heads, dim);
        const Guarded y(out, p.q.shape());
        attend(p.ctx, p.q, p.view(), p.scale(), y);
        expect_close(y, p.expected(), bound(dtype, out));
      }
    }
  }
}

TEST_P(EachTarget, AddsBiases) {
  for (const DType dtype : {kF32, kBF16}) {
    Problem p(dtype, 19, 150, 2, 64);
    std::vector<double> bias(2 * 150, 0.0);
    for (int64_t key = 0; key < 150; ++key) {
      const float b = key % 7 == 0 ? -kInf : 0.3F * static_cast<float>(key % 11) - 1.0F;
      p.set_bias(key, b);
      bias[static_cast<size_t>(key)] = bias[static_cast<size_t>(150 + key)] = b;
    }
    const Guarded y(kF32, p.q.shape());
    attend(p.ctx, p.q, p.view(), p.scale(), y);
    expect_close(y, p.expected(bias), bound(dtype, kF32));
  }
}

// Scores that rise from page to page move the reference every time; large ones must not overflow.
TEST_P(EachTarget, SurvivesExtremeScores) {
  for (const DType dtype : {kF32, kBF16}) {
    for (const float spread : {100.0F, 10000.0F}) {
      SCOPED_TRACE(str(name_of(dtype), " spread ", spread));
      Problem p(dtype, 9, 320, 1, 64, spread);
      const Guarded y(kF32, p.q.shape());
      attend(p.ctx, p.q, p.view(), p.scale(), y);
      // Scores of size s carry an absolute error of eps * s * 8, the probabilities as a relative
      // one.
      expect_close(y, p.expected(),
                   bound(dtype, kF32) + 8 * test::epsilon(kF32) * static_cast<double>(spread));
    }
  }
  Problem p(kF32, 4, 640, 1, 64);
  for (int64_t key = 0; key < 640; ++key) p.set_bias(key, 5.0F * static_cast<float>(key));
  std::vector<double> bias(640);
  for (size_t key = 0; key < 640; ++key) bias[key] = 5.0 * static_cast<double>(key);
  const Guarded y(kF32, p.q.shape());
  attend(p.ctx, p.q, p.view(), p.scale(), y);
  expect_close(y, p.expected(bias), 2e-3);  // scores near 3200: eps * 3200 * a few
}

TEST_P(EachTarget, NothingToAttendGivesZeros) {
  for (const DType dtype : {kF32, kBF16}) {
    Problem p(dtype, 7, 70, 2, 64);
    for (int64_t key = 0; key < 70; ++key) p.set_bias(key, -kInf);
    const Guarded y(kF32, p.q.shape());
    attend(p.ctx, p.q, p.view(), p.scale(), y);
    for (const double value : values(y)) ASSERT_EQ(value, 0.0);
    for (PageList& list : p.lists) list.clear();
    const Guarded z(kF32, p.q.shape());
    attend(p.ctx, p.q, p.view(), p.scale(), z);
    for (const double value : values(z)) ASSERT_EQ(value, 0.0);
  }
}

// A first page without any key must leave no trace.
TEST(Attend, MaskedPagesChangeNothing) {
  for (const DType dtype : {kF32, kBF16}) {
    Problem p(dtype, 7, 192, 1, 64);
    Problem rest(dtype, 7, 192, 1, 64);
    for (int64_t key = 0; key < 64; ++key) p.set_bias(key, -kInf);
    for (PageList& list : rest.lists) list.erase(list.begin());
    const Guarded y(kF32, p.q.shape());
    const Guarded z(kF32, p.q.shape());
    attend(p.ctx, p.q, p.view(), p.scale(), y);
    attend(rest.ctx, rest.q, rest.view(), rest.scale(), z);
    EXPECT_TRUE(test::same_bits(y, z));
  }
}

TEST(Attend, OrderOfPagesDoesNotMatter) {
  for (const DType dtype : {kF32, kBF16}) {
    Problem p(dtype, 20, 700, 2, 64, 4.0F);
    const auto expected = p.expected();
    for (PageList& list : p.lists) {
      std::reverse(list.begin(), list.end());
      std::swap(list[2], list[7]);
    }
    const Guarded y(kF32, p.q.shape());
    attend(p.ctx, p.q, p.view(), p.scale(), y);
    expect_close(y, expected, bound(dtype, kF32));
  }
}

// The grouping lemma: m equal keys are one key with a bias of log m and the mean value.
TEST(Attend, BiasOfLogCountStandsForDuplicates) {
  constexpr int64_t kDuplicates = 5;
  Problem one(kF32, 11, 70, 2, 64);
  Tensor k({}, kF32, {70 + kDuplicates - 1, 2, 64});
  Tensor v({}, kF32, k.shape());
  const size_t row = 2 * 64;
  const auto copy = [&](const Tensor& from, const Tensor& to) {
    std::copy_n(from.data<float>(), 70 * row, to.data<float>());
    for (size_t i = 0; i + 1 < kDuplicates; ++i)
      std::copy_n(from.data<float>() + 33 * row, row, to.data<float>() + (70 + i) * row);
  };
  copy(one.k, k);
  copy(one.v, v);
  const KvPages many(one.ctx, k, v);
  one.set_bias(33, std::log(static_cast<float>(kDuplicates)));
  const Guarded merged(kF32, one.q.shape());
  const Guarded exact(kF32, one.q.shape());
  attend(one.ctx, one.q, one.view(), one.scale(), merged);
  attend(one.ctx, one.q, many.view(), one.scale(), exact);
  expect_close(merged, values(exact), 4e-6);
}

TEST(Attend, ThreadsDoNotChangeABit) {
  for (const DType dtype : {kF32, kBF16}) {
    Problem p(dtype, 300, 500, 3, 64);
    const Guarded y(kF32, p.q.shape());
    attend(p.ctx, p.q, p.view(), p.scale(), y);
    Context single({}, 1);
    const Guarded z(kF32, p.q.shape());
    attend(single, p.q, p.view(), p.scale(), z);
    EXPECT_TRUE(test::same_bits(y, z));
  }
}

TEST(AttendBlocks, EverythingSelectedIsDense) {
  for (const DType dtype : {kF32, kBF16}) {
    for (const int64_t tile_queries : {1, 16, 128, 1000}) {
      SCOPED_TRACE(str(name_of(dtype), " tiles of ", tile_queries));
      Problem p(dtype, 130, 300, 2, 64);
      const int64_t rows = 2 * ((130 + tile_queries - 1) / tile_queries);
      std::vector<int32_t> offsets;
      std::vector<int32_t> pages;
      for (int64_t row = 0; row <= rows; ++row) offsets.push_back(static_cast<int32_t>(row * 5));
      for (int32_t i = 0; i < rows * 5; ++i) pages.push_back(i % 5);
      const Guarded dense(kF32, p.q.shape());
      const Guarded sparse(kF32, p.q.shape());
      attend(p.ctx, p.q, p.view(), p.scale(), dense);
      attend_blocks(p.ctx, p.q, p.view(), {tile_queries, offsets, pages}, p.scale(), sparse);
      EXPECT_TRUE(test::same_bits(dense, sparse));
    }
  }
}

TEST(AttendBlocks, AttendsTheSelectedPagesOnly) {
  Problem p(kF32, 4, 256, 1, 64);
  // Queries 0, 1 attend pages 3 and 1; queries 2, 3 nothing.
  const std::vector<int32_t> offsets = {0, 2, 2};
  const std::vector<int32_t> pages = {3, 1};
  const Guarded y(kF32, p.q.shape());
  attend_blocks(p.ctx, p.q, p.view(), {2, offsets, pages}, p.scale(), y);
  std::vector<double> bias(256, 0.0);
  for (size_t key = 0; key < 256; ++key) {
    if (key / 64 == 0 || key / 64 == 2) bias[key] = -std::numeric_limits<double>::infinity();
  }
  auto expected = p.expected(bias);
  std::fill(expected.begin() + 2 * 64, expected.end(), 0.0);
  expect_close(y, expected, bound(kF32, kF32));
}

TEST(Attend, RefusesWhatItCannotDo) {
  Context ctx({}, 1);
  const Tensor odd = random_tensor(kF32, {4, 1, 24}, 0);
  const KvPages pages(ctx, odd, odd);
  EXPECT_THROW(attend(ctx, odd, pages.view(), 1.0F, odd), Error);  // head_dim 24
  const Tensor q = random_tensor(kBF16, {4, 1, 32}, 0);
  const Tensor k = random_tensor(kF32, {4, 1, 32}, 0);
  const KvPages wide(ctx, k, k);
  EXPECT_THROW(attend(ctx, q, wide.view(), 1.0F, k), Error);  // bf16 queries, f32 keys
}

class EachDevice : public test::OnDevice<DeviceKind> {
 protected:
  DeviceKind kind() const override { return GetParam(); }
};

using AttendRelative = EachDevice;
using AttendOverTime = EachDevice;

INSTANTIATE_TEST_SUITE_P(Devices, AttendRelative, testing::ValuesIn(test::device_kinds()),
                         [](const auto& test) { return test::name_of(test.param); });

// Against double loops over heads, queries and keys.
TEST_P(AttendRelative, AddsABiasByHeadAndDistance) {
  for (const auto& [length, heads, head_dim] :
       {std::array<int64_t, 3>{1, 1, 16}, {7, 3, 5}, {130, 2, 64}, {67, 1, 384}}) {
    SCOPED_TRACE(length);
    const Shape shape{length, heads, head_dim};
    const Tensor q = test::random_tensor(kF32, shape, 0, 0.3F);
    const Tensor k = test::random_tensor(kF32, shape, 1);
    const Tensor v = test::random_tensor(kF32, shape, 2);
    const Tensor bias = test::random_tensor(kF32, {heads, 2 * length - 1}, 3);
    std::vector<double> expected;
    for (int64_t i = 0; i < length; ++i) {
      for (int64_t n = 0; n < heads; ++n) {
        const auto at = [&](const Tensor& x, int64_t token, int64_t d) {
          return double{x.data<float>()[(token * heads + n) * head_dim + d]};
        };
        std::vector<double> weights;
        double sum = 0;
        for (int64_t j = 0; j < length; ++j) {
          double logit = bias.data<float>()[n * (2 * length - 1) + j - i + length - 1];
          for (int64_t d = 0; d < head_dim; ++d) logit += at(q, i, d) * at(k, j, d);
          weights.push_back(std::exp(logit));
          sum += weights.back();
        }
        for (int64_t d = 0; d < head_dim; ++d) {
          double mixed = 0;
          for (int64_t j = 0; j < length; ++j)
            mixed += weights[static_cast<size_t>(j)] / sum * at(v, j, d);
          expected.push_back(mixed);
        }
      }
    }
    for (const DType dtype : {kF32, kBF16}) {
      const test::Guarded out(device(), dtype, shape);
      attend_relative(ctx(), q.to(device()), k.to(device()), v.to(device()), bias.to(device()),
                      out);
      test::expect_close(out, expected, 20 * test::epsilon(dtype));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Devices, AttendOverTime, testing::ValuesIn(test::device_kinds()),
                         [](const auto& test) { return test::name_of(test.param); });

// Every place against the definition: its own keys or shared ones, with less and more behind it
// than the history holds.
TEST_P(AttendOverTime, ReadsWhatTheClockSaysIsThere) {
  struct Case {
    int64_t frames, history, places, heads, head_dim;
  };

  for (const Case& c :
       {Case{1, 0, 1, 1, 1}, {3, 3, 7, 2, 64}, {3, 1, 65, 3, 40}, {2, 5, 1, 5, 256}})
    for (const int64_t now : {int64_t{0}, int64_t{1}, int64_t{3}, int64_t{1000}})
      for (const bool is_shared : {false, true})
        for (const DType dtype : {kF32, kBF16}) {
          SCOPED_TRACE(str(c.places, " places, frame ", now));
          const int64_t there = c.history + c.frames;
          const int64_t key_places = is_shared ? 1 : c.places;
          const Shape of_keys{there, key_places, c.heads, c.head_dim};
          const Tensor q = random_tensor(dtype, {c.frames, c.places, c.heads, c.head_dim}, 0);
          const Tensor k = random_tensor(dtype, of_keys, 1);
          const Tensor v = random_tensor(dtype, of_keys, 2);
          const float scale = 1 / std::sqrt(static_cast<float>(c.head_dim));
          Tensor clock({}, DType::kI64, {1});
          clock.data<int64_t>()[0] = now;

          const auto size = [](int64_t n) { return static_cast<size_t>(n); };
          const size_t row = size(c.heads * c.head_dim);
          const auto first = size(c.history - std::min(c.history, now));
          const auto all_q = values(q), all_k = values(k), all_v = values(v);
          // The frames from `begin` on of one place.
          const auto along = [&](const std::vector<double>& x, size_t num_places, size_t place,
                                 size_t begin) {
            std::vector<double> out;
            for (size_t f = begin; f * num_places * row < x.size(); ++f) {
              const auto from = x.begin() + static_cast<int64_t>((f * num_places + place) * row);
              out.insert(out.end(), from, from + static_cast<int64_t>(row));
            }
            return out;
          };
          std::vector<double> expected(all_q.size());
          for (size_t place = 0; place < size(c.places); ++place) {
            const size_t key_place = is_shared ? 0 : place;
            const auto mixed = reference::attention(
                along(all_q, size(c.places), place, 0),
                along(all_k, size(key_places), key_place, first),
                along(all_v, size(key_places), key_place, first), {}, size(c.frames),
                size(there) - first, size(c.heads), size(c.head_dim), double{scale});
            for (size_t f = 0; f < size(c.frames); ++f)
              std::copy_n(
                  mixed.begin() + static_cast<int64_t>(f * row), row,
                  expected.begin() + static_cast<int64_t>((f * size(c.places) + place) * row));
          }
          const test::Guarded out(device(), dtype, q.shape());
          attend_over_time(ctx(), q.to(device()), k.to(device()), v.to(device()),
                           clock.to(device()), scale, out);
          test::expect_close(out, expected, 16 * test::epsilon(kF32) + 2 * test::epsilon(dtype));
        }
}

}  // namespace
}  // namespace longtake
