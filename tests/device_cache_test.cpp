// The caches of CUDA devices against the CPU's: the same chunks go into both, and both must show
// the same keys, values and weights.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "core_support.h"
#include "device/cuda_runtime.h"
#include "device/graph.h"
#include "gpu_support.h"
#include "kv/cache.h"
#include "kv/device_pages.h"
#include "kv/device_weight.h"
#include "kv/time_rotation.h"

namespace longtake::cuda {
namespace {

// One key of a head as a page shows it.
struct Shown {
  std::vector<float> key, value;  // value: times its weight
  float weight = 1;

  bool operator<(const Shown& other) const { return key < other.key; }
};

using Head = std::vector<Shown>;

std::vector<std::byte> downloaded(const void* from, size_t bytes) {
  std::vector<std::byte> out(bytes);
  check(cudaMemcpy(out.data(), from, bytes, cudaMemcpyDeviceToHost), "download");
  return out;
}

template <typename T>
std::vector<T> downloaded(const T* from, size_t count) {
  std::vector<T> out(count);
  check(cudaMemcpy(out.data(), from, count * sizeof(T), cudaMemcpyDeviceToHost), "download");
  return out;
}

// Used slots of a device's page; what unused ones hold is checked.
void read_page(const DevicePages& pages, int page, Head& out) {
  const size_t bytes = paged_bytes(pages.head_dim, pages.format);
  const auto raw = downloaded(
      static_cast<const std::byte*>(pages.store) + static_cast<size_t>(page) * bytes, bytes);
  const int dim = pages.head_dim;
  const bool wide = pages.format == PageFormat::kF32;
  const size_t matrix = static_cast<size_t>(kPageKeys * dim) * (wide ? 4 : 2);
  const auto number = [&](size_t base, int row, int channel) {
    if (wide) return reinterpret_cast<const float*>(raw.data() + base)[row * dim + channel];
    const int chunk = channel / 8;
    const int offset =
        chunk / 8 * (kPageKeys * 128) + row * 128 + ((chunk % 8 ^ row % 8) * 16) + channel % 8 * 2;
    bf16 x;
    std::memcpy(&x, raw.data() + base + static_cast<size_t>(offset), 2);
    return static_cast<float>(x);
  };
  const auto* weights = reinterpret_cast<const float*>(raw.data() + 2 * matrix);
  Head used, unused;
  for (int row = 0; row < kPageKeys; ++row) {
    Shown shown;
    for (int d = 0; d < dim; ++d) {
      shown.key.push_back(number(0, row, d));
      shown.value.push_back(number(matrix, row, d));
    }
    shown.weight = weights[row];
    (shown.weight > 0 ? used : unused).push_back(shown);
  }
  ASSERT_FALSE(used.empty());
  for (const Shown& one : unused) {
    EXPECT_EQ(one.weight, 0);
    EXPECT_TRUE(std::all_of(one.value.begin(), one.value.end(), [](float x) { return x == 0; }));
    const auto same = [&](const Shown& other) { return other.key == one.key; };
    EXPECT_TRUE(std::any_of(used.begin(), used.end(), same)) << "an unused slot holds a stray key";
  }
  out.insert(out.end(), used.begin(), used.end());
}

std::vector<Head> device_heads(Context& ctx, const KvView& view) {
  ctx.synchronize();
  const DevicePages& pages = *view.device;
  const auto heads = static_cast<size_t>(pages.heads.num_heads);
  const std::vector<int32_t> begin = downloaded(pages.heads.begin, heads + 1);
  const std::vector<int32_t> list =
      downloaded(pages.heads.pages, static_cast<size_t>(begin.back()));
  std::vector<Head> out(heads);
  for (size_t head = 0; head < heads; ++head) {
    EXPECT_LE(begin[head + 1] - begin[head], pages.max_pages_per_head);
    for (int32_t i = begin[head]; i < begin[head + 1]; ++i)
      read_page(pages, list[static_cast<size_t>(i)], out[head]);
  }
  return out;
}

std::vector<Head> host_heads(const KvView& view) {
  std::vector<Head> out;
  const auto dim = static_cast<size_t>(view.head_dim);
  for (const PageList& list : view.heads) {
    Head head;
    for (const KvPage& page : list) {
      for (int64_t slot = 0; slot < page.num_keys; ++slot) {
        Shown shown{std::vector<float>(dim), std::vector<float>(dim), 1};
        read_token(page, view.dtype, view.head_dim, slot, shown.key.data(), shown.value.data());
        shown.weight = std::exp(page.bias[slot]);
        for (float& x : shown.value) x *= shown.weight;
        head.push_back(shown);
      }
    }
    out.push_back(head);
  }
  return out;
}

// Equal as sets of keys: the order of pages is the device's own.
void expect_same(std::vector<Head> found, std::vector<Head> expected, float slack = 0) {
  ASSERT_EQ(found.size(), expected.size());
  for (size_t head = 0; head < found.size(); ++head) {
    ASSERT_EQ(found[head].size(), expected[head].size()) << "head " << head;
    std::sort(found[head].begin(), found[head].end());
    std::sort(expected[head].begin(), expected[head].end());
    for (size_t i = 0; i < found[head].size(); ++i) {
      const Shown& a = found[head][i];
      const Shown& b = expected[head][i];
      for (size_t d = 0; d < a.key.size(); ++d) {
        ASSERT_NEAR(a.key[d], b.key[d], slack) << "head " << head << ", key " << i;
        ASSERT_NEAR(a.value[d], b.value[d], slack) << "head " << head << ", value " << i;
      }
      ASSERT_NEAR(a.weight, b.weight, slack) << "head " << head << ", key " << i;
    }
  }
}

// A cache on each side, and the way chunks take into both.
class Pair {
 public:
  explicit Pair(CacheOptions options) : clock_(gpu_.device(), DType::kI64, {1}), options_(options) {
    host_ = make_cache(cpu_, options);
    options.clock = clock_;
    device_ = make_cache(gpu_, options);
  }

