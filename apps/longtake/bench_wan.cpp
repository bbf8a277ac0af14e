// The subject wan: one chunk of a model of the Wan family behind histories of given lengths, by
// several methods. Without a model folder the weights are random, of the true sizes: they say
// nothing about quality, nor about which keys would merge with real ones.
//
// The history is not rolled out: keys of a scene that drifts and comes back, with noise of their
// own in every frame, are committed to all layers. So it takes seconds, and every method remembers
// the same.
#include <stdlib.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <memory>
#include <numbers>
#include <numeric>
#include <optional>

#include "base/error.h"
#include "base/philox.h"
#include "bench.h"
#include "device/stage_clock.h"
#include "metrics/median.h"
#include "models/wan/checkpoint.h"
#include "models/wan/decoder.h"
#include "models/wan/model.h"
#include "models/wan/random_model.h"
#include "ops/clock.h"
#include "ops/elementwise.h"
#include "ops/linear.h"
#include "ops/noise.h"
#include "ops/rope.h"
#include "pipeline/selection.h"
#include "pipeline/wan_memory.h"
#include "pipeline/wan_rollout.h"
#include "setup.h"

namespace longtake::cli {
namespace {

constexpr int kWarmUp = 2;                             // chunks: one lives, one is recorded
constexpr int kTimedChunks = 3;                        // around the history asked for
constexpr int64_t kTextLen = 512, kPromptTokens = 64;  // the rest is padding

double gib(double bytes) {
  return bytes / 0x1p30;
}

// Random weights of 1.3B's sizes, without the text encoder; gone with the scope.
class RandomFolder {
 public:
  explicit RandomFolder(int threads) {
    std::string pattern = (std::filesystem::temp_directory_path() / "longtake_XXXXXX").string();
    if (::mkdtemp(pattern.data()) == nullptr)
      throw Error(str(pattern, ": expected to make it, found no place"));
    path_ = pattern;
    Context host({}, threads);
    wan::write_random_model(host, path_.string(), {.size = "1.3b", .text_encoder = false});
  }

  ~RandomFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }

  RandomFolder(const RandomFolder&) = delete;
  RandomFolder& operator=(const RandomFolder&) = delete;

  std::string path() const { return path_.string(); }

 private:
  std::filesystem::path path_;
};

// Queries, keys and values of a chunk of the scene.
class Scene {
 public:
  Scene(Context& ctx, const wan::Transformer& transformer, const WanOptions& options)
      : transformer_(transformer),
        rows_(options.height / wan::kPatch),
        columns_(options.width / wan::kPatch),
        chunk_frames_(options.chunk_frames),
        rope_(transformer.make_rope(ctx, chunk_frames_ * rows_ * columns_)),
        clock_(Tensor::zeros(ctx.device(), DType::kI64, {1})) {
    const auto& config = transformer.config();
    const Shape shape{chunk_frames_ * rows_ * columns_, config.num_heads, config.head_dim()};
    for (Tensor* wide : {&here_, &there_, &noise_, &keys_, &turned_})
      *wide = Tensor(ctx.device(), DType::kF32, shape);
    for (Tensor* narrow : {&q, &k, &v}) *narrow = Tensor(ctx.device(), options.dtype, shape);
    fill_normal(ctx, kSeed, clock_, 0, here_);
    fill_normal(ctx, kSeed, clock_, 1, there_);
  }

  // Of the frames from `frame` on.
  void set(Context& ctx, int64_t frame) {
    constexpr double kPeriod = 192;  // frames until the scene is what it was
    constexpr float kNoise = 0.3F;
    const double turn = 2 * std::numbers::pi * static_cast<double>(frame) / kPeriod;
    set_clock(ctx, clock_, frame);
    transformer_.set_rope(ctx, clock_, rows_, columns_, rope_);
    axpby(ctx, static_cast<float>(std::cos(turn)), here_, static_cast<float>(std::sin(turn)),
          there_, keys_);
    convert(ctx, keys_, v);
    fill_normal(ctx, kSeed, clock_, 2, noise_);
    axpby(ctx, 1, keys_, kNoise, noise_, keys_);
    rope(ctx, keys_, rope_.cos, rope_.sin, turned_);
    convert(ctx, turned_, k);
    convert(ctx, turned_, q);
  }

