// The subjects linear, attention, merge and index: kernels on random numbers, at the sizes of the
// embedded world and of Wan 1.3B at 480x832.
#include <algorithm>
#include <cmath>
#include <unordered_set>

#include "ann/index.h"
#include "attention/attend.h"
#include "base/error.h"
#include "base/philox.h"
#include "bench.h"
#include "device/stage_clock.h"
#include "kv/cache.h"
#include "metrics/image.h"
#include "ops/clock.h"
#include "ops/linear.h"
#include "setup.h"

namespace longtake::cli {
namespace {

// Values on the CPU, whatever the dtype and device.
std::vector<double> values_of(const Tensor& tensor) {
  const Tensor host = tensor.to(Device{});
  std::vector<double> out(static_cast<size_t>(host.numel()));
  for (size_t i = 0; i < out.size(); ++i)
    out[i] = host.dtype() == DType::kF32
                 ? static_cast<double>(host.data<float>()[i])
                 : static_cast<double>(static_cast<float>(host.data<bf16>()[i]));
  return out;
}

DType dtype_of_flags(Bench& bench) {
  return choose_dtype(bench.flags().dtype, bench.ctx().device());
}

// Errors of one product in f32 sums and one rounding of the result.
double bound_of(DType dtype) {
  return dtype == DType::kF32 ? 1e-5 : 1e-2;
}

bool on_cpu(Bench& bench) {
  return bench.ctx().device().kind == DeviceKind::kCpu;
}

void time_linear(Bench& bench, DType dtype, int64_t rows, int64_t in, int64_t out) {
  Context& ctx = bench.ctx();
  const Tensor x = bench.random(dtype, {rows, in}, 1);
  const Tensor w = bench.random(dtype, {out, in}, 2).to(Device{});
  const LinearWeight weight(ctx, w, View(), View(), dtype);
  const Tensor y(ctx.device(), dtype, {rows, out});
  linear(ctx, x, weight, Activation::kNone, y);
  ctx.synchronize();
  // The last row, and every 97th column of it.
  const auto xs = values_of(x), ws = values_of(w), ys = values_of(y);
  std::vector<double> found, expected;
  for (int64_t o = out - 1; o >= 0; o -= 97) {
    double sum = 0;
    for (int64_t i = 0; i < in; ++i)
      sum += xs[static_cast<size_t>((rows - 1) * in + i)] * ws[static_cast<size_t>(o * in + i)];
    expected.push_back(sum);
    found.push_back(ys[static_cast<size_t>((rows - 1) * out + o)]);
  }
  const double error = relative_l2(found, expected);
  const std::string name = str(rows, " x ", in, " -> ", out);
  expect_right("linear " + name, error, bound_of(dtype));
  const double ms = bench.time_ms([&] { linear(ctx, x, weight, Activation::kNone, y); });
  const double rate = 2 * static_cast<double>(rows) * static_cast<double>(in * out) / ms * 1e3;
  bench.row(fmt::format("{:<22} {} {:>10.4f} ms {:>8.2f} TFLOP/s {:>4.0f} %  error {:.1e}", name,
                        name_of(dtype), ms, rate * 1e-12, 100 * rate / bench.ceiling(dtype), error),
            {{"rows", rows},
             {"in", in},
             {"out", out},
             {"dtype", name_of(dtype)},
             {"ms", ms},
             {"tflops", rate * 1e-12},
             {"of_ceiling", rate / bench.ceiling(dtype)},
             {"error", error}});
}

// Relative error of sampled queries against plain sums in double.
double attention_error(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                       double scale) {
  const auto qs = values_of(q), ks = values_of(k), vs = values_of(v), os = values_of(out);
  const int64_t heads = q.dim(1), dim = q.dim(2), keys = k.dim(0);
  std::vector<double> found, expected, weights(static_cast<size_t>(keys));
  const auto at = [&](int64_t token, int64_t head) {
    return static_cast<size_t>((token * heads + head) * dim);
  };
  for (int64_t sample = 0; sample < 8; ++sample) {
    const int64_t token = sample * (q.dim(0) - 1) / 7, head = sample % heads;
    double most = -INFINITY, sum = 0;
    for (int64_t j = 0; j < keys; ++j) {
      double logit = 0;
      for (int64_t d = 0; d < dim; ++d)
        logit +=
            qs[at(token, head) + static_cast<size_t>(d)] * ks[at(j, head) + static_cast<size_t>(d)];
      weights[static_cast<size_t>(j)] = logit * scale;
      most = std::max(most, logit * scale);
    }
    std::vector<double> mean(static_cast<size_t>(dim), 0);
    for (int64_t j = 0; j < keys; ++j) {
      const double w = std::exp(weights[static_cast<size_t>(j)] - most);
      sum += w;
      for (size_t d = 0; d < mean.size(); ++d) mean[d] += w * vs[at(j, head) + d];
    }
    for (size_t d = 0; d < mean.size(); ++d) {
      expected.push_back(mean[d] / sum);
      found.push_back(os[at(token, head) + d]);
    }
  }
  return relative_l2(found, expected);
}

void time_attention(Bench& bench, DType dtype, int64_t queries, int64_t keys, int64_t heads,
                    int64_t dim) {
  Context& ctx = bench.ctx();
  const Tensor q = bench.random(dtype, {queries, heads, dim}, 1);
  const Tensor k = bench.random(dtype, {keys, heads, dim}, 2);
  const Tensor v = bench.random(dtype, {keys, heads, dim}, 3);
  const Tensor out(ctx.device(), dtype, q.shape());
  const KvPages pages(ctx, k, v);
  const auto scale = static_cast<float>(1 / std::sqrt(static_cast<double>(dim)));
  attend(ctx, q, pages.view(), scale, out);
  ctx.synchronize();
  const double error = attention_error(q, k, v, out, scale);
  const std::string name = str(queries, " x ", keys, " x ", heads, " x ", dim);
  expect_right("attention " + name, error, bound_of(dtype));
  const double ms = bench.time_ms([&] { attend(ctx, q, pages.view(), scale, out); }, 11, 5);
  const double rate =
      4 * static_cast<double>(queries * keys) * static_cast<double>(heads * dim) / ms * 1e3;
  bench.row(fmt::format("{:<26} {} {:>10.4f} ms {:>8.2f} TFLOP/s {:>4.0f} %  error {:.1e}", name,
                        name_of(dtype), ms, rate * 1e-12, 100 * rate / bench.ceiling(dtype), error),
            {{"queries", queries},
             {"keys", keys},
             {"heads", heads},
             {"head_dim", dim},
             {"dtype", name_of(dtype)},
             {"ms", ms},
             {"tflops", rate * 1e-12},
             {"of_ceiling", rate / bench.ceiling(dtype)},
             {"error", error}});
}

// Frames of a scene that comes round: a key is its place's, seen again with a little noise, and a
// share of every frame is new.
class Scene {
 public:
  Scene(Bench& bench, DType dtype, int64_t tokens, int64_t heads, int64_t dim)
      : bench_(bench), dtype_(dtype), shape_{tokens, heads, dim} {}