  // One chunk: what is in work is looked at, then it joins the history.
  void chunk(View k, View v, int64_t first_frame) {
    set_clock(first_frame);
    device_->prepare_chunk(gpu_);
    const Tensor dk = copied(k), dv = copied(v);
    const ChunkPosition position{first_frame, k.dim(0) / options_.tokens_per_frame};
    host_->commit(cpu_, k, v, position);
    device_->commit(gpu_, dk, dv, position);
    gpu_.synchronize();
  }

  void current(View k, View v) {
    host_->set_current(cpu_, k, v);
    device_->set_current(gpu_, copied(k), copied(v));
    gpu_.synchronize();
  }

  void expect_equal(float slack = 0) {
    expect_same(device_heads(gpu_, device_->view()), host_heads(host_->view()), slack);
  }

  void expect_equal_counts() {
    gpu_.synchronize();
    EXPECT_EQ(device_->entries(), host_->entries());
    EXPECT_EQ(device_->total_entries(), host_->total_entries());
  }

  void set_clock(int64_t frame) {
    copy_bytes_now(&frame, clock_.view().raw(), sizeof frame, Direction::kToDevice);
  }

  Tensor copied(View x) const {
    Tensor out(gpu_.device(), x.dtype(), x.shape());
    copy_bytes_now(x.raw(), out.view().raw(), x.bytes(), Direction::kToDevice);
    return out;
  }