  Tensor q, k, v;

 private:
  static constexpr uint64_t kSeed = 11;

  const wan::Transformer& transformer_;
  int64_t rows_, columns_, chunk_frames_;
  RopeTable rope_;
  Tensor clock_, here_, there_, noise_, keys_, turned_;
};

struct Times {
  double total = 0, clean = 0, commit = 0;  // ms of a chunk; commit: of all layers, alone
  double attention = 0;                     // ms of all layers and passes of the chunk
};

class WanBench {
 public:
  explicit WanBench(Bench& bench)
      : bench_(bench), ctx_(bench.ctx()), free_before_(free_memory_bytes(ctx_.device())) {
    const BenchFlags& flags = bench.flags();
    std::string folder = flags.model;
    if (folder.empty()) folder = random_.emplace(ctx_.threads()).path();
    files_ = wan::find_model_files(folder);
    options_ = options_of_family(files_.family);
    options_.dtype = choose_dtype(flags.dtype, ctx_.device());
    choose_size(flags.size, options_);
    if (options_.is_rolling)
      throw Error(ErrorKind::kUsage,
                  "bench wan: expected a model that finishes one chunk before "
                  "it begins the next, found a rolling one");
    config_ = wan::read_config(files_);
    histories_ =
        flags.histories.empty() ? std::vector<int64_t>{21, 60, 120, 240, 750} : flags.histories;
    std::sort(histories_.begin(), histories_.end());
    const int64_t first = (kWarmUp + kTimedChunks - 1) * options_.chunk_frames;
    if (histories_.front() < first)
      throw Error(ErrorKind::kUsage, str("--history: expected at least ", first,
                                         " latent frames, found ", histories_.front()));
  }

  void run() {
    const std::vector<std::string> methods = method_list();
    for (const std::string& name : methods) method_of(name, options_);  // wrong ones first
    bench_.heading(fmt::format(
        "{} layers of {} heads, {} x {} pixels, {} steps and a clean pass, {}; {}",
        config_.num_layers, config_.num_heads, options_.width * wan::kLatentPixels,
        options_.height * wan::kLatentPixels, options_.steps.size(), name_of(options_.dtype),
        random_ ? "random weights, which say nothing about quality" : files_.transformer.c_str()));
    bench_.heading(
        "history: latent frames that dense attention reads, the chunk's own included; committed "
        "from a made-up scene, not rolled out");
    bench_.heading(fmt::format("prompt: {} tokens and padding up to {}, which is one key",
                               kPromptTokens, kTextLen));
    load(config_.num_layers);
    matmul_ms_ = time_products();
    for (const std::string& name : methods) run_method(name);
    transformer_.reset();
    for (const auto kind : {wan::DecoderKind::kVae, wan::DecoderKind::kTaehv}) time_decoder(kind);
  }

 private:
  int64_t frame_tokens() const { return model_sizes(options_, config_).frame_tokens; }

  int64_t chunk_tokens() const { return options_.chunk_frames * frame_tokens(); }

  double video_frames() const {
    return static_cast<double>(wan::kFramesPerLatent * options_.chunk_frames);
  }

  std::vector<std::string> method_list() const {
    std::string list = bench_.flags().methods;
    if (list.empty()) {
      list = "dense,own";
      for (const char* preset : {"tempcache-lsh", "all-lsh"}) {
        for (const int64_t frames : {8, 21})
          list += fmt::format(",{}:memory-budget={}", preset, frames * frame_tokens());
      }
    }
    return method_names_in(list);
  }

  Method method_of(const std::string& name, const WanOptions& options) const {
    const auto [preset, settings] = split_method(name == "own" ? "" : name);
    return choose_method(ctx_, options, config_, preset, settings);
  }

