// What a commit of `tempcache` costs on the GPU, as a graph: a frame of the embedded world (8
// layers of 6 heads, 128 tokens) and a chunk of Wan 1.3B (30 layers of 12 heads, 3 frames of 1,560
// tokens). The keys are things seen again with a little noise, or, with a budget, only things that
// are new, so that every key makes another go; a kernel by kernel breakdown is `ncu --metrics
// gpu__time_duration.sum` over --profile, which runs one commit.
#include <cuda_profiler_api.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "base/philox.h"
#include "device/context.h"
#include "device/cuda_check.h"
#include "device/cuda_runtime.h"
#include "device/graph.h"
#include "kv/cache.h"
#include "kv/time_rotation.h"

namespace longtake {
namespace {

struct Case {
  const char* name;
  int64_t layers, all_layers, heads, dim, tokens, chunk, time_pairs, frames_apart;
  int64_t budget_frames;  // of keys; 0: all are kept
  double dense_ms;        // of the chunk or the frame, what the cost is compared with; 0: unknown
};

class Inputs {
 public:
  Inputs(const Case& c, const CacheOptions& options) : c_(c), options_(options) {
    pool_.resize(kMask + 1);
    fill_normal(3, 0, 0, pool_.data(), static_cast<int64_t>(pool_.size()));
  }

  // Frames [first, first + chunk): frame f shows what frame f - frames_apart showed.
  Tensor rows(int64_t first, bool keys) const {
    const int64_t row = c_.heads * c_.dim, tokens = c_.chunk * c_.tokens;
    Tensor out({}, DType::kBF16, {tokens, c_.heads, c_.dim});
    std::vector<float> x(static_cast<size_t>(row));
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t frame = first + t / c_.tokens;
      const int64_t thing = frame % c_.frames_apart * c_.tokens + t % c_.tokens;
      const TimeRotation rotation(options_.tempcache.time_pairs, options_.tempcache.time_theta,
                                  frame);
      // 8,192 things, or none that was there before.
      const size_t own = static_cast<size_t>(
          thing * (7919 * row + (c_.budget_frames > 0 ? 13 : 0)) + (keys ? 0 : 31));
      const size_t noise = static_cast<size_t>((frame * 104729 + t * 1299709) * 13 + 5);
      for (size_t i = 0; i < x.size(); ++i)
        x[i] = pool_[(own + i) & kMask] + 0.05F * pool_[(noise + 3 * i) & kMask];
      for (int64_t head = 0; head < c_.heads && keys; ++head)
        rotation.apply(x.data() + head * c_.dim);
      for (size_t i = 0; i < x.size(); ++i)
        out.data<bf16>()[t * row + static_cast<int64_t>(i)] = bf16(x[i]);
    }
    return out;
  }

 private:
  static constexpr size_t kMask = (size_t{1} << 22) - 1;

