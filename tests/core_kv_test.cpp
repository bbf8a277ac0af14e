// Cache policies: what stays, what is read back, what a hostile saved state does.
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <new>
#include <sstream>

#include "attention/attend.h"
#include "base/error.h"
#include "core_support.h"
#include "kv/cache.h"
#include "ops/linear.h"
#include "ops/norm.h"
#include "ops/rope.h"

namespace {

// Counts every allocation through operator new in this program.
uint64_t num_news = 0;

}  // namespace

// noinline: else g++ sees malloc'd memory meet operator delete and warns.
__attribute__((noinline)) void* operator new(size_t bytes) {
  ++num_news;
  if (void* data = std::malloc(bytes)) return data;
  throw std::bad_alloc();
}

__attribute__((noinline)) void operator delete(void* data) noexcept {
  std::free(data);
}

__attribute__((noinline)) void operator delete(void* data, size_t) noexcept {
  std::free(data);
}

namespace longtake {
namespace {

constexpr int64_t kHeads = 2;
constexpr int64_t kDim = 32;

CacheOptions options(const std::string& memory, DType dtype, int64_t tokens_per_frame) {
  CacheOptions out;
  out.memory = memory;
  out.sink_frames = 1;
  out.window_frames = 3;
  out.dtype = dtype;
  out.num_heads = kHeads;
  out.head_dim = kDim;
  out.tokens_per_frame = tokens_per_frame;
  return out;
}

Tensor frame(DType dtype, int64_t tokens, uint32_t number) {
  return random_tensor(dtype, {tokens, kHeads, kDim}, number);
}

void commit_frames(Context& ctx, KvCache& cache, DType dtype, int64_t tokens, int64_t begin,
                   int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const auto number = static_cast<uint32_t>(2 * i + 100);
    cache.commit(ctx, frame(dtype, tokens, number), frame(dtype, tokens, number + 1), {i, 1});
  }
}

// The frames named, one behind the other, as plain tensors attended at once.
Tensor attend_frames(Context& ctx, View q, DType dtype, int64_t tokens,
                     const std::vector<int64_t>& frames) {
  const Shape shape = {tokens * static_cast<int64_t>(frames.size()), kHeads, kDim};
  Tensor k({}, dtype, shape);
  Tensor v({}, dtype, shape);
  for (size_t i = 0; i < frames.size(); ++i) {
    const auto number = static_cast<uint32_t>(2 * frames[i] + 100);
    const Tensor frame_k = frame(dtype, tokens, number);
    const Tensor frame_v = frame(dtype, tokens, number + 1);
    std::memcpy(k.view().raw() + i * frame_k.bytes(), frame_k.view().raw(), frame_k.bytes());
    std::memcpy(v.view().raw() + i * frame_v.bytes(), frame_v.view().raw(), frame_v.bytes());
  }
  const KvPages pages(ctx, k, v);
  Tensor out({}, DType::kF32, q.shape());
  attend(ctx, q, pages.view(), 0.2F, out);
  return out;
}

Tensor attend_cache(Context& ctx, View q, const KvCache& cache) {
  Tensor out({}, DType::kF32, q.shape());
  attend(ctx, q, cache.view(), 0.2F, out);
  return out;
}

class Cache : public testing::TestWithParam<DType> {
 protected:
  DType dtype() const { return GetParam(); }

  double bound() const { return dtype() == DType::kF32 ? 4e-6 : 4e-3; }