  Context cpu_{Device{}, 1};
  Context gpu_{Device{DeviceKind::kCuda, 0}};
  Tensor clock_;
  CacheOptions options_;
  std::unique_ptr<KvCache> host_, device_;
};

CacheOptions options_of(const std::string& memory, DType dtype, int64_t heads, int64_t dim,
                        int64_t tokens, int64_t chunk_frames = 1) {
  CacheOptions options;
  options.memory = memory;
  options.dtype = dtype;
  options.num_heads = heads;
  options.head_dim = dim;
  options.tokens_per_frame = tokens;
  options.chunk_frames = chunk_frames;
  return options;
}

Tensor chunk_of(const CacheOptions& options, uint32_t stream) {
  return random_tensor(
      options.dtype,
      {options.chunk_frames * options.tokens_per_frame, options.num_heads, options.head_dim},
      stream);
}

TEST(DeviceWeight, SurvivesItsBias) {
  EXPECT_EQ(weight_of(0), 1);
  EXPECT_EQ(bias_of(1), 0);
  EXPECT_EQ(weight_of(bias_of(0)), 0);
  std::vector<float> x(100000);
  fill_normal(3, 0, 0, x.data(), static_cast<int64_t>(x.size()));
  for (size_t i = 0; i < x.size(); ++i) {
    const float bias = std::clamp((i % 2 == 0 ? 1.0F : 30.0F) * x[i], -86.0F, 88.0F);
    const float weight = weight_of(bias);
    ASSERT_NEAR(weight / std::exp(double{bias}), 1, 2e-7) << bias;
    ASSERT_EQ(weight_of(bias_of(weight)), weight) << bias;
  }
}

class DeviceCacheTest : public ::testing::Test {
 protected:
  void SetUp() override { skip_without_gpu(); }
};

TEST_F(DeviceCacheTest, FullShowsWhatTheCpuShows) {
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    for (const int64_t tokens : {1, 127, 128, 129, 300}) {
      SCOPED_TRACE(str(name_of(dtype), ", ", tokens, " tokens"));
      Pair pair(options_of("full", dtype, 3, 64, tokens));
      for (uint32_t frame = 0; frame < 5; ++frame) {
        const Tensor k = chunk_of(pair.options_, 10 * frame),
                     v = chunk_of(pair.options_, 10 * frame + 1);
        pair.current(v, k);
        pair.expect_equal();
        pair.chunk(k, v, frame);
        pair.expect_equal();
        pair.expect_equal_counts();
      }
      EXPECT_EQ(pair.device_->num_growths() > 0, tokens > 1);
      pair.host_->reset();
      pair.device_->reset();
      pair.expect_equal();
      pair.expect_equal_counts();
      const Tensor k = chunk_of(pair.options_, 7);
      pair.chunk(k, k, 9);
      pair.expect_equal();
    }
  }
}

TEST_F(DeviceCacheTest, WindowShowsWhatTheCpuShows) {
  for (const int64_t chunk : {1, 3}) {
    for (const int64_t tokens : {40, 128, 150, 170, 200}) {
      SCOPED_TRACE(str(chunk, " frames of ", tokens, " tokens"));
      CacheOptions options = options_of("window", DType::kBF16, 2, 128, tokens, chunk);
      options.sink_frames = 2;
      options.window_frames = tokens == 150 ? 7 : 4;
      options.reads_whole = tokens != 200;  // of 150 and 170 tokens 5 and 3 frames share a page
      Pair pair(options);
      for (uint32_t i = 0; i < 8; ++i) {
        const Tensor k = chunk_of(options, 10 * i), v = chunk_of(options, 10 * i + 1);
        pair.current(v, k);
        pair.expect_equal();
        pair.chunk(k, v, i * chunk);
        pair.expect_equal();
        pair.expect_equal_counts();
        if (i != 3) continue;
        pair.host_->forget_window();
        pair.device_->forget_window();
        pair.expect_equal();
        pair.expect_equal_counts();
      }
    }
  }
}

TEST_F(DeviceCacheTest, WindowReadsWhatItIsTold) {
  using Sink = HistoryReading::Sink;
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    CacheOptions options = options_of("window", dtype, 2, 64, 48, 2);
    options.sink_frames = 2;
    options.window_frames = 5;
    Pair pair(options);
    for (uint32_t i = 0; i < 6; ++i) {
      const int64_t next = 3 + 2 * i;
      const Tensor k = chunk_of(options, 10 * i), v = chunk_of(options, 10 * i + 1);
      for (const Sink sink : {Sink::kInPlace, Sink::kHidden, Sink::kBeforeWindow}) {
        for (const int64_t window : {int64_t{2}, std::numeric_limits<int64_t>::max()}) {
          SCOPED_TRACE(str("chunk ", i, ", sink ", static_cast<int>(sink), ", window ", window));
          const HistoryReading reading{sink, window, next, 9, 10000};
          pair.set_clock(next);
          pair.host_->set_reading(pair.cpu_, reading);
          pair.device_->set_reading(pair.gpu_, reading);
          pair.current(v, k);
          // Rotations are rounded alike but for the last bit of a sine.
          pair.expect_equal(sink == Sink::kBeforeWindow ? dtype == DType::kF32 ? 1e-5F : 0.03F : 0);
        }
      }
      pair.chunk(k, v, next);
      pair.expect_equal();
    }
  }
}

