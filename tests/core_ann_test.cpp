// The indexes against exact search: planted neighbours, slots that come and go, options.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <vector>

#include "ann/index.h"
#include "ann/lsh.h"
#include "ann/quant.h"
#include "ann/short_list.h"
#include "base/error.h"
#include "base/philox.h"
#include "each_target.h"

namespace longtake {
namespace {

constexpr int64_t kDim = 64;

std::vector<float> normals(uint64_t seed, int64_t count) {
  std::vector<float> out(static_cast<size_t>(count));
  fill_normal(seed, 0, 0, out.data(), count);
  return out;
}

float square_distance(const float* a, const float* b) {
  float sum = 0;
  for (int64_t d = 0; d < kDim; ++d) sum += (a[d] - b[d]) * (a[d] - b[d]);
  return sum;
}

// `count` random vectors and as many queries; query i lies at cosine ~ 1 / sqrt(1 + noise^2) of
// vector i.
struct Planted {
  Planted(int64_t number, float noise)
      : count(number), vectors(normals(1, count * kDim)), queries(normals(2, count * kDim)) {
    for (size_t i = 0; i < queries.size(); ++i) queries[i] = vectors[i] + noise * queries[i];
  }

  const float* vector(int64_t i) const { return vectors.data() + i * kDim; }

  const float* query(int64_t i) const { return queries.data() + i * kDim; }

  void fill(AnnIndex& index) const {
    for (int64_t i = 0; i < count; ++i) index.set(i, vector(i));
  }

  int32_t nearest(const float* query) const {
    int32_t best = 0;
    for (int32_t i = 1; i < count; ++i) {
      if (square_distance(query, vector(i)) < square_distance(query, vector(best))) best = i;
    }
    return best;
  }

  // Share of queries whose exact nearest vector is among the `most` candidates.
  double recall(AnnIndex& index, int64_t most) const {
    int64_t hits = 0;
    std::vector<int32_t> found;
    for (int64_t i = 0; i < count; ++i) {
      index.nearest(query(i), most, found);
      hits += std::count(found.begin(), found.end(), nearest(query(i)));
    }
    return static_cast<double>(hits) / static_cast<double>(count);
  }