  // The first layers of the model.
  void load(int64_t layers) {
    transformer_.reset();
    const Checkpoint file = wan::open_generator(files_.transformer, files_.group);
    WeightTable table(file, &ctx_);
    wan::TransformerConfig config = config_;
    config.num_layers = layers;
    transformer_ = std::make_unique<wan::Transformer>(config, options_.dtype, DType::kF32, table);
    scene_ = std::make_unique<Scene>(ctx_, *transformer_, options_);
  }

  // How many layers' full histories of so many frames fit.
  int64_t layers_that_fit(int64_t frames) const {
    constexpr double kForTheRest = 6 * 0x1p30;
    const ModelSizes sizes = model_sizes(options_, config_);
    const double layer = cache_bytes_per_frame(sizes, options_.dtype) * 1.02 *
                         static_cast<double>(frames) / static_cast<double>(sizes.num_layers);
    const double there = static_cast<double>(free_memory_bytes(ctx_.device())) - kForTheRest;
    return std::clamp<int64_t>(static_cast<int64_t>(there / layer), 1, config_.num_layers);
  }

  void run_method(const std::string& name) {
    WanOptions options = options_;
    options.method = method_of(name, options);
    const bool is_full = options.method->memory.memory == "full";
    std::unique_ptr<ChunkRollout> rollout;
    for (const int64_t history : histories_) {
      const int64_t last = history + options_.chunk_frames;
      if (is_full) {
        rollout.reset();
        const int64_t layers = layers_that_fit(last);
        if (layers != transformer_->config().num_layers) load(layers);
        // Of a part of the layers all are like the others.
        if (options.method->dense_layers) options.method->dense_layers.reset();
        options.expected_frames = last;
      } else if (transformer_->config().num_layers != config_.num_layers) {
        load(config_.num_layers);
      }
      if (rollout == nullptr) {
        const Tensor text = Tensor::zeros({}, DType::kF32, {kTextLen, config_.text_dim});
        Context host({}, ctx_.threads());
        fill_normal(host, 7, Tensor::zeros({}, DType::kI64, {1}), 0,
                    text.view().rows(0, kPromptTokens));
        rollout = std::make_unique<ChunkRollout>(ctx_, *transformer_, text, options);
      }
      report(name, history, *rollout, time_chunks(*rollout, history));
    }
  }

  // A chunk so far into the video that dense attention reads `history` frames.
  Times time_chunks(ChunkRollout& rollout, int64_t history) {
    const int64_t chunk = options_.chunk_frames;
    StageClock clock(ctx_, 2);
    const auto timed = [&](const auto& steps) {
      clock.mark(0);
      steps();
      clock.mark(1);
      ctx_.synchronize();
      rollout.expect_finite();
      return clock.ms(0, 1);
    };
    Times out;
    // The median of the timed ones is the chunk asked for.
    const int64_t first = history - (kWarmUp + kTimedChunks / 2 + 1) * chunk;
    std::vector<double> commits;
    while (rollout.num_frames() < first) {
      scene_->set(ctx_, rollout.num_frames());
      commits.push_back(
          timed([&] { rollout.remember_keys(ctx_, scene_->q, scene_->k, scene_->v); }));
    }
    constexpr size_t kLatest = 9;
    if (commits.size() > kLatest) commits.erase(commits.begin(), commits.end() - kLatest);
    if (!commits.empty()) out.commit = median(commits);
    const Tensor latents(ctx_.device(), DType::kF32,
                         {chunk, config_.out_channels, options_.height, options_.width});
    const NoiseSource noise = noise_of_seed(ctx_, 0);
    std::vector<double> totals, cleans;
    for (int i = 0; i < kWarmUp + kTimedChunks; ++i) {
      if (i == kWarmUp + kTimedChunks / 2) out.attention = time_attention(rollout);
      const double total = timed([&] { rollout.next_chunk(ctx_, noise, latents); });
      density_ = rollout.take_density();
      if (i < kWarmUp) continue;
      totals.push_back(total);
      cleans.push_back(rollout.clean_ms());
    }
    out.total = median(totals);
    out.clean = median(cleans);
    return out;
  }