TEST_F(DeviceCacheTest, ReplaysEqualEagerRuns) {
  for (const std::string memory : {"full", "window"}) {
    SCOPED_TRACE(memory);
    CacheOptions options = options_of(memory, DType::kBF16, 3, 64, 100);
    options.window_frames = 3;
    options.reserve_tokens = 100 * 20;
    Pair pair(options);
    const Shape shape{options.tokens_per_frame, options.num_heads, options.head_dim};
    const Tensor k(pair.gpu_.device(), options.dtype, shape);
    const Tensor v(pair.gpu_.device(), options.dtype, shape);
    Graph graph;
    for (uint32_t i = 0; i < 9; ++i) {
      const Tensor hk = chunk_of(options, 10 * i), hv = chunk_of(options, 10 * i + 1);
      copy_bytes_now(hk.view().raw(), k.view().raw(), hk.bytes(), Direction::kToDevice);
      copy_bytes_now(hv.view().raw(), v.view().raw(), hv.bytes(), Direction::kToDevice);
      pair.set_clock(i);
      EXPECT_FALSE(pair.device_->prepare_chunk(pair.gpu_));
      graph.run(pair.gpu_, [&] {
        pair.device_->set_current(pair.gpu_, k, v);
        static_cast<void>(pair.device_->view());
        pair.device_->commit(pair.gpu_, k, v, {i, 1});
      });
      pair.host_->commit(pair.cpu_, hk, hv, {i, 1});
      pair.expect_equal();
      pair.expect_equal_counts();
    }
    EXPECT_TRUE(graph.is_recorded());
  }
}

// Things that a head sees again and again, each time a little different: frame f shows things
// [f * step, f * step + tokens) of a circle.
class Things {
 public:
  Things(const CacheOptions& options, int64_t count, int64_t step, float noise)
      : options_(options), count_(count), step_(step), noise_(noise) {
    keys_.resize(static_cast<size_t>(count * options.num_heads * options.head_dim));
    values_.resize(keys_.size());
    fill_normal(7, 0, 0, keys_.data(), static_cast<int64_t>(keys_.size()));
    fill_normal(7, 1, 0, values_.data(), static_cast<int64_t>(values_.size()));
  }

  Tensor keys(int64_t first_frame, int64_t frames) const {
    return shown(keys_, first_frame, frames, 2, true);
  }

  Tensor values(int64_t first_frame, int64_t frames) const {
    return shown(values_, first_frame, frames, 3, false);
  }

 private:
  Tensor shown(const std::vector<float>& things, int64_t first_frame, int64_t frames,
               uint32_t stream, bool turns) const {
    const int64_t tokens = options_.tokens_per_frame, dim = options_.head_dim;
    const int64_t row = options_.num_heads * dim;
    Tensor wide({}, DType::kF32, {frames * tokens, options_.num_heads, dim});
    fill_normal(8, stream, static_cast<uint32_t>(first_frame), wide.data<float>(), wide.numel());
    for (int64_t t = 0; t < frames * tokens; ++t) {
      const int64_t frame = first_frame + t / tokens;
      const int64_t thing = (frame * step_ + t % tokens) % count_;
      const TimeRotation rotation(options_.tempcache.time_pairs, options_.tempcache.time_theta,
                                  frame);
      float* to = wide.data<float>() + t * row;
      for (int64_t i = 0; i < row; ++i)
        to[i] = noise_ * to[i] + things[static_cast<size_t>(thing * row + i)];
      for (int64_t head = 0; head < options_.num_heads && turns; ++head)
        rotation.apply(to + head * dim);
    }
    if (options_.dtype == DType::kF32) return wide;
    Tensor out({}, DType::kBF16, wide.shape());
    for (int64_t i = 0; i < wide.numel(); ++i) out.data<bf16>()[i] = bf16(wide.data<float>()[i]);
    return out;
  }

  CacheOptions options_;
  int64_t count_, step_;
  float noise_;
  std::vector<float> keys_, values_;
};

// softmax over what a head shows, for one query; values come with their weights.
std::vector<double> attended(const Head& head, const float* q) {
  const size_t dim = head.front().key.size();
  std::vector<double> logits, out(dim, 0.0);
  double most = -INFINITY, total = 0;
  for (const Shown& one : head) {
    double logit = 0;
    for (size_t d = 0; d < dim; ++d) logit += double{q[d]} * double{one.key[d]};
    logits.push_back(logit / std::sqrt(static_cast<double>(dim)));
    most = std::max(most, logits.back());
  }
  for (size_t i = 0; i < head.size(); ++i) {
    const double mass = std::exp(logits[i] - most);
    total += mass * double{head[i].weight};
    for (size_t d = 0; d < dim; ++d) out[d] += mass * double{head[i].value[d]};
  }
  for (double& x : out) x /= total;
  return out;
}