  Context ctx_{{}, 2};
};

INSTANTIATE_TEST_SUITE_P(Kv, Cache, testing::Values(DType::kF32, DType::kBF16),
                         [](const auto& test) { return name_of(test.param); });

// History in pieces of any size, and the chunk in work behind it, equal one pass over all keys.
TEST_P(Cache, FullKeepsEverything) {
  for (const int64_t tokens : {1, 23, 64, 128}) {
    SCOPED_TRACE(tokens);
    const auto cache = make_cache(ctx_, options("full", dtype(), tokens));
    const Tensor q = random_tensor(dtype(), {9, kHeads, kDim}, 0);
    commit_frames(ctx_, *cache, dtype(), tokens, 0, 6);
    EXPECT_EQ(cache->entries(), 6 * tokens);
    EXPECT_EQ(cache->total_entries(), 6 * tokens * kHeads);
    cache->set_current(ctx_, frame(dtype(), tokens, 90), frame(dtype(), tokens, 91));
    cache->set_current(ctx_, frame(dtype(), tokens, 112), frame(dtype(), tokens, 113));  // frame 6
    EXPECT_EQ(cache->entries(), 6 * tokens);
    expect_close(attend_cache(ctx_, q, *cache),
                 values(attend_frames(ctx_, q, dtype(), tokens, {0, 1, 2, 3, 4, 5, 6})), bound());
    commit_frames(ctx_, *cache, dtype(), tokens, 6, 7);
    EXPECT_EQ(cache->entries(), 7 * tokens);
    expect_close(attend_cache(ctx_, q, *cache),
                 values(attend_frames(ctx_, q, dtype(), tokens, {0, 1, 2, 3, 4, 5, 6})), bound());
  }
}

TEST_P(Cache, WindowKeepsTheSinkAndTheLatest) {
  for (const int64_t tokens : {23, 64, 128}) {
    SCOPED_TRACE(tokens);
    const auto cache = make_cache(ctx_, options("window", dtype(), tokens));
    const Tensor q = random_tensor(dtype(), {9, kHeads, kDim}, 0);
    commit_frames(ctx_, *cache, dtype(), tokens, 0, 9);
    EXPECT_EQ(cache->entries(), 4 * tokens);
    expect_close(attend_cache(ctx_, q, *cache),
                 values(attend_frames(ctx_, q, dtype(), tokens, {0, 6, 7, 8})), bound());
  }
}

TEST_P(Cache, ShortWindowIsFull) {
  const auto full = make_cache(ctx_, options("full", dtype(), 64));
  const auto window = make_cache(ctx_, options("window", dtype(), 64));
  commit_frames(ctx_, *full, dtype(), 64, 0, 4);
  commit_frames(ctx_, *window, dtype(), 64, 0, 4);
  const Tensor q = random_tensor(dtype(), {9, kHeads, kDim}, 0);
  EXPECT_TRUE(test::same_bits(attend_cache(ctx_, q, *full), attend_cache(ctx_, q, *window)));
}

TEST_P(Cache, AWindowCanBeReadInPart) {
  constexpr int64_t kTokens = 23;
  const auto cache = make_cache(ctx_, options("window", dtype(), kTokens));
  const Tensor q = random_tensor(dtype(), {9, kHeads, kDim}, 0);
  commit_frames(ctx_, *cache, dtype(), kTokens, 0, 9);
  const auto expect_frames = [&](const HistoryReading& reading, std::vector<int64_t> frames) {
    cache->set_reading(ctx_, reading);
    expect_close(attend_cache(ctx_, q, *cache),
                 values(attend_frames(ctx_, q, dtype(), kTokens, frames)), bound());
  };
  using Sink = HistoryReading::Sink;
  expect_frames({}, {0, 6, 7, 8});
  expect_frames({.sink = Sink::kHidden}, {6, 7, 8});
  expect_frames({.window_frames = 1}, {0, 8});
  expect_frames({.sink = Sink::kHidden, .window_frames = 2}, {7, 8});
  expect_frames({.sink = Sink::kBeforeWindow, .window_frames = 2}, {0, 7, 8});  // 0 pairs turn
  commit_frames(ctx_, *cache, dtype(), kTokens, 9, 10);  // a commit shows everything again
  expect_frames({}, {0, 7, 8, 9});
  cache->forget_window();
  expect_frames({}, {0});
  EXPECT_EQ(cache->entries(), kTokens);
}

// Moving the sink by some frames is RoPE with those frames' angles.
TEST_P(Cache, ASinkMovesToJustBeforeTheWindow) {
  constexpr int64_t kTokens = 5;
  constexpr int64_t kPairs = 6;
  constexpr double kTheta = 100;
  const auto cache = make_cache(ctx_, options("window", dtype(), kTokens));
  commit_frames(ctx_, *cache, dtype(), kTokens, 0, 9);
  const Tensor k = frame(dtype(), kTokens, 100);  // frame 0
  const Tensor v = frame(dtype(), kTokens, 101);
  const Tensor cos = Tensor::zeros({}, DType::kF32, {kTokens, kDim / 2});
  const Tensor sin = Tensor::zeros({}, DType::kF32, {kTokens, kDim / 2});
  for (const int64_t window : {3, 1, 3}) {
    const auto moved_by = static_cast<double>(9 - window - 1);
    for (int64_t i = 0; i < cos.numel(); ++i) {
      const int64_t pair = i % (kDim / 2);
      const double angle = pair < kPairs ? moved_by * std::pow(kTheta, -double(pair) / kPairs) : 0;
      cos.data<float>()[i] = static_cast<float>(std::cos(angle));
      sin.data<float>()[i] = static_cast<float>(std::sin(angle));
    }
    const Tensor turned({}, dtype(), k.shape());
    rope(ctx_, k, cos, sin, turned);
    const KvPages expected(ctx_, turned, v);
    cache->set_reading(ctx_, {.sink = HistoryReading::Sink::kBeforeWindow,
                              .window_frames = window,
                              .next_frame = 9,
                              .time_pairs = kPairs,
                              .time_theta = kTheta});
    const KvView view = cache->view();
    ASSERT_EQ(static_cast<int64_t>(view.heads[0].size()), 1 + window);
    for (int64_t head = 0; head < kHeads; ++head) {
      for (int64_t slot = 0; slot < kTokens; ++slot) {
        std::array<float, kDim> key, value, expected_key, expected_value;
        const auto at = static_cast<size_t>(head);
        read_token(view.heads[at][0], dtype(), kDim, slot, key.data(), value.data());
        read_token(expected.view().heads[at][0], dtype(), kDim, slot, expected_key.data(),
                   expected_value.data());
        EXPECT_EQ(value, expected_value);
        for (size_t d = 0; d < kDim; ++d) EXPECT_NEAR(key[d], expected_key[d], bound() * 4);
      }
    }
  }
}

TEST_P(Cache, SmallerChunkInWorkLeavesNothingBehind) {
  const auto cache = make_cache(ctx_, options("full", dtype(), 70));
  cache->set_current(ctx_, frame(dtype(), 70, 1), frame(dtype(), 70, 2));
  cache->set_current(ctx_, frame(dtype(), 40, 100), frame(dtype(), 40, 101));
  const Tensor q = random_tensor(dtype(), {9, kHeads, kDim}, 0);
  EXPECT_TRUE(
      test::same_bits(attend_cache(ctx_, q, *cache), attend_frames(ctx_, q, dtype(), 40, {0})));
}

TEST_P(Cache, SavedStateGoesOnAsIfNothingHappened) {
  for (const std::string memory : {"full", "window"}) {
    SCOPED_TRACE(memory);
    const auto cache = make_cache(ctx_, options(memory, dtype(), 50));
    commit_frames(ctx_, *cache, dtype(), 50, 0, 7);
    std::stringstream state;
    cache->save(state);
    const auto resumed = make_cache(ctx_, options(memory, dtype(), 50));
    commit_frames(ctx_, *resumed, dtype(), 50, 20, 22);  // to be replaced
    resumed->load(state);
    commit_frames(ctx_, *cache, dtype(), 50, 7, 10);
    commit_frames(ctx_, *resumed, dtype(), 50, 7, 10);
    EXPECT_EQ(resumed->entries(), cache->entries());
    const Tensor q = random_tensor(dtype(), {9, kHeads, kDim}, 0);
    EXPECT_TRUE(test::same_bits(attend_cache(ctx_, q, *cache), attend_cache(ctx_, q, *resumed)));
  }
}

// By head: the buckets of all keys in the cache, in list order.
std::vector<Bucket> buckets_of(const KvCache& cache, size_t head) {
  std::vector<Bucket> out;
  for (const KvPage& page : cache.view().heads[head])
    out.insert(out.end(), page.buckets, page.buckets + page.num_keys);
  return out;
}

TEST(Buckets, TravelWithTheirKeys) {
  Context ctx;
  constexpr int64_t kTokens = 50;
  for (const char* memory : {"full", "window"}) {
    const auto cache = make_cache(ctx, options(memory, DType::kF32, kTokens));
    std::vector<Bucket> expected;
    for (int64_t i = 0; i < 7; ++i) {
      std::vector<Bucket> buckets;
      for (int64_t t = 0; t < kTokens; ++t) buckets.push_back(static_cast<Bucket>(100 * i + t));
      if (i == 5) buckets.assign(kTokens, kNoBucket);
      cache->set_buckets(i == 5 ? std::span<const Bucket>() : buckets);
      commit_frames(ctx, *cache, DType::kF32, kTokens, i, i + 1);
      const bool kept = std::string(memory) == "full" || i == 0 || i > 3;
      if (kept) expected.insert(expected.end(), buckets.begin(), buckets.end());
    }
    std::stringstream state;
    cache->save(state);
    const auto resumed = make_cache(ctx, options(memory, DType::kF32, kTokens));
    resumed->load(state);
    for (size_t head = 0; head < kHeads; ++head) {
      EXPECT_EQ(buckets_of(*cache, head), expected) << memory;
      EXPECT_EQ(buckets_of(*resumed, head), expected) << memory;
    }
    const std::vector<Bucket> current(kTokens, 7);
    cache->set_buckets(current);
    cache->set_current(ctx, frame(DType::kF32, kTokens, 1), frame(DType::kF32, kTokens, 2));
    expected.insert(expected.end(), current.begin(), current.end());
    EXPECT_EQ(buckets_of(*cache, 0), expected) << memory;
  }
}

TEST(CacheState, BadStatesAreRefusedAndLeaveAnEmptyCache) {
  Context ctx({}, 1);
  const auto cache = make_cache(ctx, options("full", DType::kF32, 50));
  commit_frames(ctx, *cache, DType::kF32, 50, 0, 3);
  std::stringstream stream;
  cache->save(stream);
  const std::string good = stream.str();

  const auto refuses = [&](const std::string& bytes) {
    std::istringstream in(bytes);
    try {
      cache->load(in);
      return false;
    } catch (const Error& error) {
      return error.kind() == ErrorKind::kInput && cache->entries() == 0;
    }
  };
  for (const size_t length : {size_t{0}, size_t{7}, size_t{40}, size_t{80}, good.size() - 1})
    EXPECT_TRUE(refuses(good.substr(0, length))) << length;
  for (size_t field = 0; field < 6; ++field) {  // mark, policy, dtype, heads, head_dim, tokens
    std::string bad = good;
    bad[8 * field] = static_cast<char>(bad[8 * field] ^ 1);
    EXPECT_TRUE(refuses(bad)) << field;
  }
  for (const size_t field : {6, 7}) {  // a claimed 2^60 of policy values, of pages
    std::string bad = good;
    bad[8 * field + 7] = 0x10;
    EXPECT_TRUE(refuses(bad)) << field;
  }
  std::string bad = good;
  bad[8 * 8] = 65;  // keys in the first page
  EXPECT_TRUE(refuses(bad));
  std::istringstream in(good);
  cache->load(in);
  EXPECT_EQ(cache->entries(), 150);

  // More frames than a window holds.
  CacheOptions small = options("window", DType::kF32, 50);
  const auto window = make_cache(ctx, small);
  commit_frames(ctx, *window, DType::kF32, 50, 0, 4);
  std::stringstream large;
  window->save(large);
  small.window_frames = 1;
  EXPECT_THROW(make_cache(ctx, small)->load(large), Error);
}

TEST(CacheOptions, AreChecked) {
  Context ctx({}, 1);
  EXPECT_THROW(make_cache(ctx, options("forever", DType::kF32, 50)), Error);
  EXPECT_THROW(make_cache(ctx, options("full", DType::kF32, 0)), Error);
  const auto full = make_cache(ctx, options("full", DType::kF32, 50));
  EXPECT_NO_THROW(full->set_reading(ctx, {}));
  EXPECT_THROW(full->set_reading(ctx, {.sink = HistoryReading::Sink::kHidden}), Error);
  const auto cache = make_cache(ctx, options("window", DType::kF32, 50));
  const Tensor wrong = random_tensor(DType::kF32, {50, kHeads, kDim + 2}, 0);
  EXPECT_THROW(cache->commit(ctx, wrong, wrong, {0, 1}), Error);
  const Tensor half = frame(DType::kF32, 25, 0);
  EXPECT_THROW(cache->commit(ctx, half, half, {0, 1}), Error);
}

// After the first steps nothing is allocated: not by our kernels and caches at all, and by a linear
// layer only the few small objects that oneDNN makes for each call.
TEST(Steady, StepsDoNotAllocate) {
  Context ctx({}, 2);
  constexpr int64_t kTokens = 128;
  for (const std::string memory : {"window", "full"}) {
    SCOPED_TRACE(memory);
    CacheOptions chosen = options(memory, DType::kF32, kTokens);
    chosen.reserve_tokens = 40 * kTokens;
    const auto cache = make_cache(ctx, chosen);
    const Tensor x = random_tensor(DType::kF32, {kTokens, kHeads * kDim}, 0);
    const Tensor weight = random_tensor(DType::kF32, {kHeads * kDim}, 1);
    const Tensor angles = random_tensor(DType::kF32, {kTokens, kDim / 2}, 2);
    const Tensor q({}, DType::kF32, {kTokens, kHeads, kDim});
    const Tensor out({}, DType::kF32, q.shape());
    const auto step = [&](int64_t number) {
      rms_norm(ctx, x, weight, 1e-6F, q.view().reshape(x.shape()));
      rope(ctx, q, angles, angles, q);
      cache->set_current(ctx, q, x.view().reshape(q.shape()));
      attend(ctx, q, cache->view(), 0.2F, out);
      cache->commit(ctx, q, x.view().reshape(q.shape()), {number, 1});
    };
    for (int64_t i = 0; i < 8; ++i) step(i);
    const uint64_t buffers = num_buffer_allocations();
    const uint64_t news = num_news;
    const size_t growths = cache->num_growths();
    const size_t bytes = cache->bytes();
    for (int64_t i = 8; i < 36; ++i) step(i);
    EXPECT_EQ(num_buffer_allocations(), buffers);
    EXPECT_EQ(num_news, news);
    EXPECT_EQ(cache->num_growths(), growths);
    EXPECT_EQ(cache->bytes(), bytes);
  }

  const Tensor w = random_tensor(DType::kF32, {64, 64}, 0);
  const LinearWeight weight(ctx, w, {}, {}, DType::kF32);
  const Tensor y({}, DType::kF32, w.shape());
  const auto run = [&] { linear(ctx, w, weight, Activation::kNone, y); };
  run();
  const uint64_t buffers = num_buffer_allocations();
  const uint64_t news = num_news;
  constexpr uint64_t kCalls = 20;
  for (uint64_t i = 0; i < kCalls; ++i) run();
  EXPECT_EQ(num_buffer_allocations(), buffers);
  EXPECT_LE(num_news - news, kCalls * 16);
}

// What a model that went astray hands in is refused at the door, by every policy, and the history
// is what it was.
TEST(KvCache, RefusesNumbersThatAreNotFinite) {
  constexpr int64_t kTokens = 64;
  Context ctx({}, 1);

  struct Case {
    float value;
    int64_t token, head, channel;
    const char* error;
  };

  constexpr float kInf = std::numeric_limits<float>::infinity();
  const Case cases[] = {
      {std::nanf(""), 0, 0, 0, "of head 0: expected finite numbers, found nan"},
      {kInf, 17, 1, 5, "of head 1: expected finite numbers, found inf"},
      {-kInf, kTokens - 1, 1, kDim - 1, "of head 1: expected finite numbers, found -inf"}};
  for (const std::string memory : {"full", "window", "tempcache", "flowcache"}) {
    for (const DType dtype : {DType::kF32, DType::kBF16}) {
      CacheOptions chosen = options(memory, dtype, kTokens);
      chosen.budget_tokens = 4 * kTokens;
      chosen.layer = 5;
      const auto cache = make_cache(ctx, chosen);
      commit_frames(ctx, *cache, dtype, kTokens, 0, 7);
      std::stringstream before;
      cache->save(before);
      for (const Case& bad : cases) {
        for (const bool in_keys : {true, false}) {
          const Tensor good = random_tensor(dtype, {kTokens, kHeads, kDim}, 3);
          const Tensor broken = good.clone();
          const int64_t at = (bad.token * kHeads + bad.head) * kDim + bad.channel;
          if (dtype == DType::kF32)
            broken.data<float>()[at] = bad.value;
          else
            broken.data<bf16>()[at] = bf16(bad.value);
          try {
            cache->commit(ctx, in_keys ? broken : good, in_keys ? good : broken, {7, 1});
            ADD_FAILURE() << memory << ": no error";
          } catch (const Error& error) {
            EXPECT_EQ(error.what(), str("layer 5, ", in_keys ? "keys " : "values ", bad.error));
          }
        }
      }
      std::stringstream after;
      cache->save(after);
      EXPECT_EQ(after.str(), before.str()) << memory;
      commit_frames(ctx, *cache, dtype, kTokens, 7, 8);
    }
  }
}

// `full` grows by doubling, and only by that.
TEST(FullCache, GrowthIsRareAndCounted) {
  Context ctx({}, 1);
  const auto cache = make_cache(ctx, options("full", DType::kF32, 64));
  commit_frames(ctx, *cache, DType::kF32, 64, 0, 200);
  EXPECT_EQ(cache->entries(), 200 * 64);
  EXPECT_LE(cache->num_growths(), 6U);
  EXPECT_LE(cache->bytes(), 4 * cache->bytes_used());
  cache->reset();
  EXPECT_EQ(cache->entries(), 0);
  EXPECT_EQ(cache->bytes_used(), 0U);
  const size_t growths = cache->num_growths();
  commit_frames(ctx, *cache, DType::kF32, 64, 0, 200);
  EXPECT_EQ(cache->num_growths(), growths);
}

}  // namespace
}  // namespace longtake
