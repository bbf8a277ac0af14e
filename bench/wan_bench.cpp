// A Wan model of any size on the CPU: how long it takes to load, what a pass and a chunk cost, what
// they occupy. Random weights serve (tools/make-random-model); they say nothing about quality.
#include <CLI/CLI.hpp>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <optional>
#include <string>
#include <vector>

#include "base/error.h"
#include "models/wan/checkpoint.h"
#include "models/wan/model_files.h"
#include "ops/linear.h"
#include "pipeline/stats.h"
#include "pipeline/wan_rollout.h"

namespace longtake {
namespace {

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

double mib(size_t bytes) {
  return static_cast<double>(bytes) / (1 << 20);
}

// Floating-point operations of one pass over `tokens` that read `keys`.
double pass_flop(const wan::TransformerConfig& c, double tokens, double keys, double text_len) {
  const auto dim = static_cast<double>(c.dim);
  const auto ffn = static_cast<double>(c.ffn_dim);
  const double linear = 2 * tokens * (6 * dim * dim + 2 * dim * ffn);
  const double attention = 4 * tokens * (keys + text_len) * dim;
  return static_cast<double>(c.num_layers) * (linear + attention);
}

int run(const std::string& folder, WanOptions options, int threads, int num_chunks) {
  Context ctx({}, threads);
  auto start = std::chrono::steady_clock::now();
  const Checkpoint file = wan::open_generator(wan::find_model_files(folder).transformer);
  WeightTable table(file, &ctx);
  const wan::TransformerConfig config = wan::transformer_config(file);
  const wan::Transformer transformer(config, options.dtype, DType::kF32, table);
  table.finish();
  std::printf("loaded %.0f MiB in %.1f s, %s, %d threads\n", mib(table.bytes()),
              seconds_since(start), name_of(options.dtype), ctx.threads());

  constexpr int64_t kTextLen = 512;
  const Tensor text = Tensor::zeros({}, DType::kF32, {kTextLen, config.text_dim});
  ChunkRollout rollout(ctx, transformer, text, options);
  const Tensor latents({}, DType::kF32,
                       {options.chunk_frames, config.out_channels, options.height, options.width});
  const int64_t frame_tokens = options.height / wan::kPatch * (options.width / wan::kPatch);
  for (int n = 0; n < num_chunks; ++n) {
    const int64_t history = rollout.layers()[0].memory.cache->entries();
    start = std::chrono::steady_clock::now();
    rollout.next_chunk(ctx, noise_of_seed(ctx, 0), latents);
    const double seconds = seconds_since(start);
    const auto tokens = static_cast<double>(options.chunk_frames * frame_tokens);
    const double passes = static_cast<double>(options.steps.size()) + 1;
    const double flop =
        passes * pass_flop(config, tokens, tokens + static_cast<double>(history), kTextLen);
    std::printf(
        "chunk %d: %.0f tokens, %lld keys of history: %.2f s, %.2f s a pass, %.0f GFLOP/s\n", n,
        tokens, static_cast<long long>(history), seconds, seconds / passes, flop / seconds * 1e-9);
  }
  for (int64_t i = 0; i < latents.numel(); ++i) {
    if (!std::isfinite(latents.data<float>()[i])) throw Error("latents: expected finite ones");
  }
  size_t cache = 0;
  for (const LayerState& layer : rollout.layers()) cache += layer.memory.cache->bytes();
  std::printf(
      "weights %.0f MiB, caches %.0f, workspace %.0f, peak of the process %.0f (with the "
      "mapped file)\n",
      mib(table.bytes()), mib(cache), mib(ctx.workspace().bytes_reserved()), mib(peak_rss_bytes()));
  return 0;
}

}  // namespace
}  // namespace longtake

int main(int argc, char** argv) {
  using namespace longtake;
  WanOptions options = self_forcing_options();
  options.height = 16;
  options.width = 24;
  std::string folder;
  std::string dtype = bf16_products_supported() ? "bf16" : "f32";
  int threads = 0;
  int num_chunks = 2;
  CLI::App app("Times a Wan model on the CPU");
  app.add_option("--model", folder, "folder")->required();
  app.add_option("--height", options.height, "of a latent frame")->capture_default_str();
  app.add_option("--width", options.width, "of a latent frame")->capture_default_str();
  app.add_option("--chunks", num_chunks)->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--dtype", dtype)->check(CLI::IsMember({"bf16", "f32"}))->capture_default_str();
  app.add_option("--threads", threads)->check(CLI::NonNegativeNumber)->capture_default_str();
  CLI11_PARSE(app, argc, argv);
  options.dtype = dtype == "f32" ? DType::kF32 : DType::kBF16;
  try {
    return run(folder, options, threads, num_chunks);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "wan_bench: %s\n", error.what());
    return 1;
  }
}