  int64_t count;
  std::vector<float> vectors, queries;
};

// Share of queries whose bucket holds the exact nearest vector.
double bucket_recall(const Planted& planted, AnnIndex& index) {
  int64_t hits = 0;
  std::vector<int32_t> found;
  for (int64_t i = 0; i < planted.count; ++i) {
    index.bucket(planted.query(i), found);
    hits += std::count(found.begin(), found.end(), planted.nearest(planted.query(i)));
  }
  return static_cast<double>(hits) / static_cast<double>(planted.count);
}

TEST(Lsh, FindsPlantedNeighbours) {
  const Planted planted(600, 0.33F);  // cosine .95
  const auto index = make_ann_index(AnnEngine::kLsh, kDim, 7);
  planted.fill(*index);
  EXPECT_GT(planted.recall(*index, 8), 0.995);
  // 1 - (1 - .28 - .38)^4 = .987: no sign of twelve differs in one of four tables, or one does.
  EXPECT_NEAR(bucket_recall(planted, *index), 0.987, 0.015);
}

TEST(Lsh, OneTableOfOneProbeMissesThem) {
  const Planted planted(600, 0.33F);
  LshIndex index(kDim, {.bits = 12, .tables = 1, .radius = 0, .seed = 7});
  planted.fill(index);
  // (1 - acos(.95) / pi)^12 = .28
  EXPECT_NEAR(bucket_recall(planted, index), 0.28, 0.08);
}

INSTANTIATE_TEST_SUITE_P(Lsh, EachTarget, all_targets(), target_name);

// The scan against plain ranks, at sizes around its blocks; few signs tie often.
TEST_P(EachTarget, RanksBySignsThenBySlot) {
  for (const int bits : {1, 5, 12, 16}) {
    const LshOptions options{.bits = bits, .tables = bits < 12 ? 2 : 4, .radius = 1, .seed = 3};
    const LshCoder coder(kDim, options);
    for (const int64_t count : {1, 7, 127, 128, 129, 300}) {
      const Planted planted(count, 2.0F);
      LshIndex index(kDim, options);
      std::vector<int32_t> slots(static_cast<size_t>(count));
      std::iota(slots.begin(), slots.end(), 0);
      index.set_all(slots.data(), planted.vector(0), count);
      std::vector<uint64_t> codes(slots.size());
      for (int64_t i = 0; i < count; ++i)
        codes[static_cast<size_t>(i)] = coder.code(planted.vector(i));
      for (const int64_t most : {1, 8, 64}) {
        std::vector<int32_t> found(static_cast<size_t>(count * most));
        index.nearest_all(planted.query(0), count, most, AnnIndex::kAnyDistance, found.data());
        for (int64_t i = 0; i < count; ++i) {
          const uint64_t code = coder.code(planted.query(i));
          std::vector<int32_t> expected = slots;
          std::stable_sort(expected.begin(), expected.end(), [&](int32_t a, int32_t b) {
            return __builtin_popcountll(code ^ codes[static_cast<size_t>(a)]) <
                   __builtin_popcountll(code ^ codes[static_cast<size_t>(b)]);
          });
          expected.resize(static_cast<size_t>(most), -1);
          const auto begin = found.begin() + i * most;
          ASSERT_EQ(std::vector<int32_t>(begin, begin + most), expected) << count << ' ' << i;
        }
      }
    }
  }
}

TEST(Lsh, CodesAreSeededAndBucketsHoldTheirMembers) {
  const Planted planted(200, 0.1F);
  const LshOptions options{.bits = 6, .tables = 2, .radius = 1, .seed = 3};
  const LshCoder coder(kDim, options);
  std::vector<uint64_t> codes(200);
  coder.codes(planted.vectors.data(), 200, codes.data());
  EXPECT_EQ(codes[17], LshCoder(kDim, options).code(planted.vector(17)));
  EXPECT_NE(codes[17], LshCoder(kDim, {6, 2, 1, 4}).code(planted.vector(17)));

  LshIndex index(kDim, options);
  planted.fill(index);
  std::vector<int32_t> found;
  index.bucket(planted.query(5), found);
  const uint64_t code = coder.code(planted.query(5));
  std::vector<int32_t> expected;
  for (int32_t i = 0; i < 200; ++i) {
    bool near = false;
    for (int table = 0; table < options.tables; ++table)
      near |= __builtin_popcount(coder.bucket_of(code, table) ^
                                 coder.bucket_of(codes[static_cast<size_t>(i)], table)) <= 1;
    if (near) expected.push_back(i);
  }
  EXPECT_EQ(found, expected);
}

TEST(ShortList, KeepsTheSmallestFloatsThenTheLowestSlots) {
  const float values[] = {2.5F, -1.0F, 0.0F, -3.0F, 2.5F, 1e30F, -1.0F, 1e-30F};
  ShortList list(5);
  int32_t found[5];
  list.write(found);
  EXPECT_EQ(found[0], -1);
  for (int32_t slot = 7; slot >= 0; --slot) {
    EXPECT_EQ(list.is_full(), slot < 3);
    list.offer(ShortList::word(ShortList::rank_of(values[slot]), slot));
  }
  list.write(found);
  EXPECT_EQ(std::vector<int32_t>(found, found + 5), (std::vector<int32_t>{3, 1, 6, 2, 7}));
  EXPECT_EQ(list.worst_slot(), 7);
}

TEST(Quant, RecallGrowsWithBits) {
  const Planted planted(600, 3.0F);  // hardly nearer than the others
  double last = 0;
  for (const int bits : {2, 4, 8}) {
    QuantIndex index(kDim, {.bits = bits});
    planted.fill(index);
    const double recall = planted.recall(index, 1);
    EXPECT_GT(recall, last) << bits;
    last = recall;
  }
  EXPECT_GE(last, 0.97);
}

TEST(Quant, BucketIsABall) {
  const Planted planted(300, 0.05F);
  QuantIndex index(kDim, {.bits = 8, .radius = 1.0F});
  planted.fill(index);
  std::vector<int32_t> found;
  for (int32_t i = 0; i < 300; ++i) {
    index.bucket(planted.query(i), found);
    EXPECT_EQ(found, std::vector<int32_t>{i});  // others are about sqrt(128) away
  }
}

// The scan against the distances of the integers, around the sizes of blocks and of the choice of
// channels, in widths that fill no vector.
TEST(Quant, RanksByTheIntegers) {
  for (const int64_t dim : {3, 20, 64, 70}) {
    for (const int64_t count : {1, 63, 64, 65, 300}) {
      const std::vector<float> rows = normals(3, 2 * count * dim);  // vectors, then queries
      QuantIndex index(dim, {});
      std::vector<std::vector<double>> rounded;
      for (int64_t i = 0; i < 2 * count; ++i) {
        std::vector<int8_t> code(static_cast<size_t>(dim));
        const float scale = index.quantise(rows.data() + i * dim, code.data());
        for (auto& row = rounded.emplace_back(); const int8_t x : code) row.push_back(scale * x);
        if (i < count) index.set(i, rows.data() + i * dim);
      }
      const auto distance = [&](int64_t a, int64_t b) {
        double sum = 0;
        for (size_t d = 0; d < static_cast<size_t>(dim); ++d) {
          const double x = rounded[static_cast<size_t>(a)][d] - rounded[static_cast<size_t>(b)][d];
          sum += x * x;
        }
        return sum;
      };
      std::vector<int32_t> found;
      for (int64_t i = 0; i < count; ++i) {
        index.nearest(rows.data() + (count + i) * dim, 8, found);
        ASSERT_EQ(found.size(), static_cast<size_t>(std::min<int64_t>(count, 8)));
        std::vector<double> expected;
        for (int64_t slot = 0; slot < count; ++slot) expected.push_back(distance(count + i, slot));
        std::sort(expected.begin(), expected.end());
        for (size_t k = 0; k < found.size(); ++k)
          ASSERT_NEAR(distance(count + i, found[k]), expected[k], 1e-4) << dim << ' ' << count;
      }
    }
  }
}

// What is within the distance is found as without one, around the sizes of blocks, after removals
// and in other widths; what is far beyond is not.
TEST(Quant, ADistanceLeavesOutOnlyWhatIsFarther) {
  for (const int64_t count : {1, 15, 16, 17, 300}) {
    const Planted planted(count, 0.5F);
    QuantIndex index(kDim, {});
    planted.fill(index);
    for (int64_t i = 0; i < count / 3; ++i) index.remove(i);
    constexpr int64_t kMost = 8;
    std::vector<int32_t> all(static_cast<size_t>(count * kMost)), near(all.size());
    index.nearest_all(planted.query(0), count, kMost, AnnIndex::kAnyDistance, all.data());
    for (const float within : {4.0F, 16.0F, 130.0F}) {  // planted ones lie at 16, others at 144
      index.nearest_all(planted.query(0), count, kMost, within, near.data());
      int64_t wanted = 0, found = 0;
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t k = 0; k < kMost; ++k) {
          const auto at = static_cast<size_t>(i * kMost + k);
          found += near[at] >= 0;
          if (all[at] < 0) continue;
          // Which vector the slot holds now does not matter here: both answers name slots.
          if (near[at] >= 0) {
            ASSERT_EQ(near[at], all[at]) << count << ' ' << within;
          }
          wanted += near[at] >= 0;
        }
      }
      EXPECT_EQ(found, wanted);
      if (count == 300 && within == 4.0F) {
        EXPECT_LT(found, 10);
      }
      if (count == 300 && within == 16.0F) {
        EXPECT_GT(found, 60);
        EXPECT_LT(found, 250);
      }
    }
  }
}