  // All products of one layer in one pass, ms.
  double time_products() {
    const int64_t dim = config_.dim, ffn = config_.ffn_dim;
    double ms = 0;
    const auto add = [&](int64_t in, int64_t out, int times, DType result) {
      const Tensor host({}, DType::kF32, {out, in});
      Context cpu({}, ctx_.threads());
      fill_normal(cpu, 5, Tensor::zeros({}, DType::kI64, {1}), 0, host);
      const LinearWeight weight(ctx_, host, View(), View(), options_.dtype);
      const Tensor x = bench_.random(options_.dtype, {chunk_tokens(), in}, 6);
      const Tensor y(ctx_.device(), result, {chunk_tokens(), out});
      ms += times * bench_.time_ms([&] { linear(ctx_, x, weight, Activation::kNone, y); }, 5, 5);
    };
    add(dim, 3 * dim, 1, DType::kF32);  // q, k, v
    add(dim, dim, 3, DType::kF32);      // o, and q and o of the cross attention
    add(dim, ffn, 1, options_.dtype);
    add(ffn, dim, 1, DType::kF32);
    return ms;
  }

  // Self attention in the next chunk, of all layers and passes, ms.
  double time_attention(const ChunkRollout& rollout) {
    double sparse_steps = 0, selecting = 0;  // the latter: pairs of a layer and a pass
    for (int64_t step = 0; step < rollout.method().num_steps; ++step)
      sparse_steps += is_sparse_step(rollout.method(), step) ? 1 : 0;
    const LayerState* dense = nullptr;
    const LayerState* sparse = nullptr;
    for (const LayerState& layer : rollout.layers()) {
      (layer.memory.selector != nullptr ? sparse : dense) = &layer;
      if (layer.memory.selector != nullptr) selecting += sparse_steps;
    }
    const double all = static_cast<double>(rollout.layers().size()) *
                       (static_cast<double>(rollout.method().num_steps) + 1);
    double ms = (all - selecting) * time_attention(dense != nullptr ? *dense : *sparse, false);
    if (selecting > 0) ms += selecting * time_attention(*sparse, true);
    return ms;
  }

  // Of one layer in one pass, choosing included.
  double time_attention(const LayerState& layer, bool sparse) {
    KvCache& cache = *layer.memory.cache;
    cache.set_reading(ctx_, {});
    const float scale = 1 / std::sqrt(static_cast<float>(config_.head_dim()));
    const Tensor out(ctx_.device(), options_.dtype, scene_->q.shape());
    const int64_t own = (chunk_tokens() + kPageTokens - 1) / kPageTokens;
    const double ms = bench_.time_ms(
        [&] {
          cache.set_current(ctx_, scene_->k, scene_->v);
          const KvView kv = cache.view();
          if (!sparse) return attend(ctx_, scene_->q, kv, scale, out);
          attend_blocks(ctx_, scene_->q, kv,
                        layer.memory.selector->select(ctx_, scene_->q, kv, layer.memory.first_pages,
                                                      layer.memory.newest_pages + own, scale),
                        scale, out);
        },
        3, 3);
    cache.set_reading(ctx_, {});
    return ms;
  }

