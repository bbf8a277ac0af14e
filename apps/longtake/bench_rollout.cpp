// The subject rollout: one frame behind histories of given lengths, by several methods in lock
// step: all remember the frames that dense attention makes, so that each can be timed and held
// against it at every length.
#include <algorithm>
#include <cmath>
#include <memory>

#include "base/error.h"
#include "bench.h"
#include "device/stage_clock.h"
#include "io/safetensors.h"
#include "metrics/image.h"
#include "metrics/median.h"
#include "models/world/model.h"
#include "ops/copy.h"
#include "pipeline/frame_records.h"
#include "pipeline/rollout.h"
#include "pipeline/walk.h"
#include "setup.h"

namespace longtake::cli {
namespace {

constexpr uint64_t kSeed = 7;

// One method and its frames.
class Player {
 public:
  Player(Context& ctx, const world::Model& model, const std::string& name, View text,
         const Method& method, int64_t frames)
      : name_(name),
        model_(model),
        rollout_(ctx, model, text, method, frames),
        stages_(ctx, 4),
        own_(ctx.device(), DType::kF32, latent_shape(model)),
        given_(ctx.device(), DType::kF32, latent_shape(model)),
        pixels_(
            ctx.device(), DType::kF32,
            {model.config.transformer.frame_height(), model.config.transformer.frame_width(), 3}) {}

  static Shape latent_shape(const world::Model& model) {
    const auto& sizes = model.config.transformer;
    return {sizes.latent_channels, sizes.latent_height, sizes.latent_width};
  }

  const std::string& name() const { return name_; }

  void begin(Context& ctx, int64_t frame, CameraPosition camera) {
    records_.begin_frame(ctx, rollout_, frame, camera.x, camera.y);
  }

  // Makes the frame, and remembers `given` or, without one, what it made. frame_ms is set.
  View play(Context& ctx, const Tensor* given) {
    stages_.mark(0);
    records_.denoise(ctx, [&] { rollout_.denoise(ctx, kSeed, own_); });
    stages_.mark(1);
    Context& decoding = records_.begin_decoding(ctx);
    density_ = rollout_.density();
    if (given != nullptr) copy(ctx, *given, given_);
    records_.remember(ctx, [&] { rollout_.remember(ctx, given != nullptr ? given_ : own_); });
    stages_.mark(2);
    records_.decode(decoding, [&] { model_.autoencoder.decode(decoding, own_, pixels_); });
    records_.finish_decoding(ctx);
    stages_.mark(3);
    ctx.synchronize();
    return own_;
  }

  void remember(Context& ctx, const Tensor& given) {
    copy(ctx, given, given_);
    rollout_.remember(ctx, given_);
    ctx.synchronize();
  }

  double ms(int begin, int end) const { return stages_.ms(begin, end); }

  double density() const { return density_; }

  double cache_mib() const {
    size_t bytes = 0;
    for (const LayerState& layer : rollout_.layers()) bytes += layer.memory.cache->bytes_used();
    return static_cast<double>(bytes) / 0x1p20;
  }