  Tensor frame(int64_t index) const {
    constexpr int64_t kScenes = 12;    // before the first comes round
    constexpr float kNoise = 0.02F;    // of what is seen again
    constexpr int64_t kNewOneOf = 16;  // tokens of a frame
    const Tensor base({}, DType::kF32, shape_), noise({}, DType::kF32, shape_);
    fill_normal(3, static_cast<uint32_t>(index % kScenes), 0, base.data<float>(), base.numel());
    fill_normal(4, static_cast<uint32_t>(index), 0, noise.data<float>(), noise.numel());
    const int64_t row = shape_[1] * shape_[2];
    for (int64_t i = 0; i < base.numel(); ++i) {
      const bool is_new = (i / row + index) % kNewOneOf == 0;
      float& x = base.data<float>()[i];
      x = is_new ? noise.data<float>()[i] : x + kNoise * noise.data<float>()[i];
    }
    if (dtype_ == DType::kF32) return base.to(bench_.ctx().device());
    const Tensor half({}, dtype_, shape_);
    for (int64_t i = 0; i < base.numel(); ++i) half.data<bf16>()[i] = bf16(base.data<float>()[i]);
    return half.to(bench_.ctx().device());
  }

 private:
  Bench& bench_;
  DType dtype_;
  Shape shape_;
};

void time_merge(Bench& bench, AnnEngine engine, int64_t frames, int64_t tokens, int64_t heads,
                int64_t dim) {
  Context& ctx = bench.ctx();
  const DType dtype = dtype_of_flags(bench);
  const Tensor clock = Tensor::zeros(ctx.device(), DType::kI64, {1});
  CacheOptions options;
  options.memory = "tempcache";
  options.dtype = dtype;
  options.num_heads = heads;
  options.head_dim = dim;
  options.tokens_per_frame = tokens;
  options.tempcache.ann = engine;
  options.clock = clock;
  const auto cache = make_cache(ctx, options);
  const Scene scene(bench, dtype, tokens, heads, dim);
  StageClock stages(ctx, 2);
  std::vector<double> times;
  for (int64_t frame = 0; frame < frames; ++frame) {
    const Tensor keys = scene.frame(frame);
    set_clock(ctx, clock, frame);
    cache->prepare_chunk(ctx);
    ctx.synchronize();
    stages.mark(0);
    if (cache->wants_queries()) cache->observe_queries(ctx, keys, {frame, 1});
    cache->commit(ctx, keys, keys, {frame, 1});
    stages.mark(1);
    ctx.synchronize();
    if (frame >= frames / 2) times.push_back(stages.ms(0, 1));
  }
  std::nth_element(times.begin(), times.begin() + static_cast<int64_t>(times.size() / 2),
                   times.end());
  const double ms = times[times.size() / 2];
  const double kept =
      static_cast<double>(cache->total_entries()) / static_cast<double>(heads * tokens * frames);
  const char* name = engine == AnnEngine::kLsh ? "lsh" : "quant";
  bench.row(
      fmt::format("{:<5} {} frames of {} x {} x {}: {:>9.4f} ms a commit of one layer, {:.1f} "
                  "% of the keys kept",
                  name, frames, tokens, heads, dim, ms, 100 * kept),
      {{"engine", name},
       {"frames", frames},
       {"tokens", tokens},
       {"heads", heads},
       {"head_dim", dim},
       {"ms", ms},
       {"kept", kept}});
}

void time_index(Bench& bench, AnnEngine engine, int64_t size, int64_t queries, int64_t dim) {
  constexpr int64_t kMost = 8;
  std::vector<float> vectors(static_cast<size_t>(size * dim));
  fill_normal(5, 0, 0, vectors.data(), size * dim);
  std::vector<float> asked(static_cast<size_t>(queries * dim));
  fill_normal(5, 1, 0, asked.data(), queries * dim);
  // A query is a vector of the index, a little off: who is nearest is known.
  std::vector<int32_t> slots(static_cast<size_t>(size));
  for (int64_t i = 0; i < size; ++i) slots[static_cast<size_t>(i)] = static_cast<int32_t>(i);
  const auto partner = [&](int64_t query) { return query * 7919 % size; };
  for (int64_t i = 0; i < queries * dim; ++i)
    asked[static_cast<size_t>(i)] = 0.4F * asked[static_cast<size_t>(i)] +
                                    vectors[static_cast<size_t>(partner(i / dim) * dim + i % dim)];
  const auto index = make_ann_index(engine, dim, 0);
  index->set_all(slots.data(), vectors.data(), size);
  std::vector<int32_t> found(static_cast<size_t>(queries * kMost));
  const double ms = bench.time_ms(
      [&] { index->nearest_all(asked.data(), queries, kMost, INFINITY, found.data()); });
  int64_t hits = 0;
  for (int64_t q = 0; q < queries; ++q) {
    const auto begin = found.begin() + q * kMost;
    hits += std::find(begin, begin + kMost, static_cast<int32_t>(partner(q))) != begin + kMost;
  }
  const double recall = static_cast<double>(hits) / static_cast<double>(queries);
  const char* name = engine == AnnEngine::kLsh ? "lsh" : "quant";
  bench.row(
      fmt::format("{:<5} {} vectors of {}: {:>8.2f} us a query, the true partner is among {} "
                  "candidates in {:.1f} %",
                  name, size, dim, 1e3 * ms / static_cast<double>(queries), kMost, 100 * recall),
      {{"engine", name},
       {"size", size},
       {"dim", dim},
       {"us_per_query", 1e3 * ms / static_cast<double>(queries)},
       {"recall", recall}});
}

}  // namespace

void bench_linear(Bench& bench) {
  const DType dtype = dtype_of_flags(bench);
  bench.heading("rows x in -> out: milliseconds, rate, share of the ceiling, error");
  for (const auto& [in, out] : {std::pair{384, 384}, {384, 1152}, {384, 1536}, {1536, 384}})
    time_linear(bench, dtype, 128, in, out);
  if (on_cpu(bench)) return;
  for (const auto& [in, out] : {std::pair{1536, 1536}, {1536, 4608}, {1536, 8960}, {8960, 1536}})
    time_linear(bench, dtype, 4680, in, out);
}

void bench_attention(Bench& bench) {
  const DType dtype = dtype_of_flags(bench);
  bench.heading(
      "queries x keys x heads x channels: milliseconds, rate, share of the ceiling, error");
  for (const int64_t keys : {128, 4864, 8192}) time_attention(bench, dtype, 128, keys, 6, 64);
  if (on_cpu(bench)) return;
  time_attention(bench, dtype, 128, 32768, 6, 64);
  time_attention(bench, dtype, 4680, 512, 12, 128);
  time_attention(bench, dtype, 4680, 32760, 12, 128);
}

void bench_merge(Bench& bench) {
  for (const AnnEngine engine : {AnnEngine::kLsh, AnnEngine::kQuant}) {
    time_merge(bench, engine, 64, 128, 6, 64);
    if (!on_cpu(bench)) time_merge(bench, engine, 21, 1560, 12, 128);
  }
}

void bench_index(Bench& bench) {
  if (!on_cpu(bench))
    throw Error(ErrorKind::kUsage,
                "bench index: expected --device cpu (on a GPU the index is a part of merge), found "
                "a GPU");
  for (const AnnEngine engine : {AnnEngine::kLsh, AnnEngine::kQuant}) {
    for (const int64_t size : {512, 4096, 32768}) time_index(bench, engine, size, 128, 64);
  }
}

}  // namespace longtake::cli