struct Merging {
  std::string name;
  CacheOptions options;
  double bound = 1e-4;  // of attention outputs, relative
  int64_t things = 5;   // that there are to see, times the tokens of a frame
};

CacheOptions merging(DType dtype, int64_t heads, int64_t dim, int64_t tokens, int64_t chunk = 1) {
  CacheOptions options = options_of("tempcache", dtype, heads, dim, tokens, chunk);
  options.tempcache.exact_frames = 2;
  options.tempcache.time_pairs = 8;
  options.tempcache.merge_threshold = 0.8;
  return options;
}

std::vector<Merging> all_mergings() {
  std::vector<Merging> all;
  const auto add = [&](const std::string& name, const CacheOptions& base, const auto& change,
                       double bound) {
    CacheOptions options = base;
    change(options);
    all.push_back({name, options, bound});
  };
  const CacheOptions plain = merging(DType::kF32, 3, 64, 128);
  add(
      "lsh", plain, [](CacheOptions&) {}, 1e-4);
  add(
      "quant", plain, [](CacheOptions& o) { o.tempcache.ann = AnnEngine::kQuant; }, 1e-4);
  add(
      "quant, wide heads, bf16", merging(DType::kBF16, 2, 128, 100),
      [](CacheOptions& o) { o.tempcache.ann = AnnEngine::kQuant; }, 1e-2);
  add(
      "lsh, chunks of 3, bf16", merging(DType::kBF16, 2, 128, 150, 3), [](CacheOptions&) {}, 1e-2);
  add(
      "no exact frames, no sink", plain,
      [](CacheOptions& o) { o.tempcache.exact_frames = o.sink_frames = 0; }, 1e-4);
  add(
      "paper", plain,
      [](CacheOptions& o) {
        o.tempcache.rule = MergeRule::kPaper;
        o.tempcache.merge_threshold = 0.9;
      },
      1e-4);
  add(
      "newest key, log m", plain,
      [](CacheOptions& o) {
        o.tempcache.key = GroupKey::kNewest;
        o.tempcache.bias = GroupBias::kLogCount;
      },
      1e-4);
  add(
      "no bias", plain, [](CacheOptions& o) { o.tempcache.bias = GroupBias::kNone; }, 1e-4);
  add(
      "max error", plain, [](CacheOptions& o) { o.tempcache.max_error = 3; }, 1e-4);
  add(
      "nothing merges", plain, [](CacheOptions& o) { o.tempcache.merge_threshold = 0; }, 1e-6);
  add(
      "budget", plain, [](CacheOptions& o) { o.tempcache.budget_tokens = 700; }, 1e-4);
  add(
      "shared budget", plain,
      [](CacheOptions& o) {
        o.tempcache.budget_tokens = 700;
        o.tempcache.shares = BudgetShares::kNeed;
      },
      1e-4);
  // So many keys that warps have queries of their own, so many groups that shared memory does not
  // hold them.
  const CacheOptions many = merging(DType::kF32, 2, 64, 600);
  for (const AnnEngine engine : {AnnEngine::kLsh, AnnEngine::kQuant}) {
    for (const int64_t budget : {0, 6200}) {
      CacheOptions options = many;
      options.tempcache.ann = engine;
      options.tempcache.budget_tokens = budget;
      all.push_back(
          {str("many keys, ", engine == AnnEngine::kLsh ? "lsh" : "quant", ", budget ", budget),
           options, 1e-4, 10});
    }
  }
  add(
      "many keys, quant, wide heads, bf16, chunks of 2", merging(DType::kBF16, 1, 128, 520, 2),
      [](CacheOptions& o) { o.tempcache.ann = AnnEngine::kQuant; }, 1e-2);
  return all;
}

class MergingTest : public DeviceCacheTest, public ::testing::WithParamInterface<size_t> {};