  const Case& c_;
  const CacheOptions& options_;
  std::vector<float> pool_;
};

void run(const Case& c, AnnEngine ann, bool profile) {
  Context ctx(Device{DeviceKind::kCuda, 0});
  const Tensor clock(ctx.device(), DType::kI64, {1});
  CacheOptions options;
  options.memory = "tempcache";
  options.num_heads = c.heads;
  options.head_dim = c.dim;
  options.tokens_per_frame = c.tokens;
  options.chunk_frames = c.chunk;
  options.clock = clock;
  options.tempcache.time_pairs = c.time_pairs;
  options.tempcache.ann = ann;
  options.tempcache.merge_threshold = 0.8;
  if (c.budget_frames > 0) options.tempcache.budget_tokens = c.budget_frames * c.tokens;
  options.batch = make_commit_batch(ctx);
  std::vector<std::unique_ptr<KvCache>> caches;
  for (int64_t i = 0; i < c.layers; ++i) caches.push_back(make_cache(ctx, options));
  const Inputs inputs(c, options);
  const Shape shape{c.chunk * c.tokens, c.heads, c.dim};
  const Tensor k(ctx.device(), DType::kBF16, shape), v(ctx.device(), DType::kBF16, shape);
  Graph graph;
  std::vector<double> ms;
  cudaEvent_t begin, end;
  cuda::check(cudaEventCreate(&begin), "event");
  cuda::check(cudaEventCreate(&end), "event");
  const int64_t first_seen_again = (c.budget_frames > 0 ? c.budget_frames : c.frames_apart) + 6;
  const int64_t last = first_seen_again + 9 * c.chunk;
  for (int64_t frame = 0; frame < last; frame += c.chunk) {
    const Tensor hk = inputs.rows(frame, true), hv = inputs.rows(frame, false);
    cuda::check(cudaMemcpy(k.view().raw(), hk.view().raw(), hk.bytes(), cudaMemcpyDefault), "k");
    cuda::check(cudaMemcpy(v.view().raw(), hv.view().raw(), hv.bytes(), cudaMemcpyDefault), "v");
    cuda::check(cudaMemcpy(clock.view().raw(), &frame, sizeof frame, cudaMemcpyDefault), "clock");
    cuda::check(cudaDeviceSynchronize(), "copies");
    bool moved = false;
    for (const auto& cache : caches) moved |= cache->prepare_chunk(ctx);
    if (moved) graph.reset();
    const bool is_last = frame + c.chunk >= last;
    const auto steps = [&] {
      for (const auto& cache : caches) {
        cache->observe_reads(ctx, k);
        cache->commit_chunk(ctx, k, k, v, {frame, c.chunk});
      }
      for (const auto& cache : caches) cache->join_commits();
    };
    cuda::check(cudaEventRecord(begin, cuda::stream_of(ctx)), "event");
    if (profile && is_last) {
      cuda::check(cudaProfilerStart(), "profiler");
      steps();
      ctx.synchronize();
      cuda::check(cudaProfilerStop(), "profiler");
    } else {
      graph.run(ctx, steps);
    }
    cuda::check(cudaEventRecord(end, cuda::stream_of(ctx)), "event");
    ctx.synchronize();
    float took = 0;
    cuda::check(cudaEventElapsedTime(&took, begin, end), "event");
    if (graph.is_recorded() && frame >= first_seen_again) ms.push_back(double{took});
  }
  std::sort(ms.begin(), ms.end());
  const double scale = static_cast<double>(c.all_layers) / static_cast<double>(c.layers);
  const double median = ms.empty() ? 0 : ms[ms.size() / 2] * scale;
  std::printf("%-8s %-5s all layers: %8.3f ms (least %.3f)", c.name,
              ann == AnnEngine::kLsh ? "lsh" : "quant", median, ms.empty() ? 0 : ms[0] * scale);
  if (c.dense_ms > 0) std::printf(", %.1f %% of %.0f ms", 100 * median / c.dense_ms, c.dense_ms);
  std::printf("; %lld keys a head, %lld merged, %.0f MiB a layer, %zu growths\n",
              static_cast<long long>(caches[0]->total_entries() / c.heads),
              static_cast<long long>(caches[0]->merge_counts().merged),
              static_cast<double>(caches[0]->bytes()) / (1 << 20), caches[0]->num_growths());
}

}  // namespace
}  // namespace longtake

int main(int argc, char** argv) {
  using namespace longtake;
  const bool profile = argc > 1 && std::strcmp(argv[argc - 1], "--profile") == 0;
  const std::string only = argc > 1 && argv[1][0] != '-' ? argv[1] : "";
  try {
    for (const Case& c : {Case{"world", 8, 8, 6, 64, 128, 1, 8, 14, 0, 0},
                          Case{"wan", 6, 30, 12, 128, 1560, 3, 22, 21, 0, 450},
                          Case{"wan-8", 6, 30, 12, 128, 1560, 3, 22, 1000, 8, 450},
                          Case{"wan-21", 6, 30, 12, 128, 1560, 3, 22, 1000, 21, 450}}) {
      if (!only.empty() && only != c.name) continue;
      run(c, AnnEngine::kLsh, profile);
      if (!profile) run(c, AnnEngine::kQuant, profile);
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