  void report(const std::string& name, int64_t history, const ChunkRollout& rollout,
              const Times& times) {
    const auto layers = static_cast<double>(rollout.layers().size());
    const double all = static_cast<double>(config_.num_layers) / layers;
    const double passes = static_cast<double>(rollout.method().num_steps) + 1;
    const double attention = all * times.attention;
    size_t cache = 0, used = 0;
    int64_t entries = 0, merged = 0, evicted = 0;
    for (const LayerState& layer : rollout.layers()) {
      cache += layer.memory.cache->bytes();
      used += layer.memory.cache->bytes_used();
      entries = std::max(entries, layer.memory.cache->entries());
      merged += layer.memory.cache->merge_counts().merged;
      evicted += layer.memory.cache->merge_counts().evicted;
    }
    const double total = all * times.total, products = layers * passes * matmul_ms_ * all;
    const double device =
        static_cast<double>(free_before_) - static_cast<double>(free_memory_bytes(ctx_.device()));
    bench_.row(
        fmt::format("{:>5} {:<34} {:>8.1f} ms {:>6.1f} frames/s  products {:>6.1f} self attention "
                    "{:>7.1f} rest {:>6.1f}  clean pass {:>6.1f} commits alone {:>6.1f}  pairs "
                    "{:>5.1f} % keys {:>7}  cache {:>6.2f} GiB, device {:>6.2f} GiB{}",
                    history, name, total, video_frames() / total * 1e3, products, attention,
                    total - products - attention, all * times.clean, all * times.commit,
                    100 * density_, entries, gib(static_cast<double>(cache)), gib(device),
                    all > 1 ? fmt::format("  ({} layers' times, scaled)", layers) : ""),
        {{"history", history},
         {"method", name},
         {"ms", total},
         {"frames_per_second", video_frames() / total * 1e3},
         {"products_ms", products},
         {"self_attention_ms", attention},
         {"rest_ms", total - products - attention},
         {"clean_ms", all * times.clean},
         {"commits_alone_ms", all * times.commit},
         {"density", density_},
         {"keys", entries},
         {"merged", merged},
         {"evicted", evicted},
         {"cache_gib", gib(static_cast<double>(cache))},
         {"cache_used_gib", gib(static_cast<double>(used))},
         {"device_gib", gib(device)},
         {"layers_timed", rollout.layers().size()}});
  }

  void time_decoder(wan::DecoderKind kind) {
    const bool is_vae = kind == wan::DecoderKind::kVae;
    const std::string& path = is_vae ? files_.vae : files_.taehv;
    if (path.empty()) return;
    constexpr int kFirst = 3, kTimed = 5;
    const size_t free = free_memory_bytes(ctx_.device());
    const auto decoder = wan::open_decoder(ctx_, Checkpoint(path), kind, options_.dtype);
    const Tensor z =
        bench_.random(DType::kF32, {config_.out_channels, options_.height, options_.width}, 9);
    std::vector<double> times;
    for (int i = 0; i < kFirst + kTimed; ++i) {
      ctx_.synchronize();
      Stopwatch watch;
      decoder->decode(ctx_, z, [](View) {});
      if (i >= kFirst) times.push_back(watch.lap_ms());
    }
    const double ms = median(times);
    const double device =
        static_cast<double>(free) - static_cast<double>(free_memory_bytes(ctx_.device()));
    const char* name = is_vae ? "vae" : "taehv";
    bench_.row(fmt::format("decoder {:<8} {:>8.2f} ms a latent, {:>7.2f} a chunk, {:>6.1f} "
                           "frames/s, {:.2f} GiB more",
                           name, ms, ms * static_cast<double>(options_.chunk_frames),
                           wan::kFramesPerLatent / ms * 1e3, gib(device)),
               {{"decoder", name},
                {"ms_per_latent", ms},
                {"frames_per_second", wan::kFramesPerLatent / ms * 1e3},
                {"device_gib", gib(device)}});
  }

  Bench& bench_;
  Context& ctx_;
  size_t free_before_;
  std::optional<RandomFolder> random_;
  wan::ModelFiles files_;
  WanOptions options_;
  wan::TransformerConfig config_;
  std::vector<int64_t> histories_;
  std::unique_ptr<wan::Transformer> transformer_;
  std::unique_ptr<Scene> scene_;
  double matmul_ms_ = 0;  // of a layer and a pass
  double density_ = 1;    // of the latest chunk
};

}  // namespace

void bench_wan(Bench& bench) {
  WanBench(bench).run();
}

}  // namespace longtake::cli