class EitherIndex : public testing::TestWithParam<AnnEngine> {};

// Sets, rewrites and removals in any order leave what a fresh index of the same vectors has.
TEST_P(EitherIndex, AnswersDependOnTheVectorsAlone) {
  const Planted planted(150, 0.3F);
  const auto index = make_ann_index(GetParam(), kDim, 9);
  std::vector<int64_t> held;  // vector in slot
  for (uint32_t turn = 0; turn < 1500; ++turn) {
    const auto words = philox4x32_10({turn, 0, 0, 0}, 5);
    const auto which = static_cast<int64_t>(words[0] % 150);
    if (held.empty() || words[1] % 3 == 0) {
      index->set(index->size(), planted.vector(which));
      held.push_back(which);
      continue;
    }
    const size_t slot = words[2] % held.size();
    if (words[1] % 3 == 1) {
      index->set(static_cast<int64_t>(slot), planted.vector(which));
      held[slot] = which;
    } else {
      index->remove(static_cast<int64_t>(slot));
      held[slot] = held.back();
      held.pop_back();
    }
  }
  ASSERT_GT(held.size(), 5U);
  const auto fresh = make_ann_index(GetParam(), kDim, 9);
  for (size_t i = held.size(); i > 0; --i) fresh->set(fresh->size(), planted.vector(held[0]));
  for (size_t i = 0; i < held.size(); ++i)
    fresh->set(static_cast<int64_t>(i), planted.vector(held[i]));
  ASSERT_EQ(index->size(), fresh->size());
  std::vector<int32_t> a;
  std::vector<int32_t> b;
  for (int64_t i = 0; i < 150; ++i) {
    index->nearest(planted.query(i), 4, a);
    fresh->nearest(planted.query(i), 4, b);
    EXPECT_EQ(a, b);
    index->bucket(planted.query(i), a);
    fresh->bucket(planted.query(i), b);
    EXPECT_EQ(a, b);
  }
  index->clear();
  index->nearest(planted.query(0), 4, a);
  EXPECT_TRUE(a.empty());
}

INSTANTIATE_TEST_SUITE_P(Engines, EitherIndex, testing::Values(AnnEngine::kLsh, AnnEngine::kQuant),
                         [](const auto& engine) {
                           return engine.param == AnnEngine::kLsh ? "Lsh" : "Quant";
                         });

TEST(Options, OutOfRangeAreRefused) {
  EXPECT_THROW(LshIndex(kDim, {.bits = 0}), Error);
  EXPECT_THROW(LshIndex(kDim, {.bits = 16, .tables = 5}), Error);
  EXPECT_THROW(LshIndex(kDim, {.bits = 8, .radius = 9}), Error);
  EXPECT_THROW(QuantIndex(kDim, {.bits = 1}), Error);
  EXPECT_THROW(QuantIndex(kDim, {.bits = 9}), Error);
}

}  // namespace
}  // namespace longtake