TEST_P(MergingTest, IsThatOfTheCpu) {
  const Merging merging = all_mergings()[GetParam()];
  SCOPED_TRACE(merging.name);
  const CacheOptions& options = merging.options;
  const int64_t frames = options.chunk_frames;
  Pair pair(options);
  const Things things(options, merging.things * options.tokens_per_frame,
                      options.tokens_per_frame / 3, 0.1F);
  bool has_merged = false;
  for (int64_t i = 0; i < 30 / frames; ++i) {
    const int64_t frame = i * frames;
    const Shape shape{frames * options.tokens_per_frame, options.num_heads, options.head_dim};
    const auto seed = static_cast<uint32_t>(100 + 10 * i);
    const Tensor reads = random_tensor(options.dtype, shape, seed);
    const Tensor asks = random_tensor(options.dtype, shape, seed + 1);
    pair.set_clock(frame);
    for (int pass = 0; pass < 2; ++pass) {
      pair.host_->observe_reads(pair.cpu_, reads);
      pair.device_->observe_reads(pair.gpu_, pair.copied(reads));
      pair.gpu_.synchronize();
    }
    if (pair.host_->wants_queries()) {
      pair.host_->observe_queries(pair.cpu_, asks, {frame, frames});
      pair.device_->observe_queries(pair.gpu_, pair.copied(asks), {frame, frames});
      pair.gpu_.synchronize();
    }
    pair.chunk(things.keys(frame, frames), things.values(frame, frames), frame);
    const std::vector<Head> found = device_heads(pair.gpu_, pair.device_->view());
    const std::vector<Head> expected = host_heads(pair.host_->view());
    ASSERT_EQ(found.size(), expected.size());
    for (size_t head = 0; head < found.size(); ++head) {
      ASSERT_EQ(found[head].size(), expected[head].size())
          << "frame " << frame << ", head " << head;
      double error = 0, norm = 0;
      for (int64_t query = 0; query < 4; ++query) {
        std::vector<float> q(static_cast<size_t>(options.head_dim));
        fill_normal(5, static_cast<uint32_t>(query), static_cast<uint32_t>(head), q.data(),
                    options.head_dim);
        const auto a = attended(found[head], q.data()), b = attended(expected[head], q.data());
        for (size_t d = 0; d < a.size(); ++d) {
          error += (a[d] - b[d]) * (a[d] - b[d]);
          norm += b[d] * b[d];
        }
      }
      ASSERT_LE(std::sqrt(error / norm), merging.bound) << "frame " << frame << ", head " << head;
    }
    pair.expect_equal_counts();
    EXPECT_EQ(pair.device_->merge_counts().merged, pair.host_->merge_counts().merged);
    EXPECT_EQ(pair.device_->merge_counts().evicted, pair.host_->merge_counts().evicted);
    has_merged |= pair.device_->merge_counts().merged > 0;
    if (options.tempcache.budget_tokens > 0) {
      EXPECT_LE(pair.device_->total_entries(), options.num_heads * options.tempcache.budget_tokens);
    }
  }
  EXPECT_EQ(has_merged, options.tempcache.merge_threshold > 0);
}

INSTANTIATE_TEST_SUITE_P(All, MergingTest, ::testing::Range(size_t{0}, all_mergings().size()));

TEST_F(DeviceCacheTest, ReplayedMergesEqualEagerOnes) {
  CacheOptions options = merging(DType::kBF16, 3, 64, 128);
  options.tempcache.budget_tokens = 900;
  Pair eager(options), replayed(options);
  const Things things(options, 600, 40, 0.1F);
  const Shape shape{options.tokens_per_frame, options.num_heads, options.head_dim};
  const Tensor k(eager.gpu_.device(), options.dtype, shape);
  const Tensor v(eager.gpu_.device(), options.dtype, shape);
  Graph graph;
  for (int64_t i = 0; i < 24; ++i) {
    const Tensor hk = things.keys(i, 1), hv = things.values(i, 1);
    copy_bytes_now(hk.view().raw(), k.view().raw(), hk.bytes(), Direction::kToDevice);
    copy_bytes_now(hv.view().raw(), v.view().raw(), hv.bytes(), Direction::kToDevice);
    const auto steps = [&](Pair& pair) {
      pair.device_->set_current(pair.gpu_, k, v);
      static_cast<void>(pair.device_->view());
      pair.device_->observe_reads(pair.gpu_, k);
      pair.device_->observe_queries(pair.gpu_, k, {i, 1});
      pair.device_->commit(pair.gpu_, k, v, {i, 1});
    };
    eager.set_clock(i);
    replayed.set_clock(i);
    steps(eager);
    graph.run(replayed.gpu_, [&] { steps(replayed); });
    expect_same(device_heads(replayed.gpu_, replayed.device_->view()),
                device_heads(eager.gpu_, eager.device_->view()));
    EXPECT_EQ(replayed.device_->total_entries(), eager.device_->total_entries());
  }
  EXPECT_TRUE(graph.is_recorded());
}

