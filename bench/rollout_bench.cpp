// Time of one frame (denoising steps, clean pass, decoder) behind a history of a given length.
//
//   rollout_bench --model models/world --history 64 --frames 9 --threads 2 --dtype bf16 [--latents
//   FILE]
//
// One JSON line on stdout. --latents writes what was played (latents [F, C, h, w], cameras [F, 2]
// in tokens), so that a peer can be given the same history and must agree on the frames after it:
// bench/rollout_peer.py does.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <iostream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "base/error.h"
#include "device/buffer.h"
#include "io/safetensors.h"
#include "models/world/model.h"
#include "pipeline/rollout.h"
#include "pipeline/walk.h"

namespace {

using namespace longtake;
using Clock = std::chrono::steady_clock;

struct Options {
  std::string model = "models/world", prompt = "a green summer land with woods .", method = "dense",
              dtype = "bf16", latents;
  int64_t history = 64, frames = 9, steps = 0;
  int threads = 0;
  uint64_t seed = 7;
};

void run(const Options& options) {
  Context ctx({}, options.threads);
  const auto model =
      world::load_model(ctx, options.model, options.dtype == "f32" ? DType::kF32 : DType::kBF16);
  const auto& sizes = model.config.transformer;
  const int64_t total = options.history + options.frames;
  Method method = parse_method(options.method);
  if (options.steps > 0) method.num_steps = options.steps;
  Rollout rollout(ctx, model,
                  model.text_encoder.encode(ctx, model.vocabulary.tokenize(options.prompt)), method,
                  total);
  Walk walk(overworld::parse_actions("D*24 S*8 A*24 W*8"), start_of(sizes));

  const Shape shape{total, sizes.latent_channels, sizes.latent_height, sizes.latent_width};
  const Tensor latents({}, DType::kF32, shape);
  const Tensor cameras({}, DType::kF32, {total, 2});
  const Tensor pixels({}, DType::kF32, {sizes.frame_height(), sizes.frame_width(), 3});
  std::vector<double> milliseconds, commits;
  const auto committing = [&] {
    double sum = 0;
    for (const auto& layer : rollout.layers()) sum += layer.memory.commit_ms;
    return sum;
  };
  uint64_t allocations = 0;
  for (int64_t frame = 0; frame < total; ++frame) {
    const auto camera = walk.next();
    cameras.data<float>()[2 * frame] = static_cast<float>(camera.x) / 16;
    cameras.data<float>()[2 * frame + 1] = static_cast<float>(camera.y) / 16;
    const View z = latents.view().rows(frame, frame + 1).reshape({shape[1], shape[2], shape[3]});
    const uint64_t before = num_buffer_allocations();
    const double committed = committing();
    const auto start = Clock::now();
    rollout.begin_frame(ctx, frame, camera.x, camera.y);
    rollout.denoise(ctx, options.seed, z);
    rollout.remember(ctx, z);
    model.autoencoder.decode(ctx, z, pixels);
    if (frame > options.history) {  // the first one warms up
      milliseconds.push_back(
          std::chrono::duration<double, std::milli>(Clock::now() - start).count());
      commits.push_back(committing() - committed);
      allocations += num_buffer_allocations() - before;
    }
  }
  if (!options.latents.empty())
    write_safetensors(options.latents,
                      std::vector<NamedView>{{"latents", latents}, {"cameras", cameras}}, {});
  std::sort(milliseconds.begin(), milliseconds.end());
  std::sort(commits.begin(), commits.end());
  std::cout << nlohmann::json{{"dtype", options.dtype},
                              {"threads", ctx.threads()},
                              {"steps", rollout.num_steps()},
                              {"method", method.to_string()},
                              {"history_frames", options.history},
                              {"median_ms", milliseconds[milliseconds.size() / 2]},
                              {"min_ms", milliseconds.front()},
                              {"commit_ms", commits[commits.size() / 2]},
                              {"max_ms", milliseconds.back()},
                              {"allocations", allocations}}
            << '\n';
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  CLI::App app("time of one frame behind a history");
  app.add_option("--model", options.model);
  app.add_option("--prompt", options.prompt);
  app.add_option("--history", options.history)->check(CLI::Range(0, 100000));
  app.add_option("--frames", options.frames)->check(CLI::Range(2, 100000));
  app.add_option("--steps", options.steps, "0: the model's own")->check(CLI::Range(0, 1000));
  app.add_option("--threads", options.threads)->check(CLI::Range(0, 1024));
  app.add_option("--seed", options.seed);
  app.add_option("--method", options.method, "such as window:37 or tempcache-lsh");
  app.add_option("--dtype", options.dtype)->check(CLI::IsMember({"f32", "bf16"}));
  app.add_option("--latents", options.latents);
  CLI11_PARSE(app, argc, argv);
  try {
    run(options);
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << '\n';
    return 1;
  }
  return 0;
}
