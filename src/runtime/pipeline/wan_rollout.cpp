#include "pipeline/wan_rollout.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "base/error.h"
#include "base/philox.h"
#include "ops/clock.h"

namespace longtake {
namespace {

void copy(View from, View to) {
  LONGTAKE_CHECK(from.bytes() == to.bytes(), from.shape().to_string());
  std::memmove(to.raw(), from.raw(), from.bytes());
}

CacheOptions cache_options(const wan::TransformerConfig& config, const WanOptions& options,
                           int64_t window_frames) {
  CacheOptions cache;
  cache.memory = options.memory;
  cache.sink_frames = options.sink_frames;
  cache.window_frames = window_frames;
  cache.dtype = options.dtype;
  cache.num_heads = config.num_heads;
  cache.head_dim = config.head_dim();
  cache.tokens_per_frame = options.height / wan::kPatch * (options.width / wan::kPatch);
  cache.tempcache.time_pairs = config.time_pairs();
  cache.tempcache.time_theta = wan::kTheta;
  return cache;
}

void expect(bool ok, const char* what, const std::string& expected, const std::string& found) {
  if (!ok) throw Error(ErrorKind::kUsage, str(what, ": expected ", expected, ", found ", found));
}

}  // namespace

WanOptions self_forcing_options() {
  return {};
}

WanOptions longlive_options(bool infinite) {
  WanOptions options;
  options.context_frames = 12;
  options.sink_frames = 3;
  options.moves_sink = infinite;
  return options;
}

WanOptions rolling_forcing_options() {
  WanOptions options;
  options.steps = {1000, 800, 600, 400, 200};
  options.context_frames = 21;
  options.sink_frames = 3;
  options.moves_sink = true;
  return options;
}

NoiseSource noise_of_seed(uint64_t seed) {
  return [seed](const NoiseDraw& draw, View out) {
    const int64_t frames = out.dim(0);
    for (int64_t f = 0; f < frames; ++f) {
      const View frame = out.rows(f, f + 1);
      fill_normal(seed, static_cast<uint32_t>(draw.first_frame + f),
                  static_cast<uint32_t>(draw.step), frame.data<float>(), frame.numel());
    }
  };
}

WanRollout::WanRollout(Context& ctx, const wan::Transformer& transformer, View text,
                       const WanOptions& options, int64_t window_frames)
    : transformer_(transformer), options_(options), schedule_(options.shift) {
  expect(options.height >= wan::kPatch && options.width >= wan::kPatch &&
             options.height % wan::kPatch == 0 && options.width % wan::kPatch == 0,
         "latent size", str("multiples of ", wan::kPatch),
         str(options.height, " x ", options.width));
  expect(!options.steps.empty(), "steps", "at least 1", "none");
  expect(options.chunk_frames >= 1 && options.sink_frames >= 0 &&
             options.context_frames > options.sink_frames + options.chunk_frames,
         "context_frames", "more than sink and chunk together",
         str(options.context_frames, " for ", options.sink_frames, " + ", options.chunk_frames));
  timesteps_ = schedule_.warp(options.steps);
  for (const float t : timesteps_) levels_.push_back(transformer.level(ctx, t));
  levels_.push_back(transformer.level(ctx, 0));
  layers_.resize(static_cast<size_t>(transformer.config().num_layers));
  CacheOptions cache = cache_options(transformer.config(), options, window_frames);
  clock_ = Tensor::zeros(ctx.device(), DType::kI64, {1});
  cache.clock = clock_;
  cache.chunk_frames = options.chunk_frames;
  for (LayerState& layer : layers_) layer.memory.cache = make_cache(ctx, cache);
  transformer.set_text(ctx, text, layers_);
}

std::span<const wan::Level* const> WanRollout::all_of(const wan::Level& level, int64_t count) {
  frame_levels_.assign(static_cast<size_t>(count), &level);
  return frame_levels_;
}

wan::Pass WanRollout::pass(Context& ctx, int64_t first_frame,
                           std::span<const wan::Level* const> levels) {
  const int64_t rows = options_.height / wan::kPatch;
  const int64_t columns = options_.width / wan::kPatch;
  const auto num_frames = static_cast<int64_t>(levels.size());
  auto [rope, is_new] = ropes_.try_emplace(num_frames);
  if (is_new) rope->second = transformer_.make_rope(ctx, num_frames * rows * columns);
  set_clock(ctx, clock_, first_frame);
  transformer_.set_rope(ctx, clock_, rows, columns, rope->second);
  wan::Pass pass{.levels = levels, .rope = rope->second, .layers = layers_, .reading = {}};
  pass.observer = observer_;
  if (options_.moves_sink) {
    pass.reading.sink = HistoryReading::Sink::kBeforeWindow;
    pass.reading.next_frame = first_frame;
    pass.reading.time_pairs = transformer_.config().time_pairs();
    pass.reading.time_theta = wan::kTheta;
  }
  return pass;
}

ChunkRollout::ChunkRollout(Context& ctx, const wan::Transformer& transformer, View text,
                           const WanOptions& options)
    : WanRollout(ctx, transformer, text, options,
                 options.context_frames - options.sink_frames - options.chunk_frames) {
  const auto frames = [&](int64_t count) {
    return Tensor(ctx.device(), DType::kF32,
                  {count, transformer.config().out_channels, options.height, options.width});
  };
  flow_ = frames(options.chunk_frames);
  noise_ = frames(options.chunk_frames);
  recent_ = frames(options.context_frames);
}

void ChunkRollout::next_chunk(Context& ctx, const NoiseSource& noise, View latents) {
  noise({next_frame_, 0}, latents);
  for (int64_t step = 0; step < num_steps(); ++step) {
    const auto at = static_cast<size_t>(step);
    const auto levels = all_of(levels_[at], options_.chunk_frames);
    transformer_.flow(ctx, latents, pass(ctx, next_frame_, levels), flow_);
    schedule_.to_clean(timesteps_[at], latents, flow_, latents);
    if (step + 1 == num_steps()) break;
    noise({next_frame_, step + 1}, noise_);
    schedule_.add_noise(timesteps_[at + 1], latents, noise_, latents);
  }
  remember(ctx, latents);
}

void ChunkRollout::remember(Context& ctx, View latents) {
  for (int64_t begin = 0; begin < latents.dim(0); begin += options_.chunk_frames) {
    const int64_t end = std::min(begin + options_.chunk_frames, latents.dim(0));
    const auto clean = all_of(levels_.back(), end - begin);
    transformer_.commit(ctx, latents.rows(begin, end), pass(ctx, next_frame_, clean),
                        {next_frame_, end - begin});
    next_frame_ += end - begin;
    keep_recent(latents.rows(begin, end));
  }
}

View ChunkRollout::recent() const {
  return recent_.view().rows(0, num_recent_);
}

void ChunkRollout::keep_recent(View latents) {
  const int64_t capacity = recent_.dim(0);
  const int64_t kept = std::min(num_recent_, capacity - latents.dim(0));
  copy(recent_.view().rows(num_recent_ - kept, num_recent_), recent_.view().rows(0, kept));
  num_recent_ = kept + latents.dim(0);
  copy(latents, recent_.view().rows(kept, num_recent_));
}

void ChunkRollout::switch_prompt(Context& ctx, View text) {
  transformer_.set_text(ctx, text, layers_);
  if (num_recent_ == 0) return;
  const int64_t first_frame = next_frame_ - num_recent_;
  // The sink stays as the old prompt made it, and takes the place of as many frames of the newest.
  const int64_t unread =
      options_.keeps_sink && first_frame > 0 ? std::min(options_.sink_frames, num_recent_) : 0;
  for (LayerState& layer : layers_) {
    if (unread > 0)
      layer.memory.cache->forget_window();
    else
      layer.memory.cache->reset();
  }
  const auto clean = all_of(levels_.back(), num_recent_);
  wan::Pass again = pass(ctx, first_frame, clean);
  again.unread_frames = unread;
  again.reading.next_frame = first_frame + unread;
  transformer_.commit(ctx, recent(), again, {first_frame + unread, num_recent_ - unread});
}

RollingRollout::RollingRollout(Context& ctx, const wan::Transformer& transformer, View text,
                               const WanOptions& options, int64_t num_chunks)
    // The pass over a finished chunk may read as much window as fits beside it without the sink.
    : WanRollout(ctx, transformer, text, options, options.context_frames - options.chunk_frames),
      num_chunks_(num_chunks) {
  expect(num_chunks == 0 || num_chunks >= num_steps(), "length",
         str("at least ", num_steps(), " chunks"), std::to_string(num_chunks));
  const int64_t in_work = num_steps() * options.chunk_frames;
  expect(options.context_frames >= in_work + options.sink_frames, "context_frames",
         str("at least ", in_work, " in work and the sink"),
         std::to_string(options.context_frames));
  const auto frames = [&](int64_t count) {
    return Tensor(ctx.device(), DType::kF32,
                  {count, transformer.config().out_channels, options.height, options.width});
  };
  noisy_ = frames(in_work);
  clean_ = frames(in_work);
  flow_ = frames(in_work);
  noise_ = frames(options.chunk_frames);
}

void RollingRollout::next_chunk(Context& ctx, const NoiseSource& noise, View latents) {
  LONGTAKE_CHECK(num_chunks_ == 0 || next_frame_ < num_chunks_ * options_.chunk_frames);
  // A chunk is finished by the pass that is its last step.
  for (const int64_t last = next_frame_ / options_.chunk_frames + num_steps() - 1; window_ <= last;)
    run_window(ctx, noise);
  copy(chunk(clean_, 0), latents);
  remember_first(ctx, latents);
}

void RollingRollout::run_window(Context& ctx, const NoiseSource& noise) {
  const int64_t first = next_frame_ / options_.chunk_frames;
  const int64_t newest = num_chunks_ == 0 ? window_ : std::min(window_, num_chunks_ - 1);
  const int64_t count = newest - first + 1;
  const auto step_of = [&](int64_t index) { return window_ - first - index; };
  if (newest == window_) noise({newest * options_.chunk_frames, 0}, chunk(noisy_, count - 1));

  frame_levels_.clear();
  for (int64_t i = 0; i < count; ++i)
    frame_levels_.insert(frame_levels_.end(), static_cast<size_t>(options_.chunk_frames),
                         &levels_[static_cast<size_t>(step_of(i))]);
  wan::Pass all = pass(ctx, next_frame_, frame_levels_);
  const int64_t num_frames = count * options_.chunk_frames;
  all.reading.window_frames = options_.context_frames - num_frames - options_.sink_frames;
  transformer_.flow(ctx, noisy_.view().rows(0, num_frames), all, flow_.view().rows(0, num_frames));

  for (int64_t i = 0; i < count; ++i) {
    const int64_t step = step_of(i);
    schedule_.to_clean(timesteps_[static_cast<size_t>(step)], chunk(noisy_, i), chunk(flow_, i),
                       chunk(clean_, i));
    if (step + 1 == num_steps()) continue;
    noise({(first + i) * options_.chunk_frames, step + 1}, noise_);
    schedule_.add_noise(timesteps_[static_cast<size_t>(step) + 1], chunk(clean_, i), noise_,
                        chunk(noisy_, i));
  }
  ++window_;
}

void RollingRollout::remember_first(Context& ctx, View latents) {
  const auto clean = all_of(levels_.back(), options_.chunk_frames);
  wan::Pass alone = pass(ctx, next_frame_, clean);
  // As many frames as fit; the sink is read in its own place while they reach back to it.
  const int64_t history = options_.context_frames - options_.chunk_frames;
  alone.reading.sink =
      next_frame_ <= history ? HistoryReading::Sink::kInPlace : HistoryReading::Sink::kHidden;
  alone.reading.window_frames = history;
  transformer_.commit(ctx, latents, alone, {next_frame_, options_.chunk_frames});
  next_frame_ += options_.chunk_frames;
  // The chunks still in work move up.
  const int64_t all = num_steps() * options_.chunk_frames;
  copy(noisy_.view().rows(options_.chunk_frames, all),
       noisy_.view().rows(0, all - options_.chunk_frames));
}

}  // namespace longtake