// Commits of several layers that wait for each other are those that do not wait, in an eager run
// and in a record; so are queries that come with the keys.
TEST_F(DeviceCacheTest, CommitsTogetherEqualCommitsApart) {
  std::vector<CacheOptions> all = {merging(DType::kBF16, 3, 64, 128),
                                   merging(DType::kF32, 2, 128, 70),
                                   merging(DType::kBF16, 2, 64, 530),
                                   merging(DType::kBF16, 2, 64, 90),
                                   options_of("full", DType::kBF16, 2, 64, 100),
                                   options_of("window", DType::kBF16, 2, 64, 100)};
  all[0].tempcache.budget_tokens = 900;
  all[0].page_summaries = true;
  all[1].tempcache.ann = AnnEngine::kQuant;
  all[3].tempcache.budget_tokens = 500;
  all[3].tempcache.shares = BudgetShares::kNeed;
  all[4].reserve_tokens = 100 * 24;
  all[5].window_frames = 3;
  constexpr size_t kLayers = 3;
  for (const CacheOptions& options : all) {
    SCOPED_TRACE(str(options.memory, ", ", options.tokens_per_frame, " tokens"));
    Context gpu(Device{DeviceKind::kCuda, 0});
    const Tensor clock(gpu.device(), DType::kI64, {1});
    CacheOptions alone = options;
    alone.clock = clock;
    CacheOptions together = alone;
    together.batch = make_commit_batch(gpu);
    std::vector<std::unique_ptr<KvCache>> apart, layers;
    for (size_t n = 0; n < kLayers; ++n) {
      apart.push_back(make_cache(gpu, alone));
      layers.push_back(make_cache(gpu, together));
    }
    const Things things(options, 600, 40, 0.1F);
    const Shape shape{options.tokens_per_frame, options.num_heads, options.head_dim};
    std::vector<Tensor> k, v;
    for (size_t n = 0; n < kLayers; ++n) {
      k.emplace_back(gpu.device(), options.dtype, shape);
      v.emplace_back(gpu.device(), options.dtype, shape);
    }
    Graph graph;
    for (int64_t i = 0; i < 20; ++i) {
      copy_bytes_now(&i, clock.view().raw(), sizeof i, Direction::kToDevice);
      bool moved = false;
      for (size_t n = 0; n < kLayers; ++n) {
        // Layers see other parts of the same.
        const auto frame = i + 5 * static_cast<int64_t>(n);
        const Tensor hk = things.keys(frame, 1), hv = things.values(frame, 1);
        copy_bytes_now(hk.view().raw(), k[n].view().raw(), hk.bytes(), Direction::kToDevice);
        copy_bytes_now(hv.view().raw(), v[n].view().raw(), hv.bytes(), Direction::kToDevice);
        apart[n]->prepare_chunk(gpu);
        moved |= layers[n]->prepare_chunk(gpu);
      }
      if (moved) graph.reset();
      for (size_t n = 0; n < kLayers; ++n) {
        apart[n]->observe_reads(gpu, v[n]);
        apart[n]->set_current(gpu, k[n], v[n]);
        if (apart[n]->wants_queries()) apart[n]->observe_queries(gpu, k[n], {i, 1});
        apart[n]->commit(gpu, k[n], v[n], {i, 1});
      }
      graph.run(gpu, [&] {
        for (size_t n = 0; n < kLayers; ++n) {
          layers[n]->read_chunk(gpu, v[n], k[n], v[n]);
          layers[n]->commit_chunk(gpu, k[n], k[n], v[n], {i, 1});
        }
        for (const auto& layer : layers) layer->join_commits();
      });
      gpu.synchronize();
      for (size_t n = 0; n < kLayers; ++n) {
        SCOPED_TRACE(str("frame ", i, ", layer ", n));
        expect_same(device_heads(gpu, layers[n]->view()), device_heads(gpu, apart[n]->view()));
        EXPECT_EQ(layers[n]->total_entries(), apart[n]->total_entries());
        EXPECT_EQ(layers[n]->merge_counts().merged, apart[n]->merge_counts().merged);
      }
    }
    EXPECT_TRUE(graph.is_recorded());
  }
}