 private:
  std::string name_;
  const world::Model& model_;
  Rollout rollout_;
  StageClock stages_;
  double density_ = 1;  // of the latest frame
  Tensor own_, given_, pixels_;
  FrameRecords records_;
};

struct Times {
  std::vector<double> denoise, clean, decode, total, error;
};

void report(Bench& bench, const Player& player, int64_t history, const Times& times,
            double dense_ms) {
  const double total = median(times.total);
  const double error = times.error.empty() ? 0 : median(times.error);
  bench.row(
      fmt::format("{:>6} {:<34} {:>9.3f} ms {:>8.1f} frames/s {:>5.2f}x  denoise {:>8.3f} clean "
                  "{:>7.3f} decode {:>7.3f}  pairs {:>5.1f} %  cache {:>7.1f} MiB  error {:.1e}",
                  history, player.name(), total, 1e3 / total, dense_ms / total,
                  median(times.denoise), median(times.clean), median(times.decode),
                  100 * player.density(), player.cache_mib(), error),
      {{"history_frames", history},
       {"method", player.name()},
       {"ms", total},
       {"frames_per_second", 1e3 / total},
       {"speed_up", dense_ms / total},
       {"denoise_ms", median(times.denoise)},
       {"clean_ms", median(times.clean)},
       {"decode_ms", median(times.decode)},
       {"density", player.density()},
       {"cache_mib", player.cache_mib()},
       {"latent_error", error}});
}

}  // namespace

void bench_rollout(Bench& bench) {
  constexpr int64_t kTimed = 9;  // frames behind each length
  Context& ctx = bench.ctx();
  const BenchFlags& flags = bench.flags();
  const DType dtype = choose_dtype(flags.dtype, ctx.device());
  const std::string folder = flags.model.empty() ? find_embedded_model() : flags.model;
  const world::Config config = world::read_config(folder);
  const std::vector<NamedMethod> methods = choose_methods(
      flags.methods.empty() ? "dense,window:36,tempcache-lsh,all-lsh" : flags.methods, "", folder,
      config, dtype);
  std::vector<int64_t> histories = flags.histories;
  if (histories.empty()) histories = {16, 64};
  std::sort(histories.begin(), histories.end());
  const int64_t last = histories.back() + kTimed;

  const world::Model model = world::load_model(ctx, folder, dtype);
  const Tensor text = world::encode_prompt(ctx, model, "a green summer land with woods .");
  std::vector<std::unique_ptr<Player>> players;
  for (const NamedMethod& named : methods)
    players.push_back(std::make_unique<Player>(ctx, model, named.name, text, named.method, last));
  bench.heading(
      "history, method: one frame; error: relative L2 of its latent from dense attention's");
  Walk walk(overworld::parse_actions("D*24 S*8 A*24 W*8"), start_of(config.transformer));
  const Shape shape = Player::latent_shape(model);
  const Tensor made(ctx.device(), DType::kF32, shape);
  // What dense attention made, for a peer that is to go on from it.
  const int64_t written = flags.latents.empty() ? 0 : last;
  const Tensor latents({}, DType::kF32, {written, shape[0], shape[1], shape[2]});
  const Tensor cameras({}, DType::kF32, {written, 2});
  const auto tile = static_cast<float>(config.transformer.token_pixels());
  std::vector<Times> times(players.size());
  for (int64_t frame = 0; frame < last; ++frame) {
    const CameraPosition camera = walk.next();
    const auto timed = std::find_if(histories.begin(), histories.end(), [&](int64_t history) {
      return frame >= history - 2 && frame < history + kTimed;  // two frames warm up
    });
    const bool is_timed = timed != histories.end() && frame >= *timed;
    std::vector<float> expected;
    for (size_t m = 0; m < players.size(); ++m) {
      Player& player = *players[m];
      player.begin(ctx, frame, camera);
      if (m > 0 && timed == histories.end()) {
        player.remember(ctx, made);
        continue;
      }
      const View own = player.play(ctx, m > 0 ? &made : nullptr);
      if (m == 0) copy(ctx, own, made);
      if (m == 0 && written > 0) {
        copy(ctx, own, latents.view().rows(frame, frame + 1).reshape(shape));
        cameras.data<float>()[2 * frame] = static_cast<float>(camera.x) / tile;
        cameras.data<float>()[2 * frame + 1] = static_cast<float>(camera.y) / tile;
      }
      if (!is_timed) continue;
      Times& row = times[m];
      row.denoise.push_back(player.ms(0, 1));
      row.clean.push_back(player.ms(1, 2));
      row.decode.push_back(player.ms(2, 3));
      row.total.push_back(player.ms(0, 3));
      Tensor latent({}, DType::kF32, own.shape());
      copy(ctx, own, latent);
      const std::vector<float> values(latent.data<float>(), latent.data<float>() + latent.numel());
      if (m == 0)
        expected = values;
      else
        row.error.push_back(relative_l2(values, expected));
    }
    if (timed == histories.end() || frame + 1 < *timed + kTimed) continue;
    const double dense_ms = median(times[0].total);
    for (size_t m = 0; m < players.size(); ++m)
      report(bench, *players[m], *timed, times[m], dense_ms);
    for (Times& row : times) row = {};
  }
  if (written > 0)
    write_safetensors(flags.latents,
                      std::vector<NamedView>{{"latents", latents}, {"cameras", cameras}}, {});
}

}  // namespace longtake::cli