// A state saved on one device goes on on the other as if nothing had happened.
TEST_F(DeviceCacheTest, SavedStatesChangeDevices) {
  std::vector<CacheOptions> all = {
      options_of("full", DType::kF32, 2, 64, 100), options_of("window", DType::kBF16, 2, 64, 100),
      merging(DType::kF32, 2, 64, 128), merging(DType::kBF16, 2, 128, 100),
      options_of("window", DType::kF32, 2, 64, 140)};
  all[1].window_frames = 3;
  all[3].tempcache.ann = AnnEngine::kQuant;
  all[4].window_frames = 5;
  all[4].reads_whole = true;
  for (const CacheOptions& options : all) {
    SCOPED_TRACE(options.memory);
    Pair pair(options);
    const Things things(options, 500, 40, 0.1F);
    const auto step = [&](int64_t i) {
      const Tensor k = things.keys(i, 1);
      pair.set_clock(i);
      const Tensor dk = pair.copied(k);
      const auto observe = [&](KvCache& cache, Context& ctx, View q) {
        cache.observe_reads(ctx, q);
        if (cache.wants_queries()) cache.observe_queries(ctx, q, {i, 1});
        ctx.synchronize();
      };
      observe(*pair.host_, pair.cpu_, k);
      observe(*pair.device_, pair.gpu_, dk);
      pair.chunk(k, things.values(i, 1), i);
    };
    for (int64_t i = 0; i < 12; ++i) step(i);
    std::stringstream from_host, from_device;
    pair.host_->save(from_host);
    pair.device_->save(from_device);
    // What a device has saved itself comes back bit for bit.
    const std::vector<Head> before = device_heads(pair.gpu_, pair.device_->view());
    std::stringstream own(from_device.str());
    pair.device_->load(own);
    expect_same(device_heads(pair.gpu_, pair.device_->view()), before);
    pair.host_->reset();
    pair.device_->reset();
    pair.host_->load(from_device);
    pair.device_->load(from_host);
    const float slack = options.dtype == DType::kF32 ? 1e-4F : 0.1F;
    for (int64_t i = 12; i < 20; ++i) {
      if (options.memory == "tempcache")
        pair.expect_equal_counts();
      else
        pair.expect_equal(slack);
      step(i);
    }
    pair.expect_equal_counts();
    std::stringstream cut(from_host.str().substr(0, from_host.str().size() / 2));
    EXPECT_THROW(pair.device_->load(cut), Error);
    EXPECT_EQ(pair.device_->total_entries(), 0);
  }
}

TEST_F(DeviceCacheTest, NumbersThatAreNotFiniteAreNamed) {
  CacheOptions options = options_of("window", DType::kBF16, 3, 64, 20);
  options.layer = 7;
  Pair pair(options);
  Tensor k = chunk_of(options, 0), v = chunk_of(options, 1);
  pair.chunk(k, v, 0);
  EXPECT_NO_THROW(pair.device_->expect_finite());
  v.data<bf16>()[(5 * 3 + 2) * 64 + 3] = bf16(-INFINITY);
  std::string said, expected;
  try {
    pair.host_->commit(pair.cpu_, k, v, {1, 1});
  } catch (const Error& error) {
    expected = error.what();
  }
  try {
    pair.device_->prepare_chunk(pair.gpu_);
    pair.device_->commit(pair.gpu_, pair.copied(k), pair.copied(v), {1, 1});
    pair.gpu_.synchronize();
    pair.device_->expect_finite();
  } catch (const Error& error) {
    said = error.what();
  }
  EXPECT_NE(expected, "");
  EXPECT_EQ(said, expected);
}

TEST_F(DeviceCacheTest, WhatTheGpuDoesNotDoIsSaidInOneLine) {
  Context gpu(Device{DeviceKind::kCuda, 0});
  const Tensor clock(gpu.device(), DType::kI64, {1});
  CacheOptions options = options_of("flowcache", DType::kBF16, 2, 64, 16);
  options.clock = clock;
  options.budget_tokens = 1024;
  EXPECT_THROW(make_cache(gpu, options), Error);
}

}  // namespace
}  // namespace longtake::cuda
