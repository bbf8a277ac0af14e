#include "pipeline/wan_rollout.h"

#include <algorithm>
#include <array>
#include <limits>
#include <memory>
#include <utility>

#include "attention/select.h"
#include "base/error.h"
#include "kv/page.h"
#include "ops/clock.h"
#include "ops/copy.h"
#include "ops/noise.h"
#include "pipeline/selection.h"
#include "pipeline/stats.h"

namespace longtake {
namespace {

// The rows from `first` on, `count` of them, become the first ones: one by one, since they overlap.
void move_to_front(Context& ctx, View rows, int64_t first, int64_t count) {
  if (first == 0) return;
  for (int64_t i = 0; i < count; ++i)
    copy(ctx, rows.rows(first + i, first + i + 1), rows.rows(i, i + 1));
}

void expect(bool ok, const char* what, const std::string& expected, const std::string& found) {
  if (!ok) throw Error(ErrorKind::kUsage, str(what, ": expected ", expected, ", found ", found));
}

// Nominal timesteps of `count` steps, evenly spread: those of every released model.
std::vector<int64_t> even_steps(int64_t count) {
  std::vector<int64_t> steps;
  for (int64_t left = count; left > 0; --left) steps.push_back(wan::kTrainSteps * left / count);
  return steps;
}

// The frames that a pass over a chunk of a chunk rollout reads beside the sink and itself; a
// rolling one remembers as many as fit beside the chunk alone, when the sink is not read.
int64_t frames_behind_sink(const WanOptions& options) {
  return options.context_frames - options.chunk_frames -
         (options.is_rolling ? 0 : options.sink_frames);
}

// Rows of zeros at the end of an encoded prompt: they become equal keys.
int64_t count_padding(Context& ctx, View text) {
  const Tensor host({}, DType::kF32, text.shape());
  copy(ctx, text, host);
  ctx.synchronize();
  const int64_t width = text.dim(1);
  const float* end = host.data<float>() + text.numel();
  int64_t rows = 0;
  while (rows < text.dim(0) && std::all_of(end - (rows + 1) * width, end - rows * width,
                                           [](float x) { return x == 0.0F; }))
    ++rows;
  return rows;
}

// What a method leaves open is the model's, what it says counts.
WanOptions resolved(WanOptions options, const wan::TransformerConfig& config) {
  if (!options.method) options.method = own_method(options);
  Method& method = *options.method;
  if (method.num_steps == 0)
    method.num_steps = static_cast<int64_t>(options.steps.size());
  else if (method.num_steps != static_cast<int64_t>(options.steps.size()))
    options.steps = even_steps(method.num_steps);
  const std::string& memory = method.memory.memory;
  expect(!options.moves_sink || memory == "window" || memory == "tempcache", "memory",
         "window or tempcache, which keep apart the sink that this model moves", memory);
  expect(method.step_cache.reuse == StepReuse::kNone, "step-cache",
         "none with a model of the Wan family", method.get("step-cache"));
  if (options.is_rolling) {
    expect(!method.dense_steps || method.dense_steps->empty(), "dense-steps",
           "auto or none with a model that has all steps in one pass", method.get("dense-steps"));
    method.dense_steps.emplace();
  }
  const CacheOptions cache =
      cache_options(method, model_sizes(options, config), options.dtype, options.expected_frames);
  const bool has_sink = memory == "window" || memory == "tempcache";
  options.sink_frames = has_sink ? cache.sink_frames : 0;
  if (memory == "window")
    options.context_frames =
        cache.window_frames + options.chunk_frames + (options.is_rolling ? 0 : options.sink_frames);
  method = name_dense_parts(method, config.num_layers);
  const int64_t in_work = options.chunk_frames * static_cast<int64_t>(options.steps.size());
  const int64_t least = in_work + options.sink_frames;
  expect(!options.is_rolling || options.context_frames >= least, "window-frames",
         str("at least ", least + options.sink_frames - options.chunk_frames,
             ", so that all in work and the sink fit what the model reads"),
         std::to_string(options.sink_frames + frames_behind_sink(options)));
  return options;
}

// A budget below what the policy needs, or a policy or selection that the device does not have,
// shows when they are made: for a single head.
void try_method(Context& ctx, const WanOptions& options, const wan::TransformerConfig& config) {
  const Method& method = *options.method;
  CacheOptions cache = cache_options(method, model_sizes(options, config), options.dtype, 0);
  cache.num_heads = 1;
  cache.chunk_frames = options.chunk_frames;
  const Tensor clock = Tensor::zeros(ctx.device(), DType::kI64, {1});
  cache.clock = clock;
  make_cache(ctx, cache);
  if (method.sparse_self) make_page_selector(ctx, 1, config.head_dim(), method.select);
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
  options.recaches = true;
  return options;
}

WanOptions rolling_forcing_options() {
  WanOptions options;
  options.steps = {1000, 800, 600, 400, 200};
  options.is_rolling = true;
  options.context_frames = 21;
  options.sink_frames = 3;
  options.moves_sink = true;
  return options;
}

WanOptions matrix_game_options(int64_t context_frames) {
  WanOptions options;
  options.steps = {1000, 666, 333};
  options.context_frames = context_frames;
  options.height = 44;
  options.width = 80;
  return options;
}

WanOptions options_of_family(const std::string& family) {
  if (family == "self-forcing" || family == "causal-forcing") return self_forcing_options();
  if (family == "causal-forcing-framewise") {
    WanOptions options = self_forcing_options();
    options.chunk_frames = 1;
    return options;
  }
  if (family == "longlive") return longlive_options(/*infinite=*/false);
  if (family == "longlive-infinite") return longlive_options(/*infinite=*/true);
  if (family == "rolling-forcing") return rolling_forcing_options();
  if (family == "matrix-game-2") return matrix_game_options(/*context_frames=*/6);
  if (family == "matrix-game-2-drive") return matrix_game_options(/*context_frames=*/4);
  if (family == "matrix-game-2-run") {
    WanOptions options = matrix_game_options(/*context_frames=*/6);
    options.steps = {1000, 750, 500, 250};
    return options;
  }
  throw Error(ErrorKind::kUsage,
              str("rollout: expected self-forcing, causal-forcing, causal-forcing-framewise, "
                  "longlive, longlive-infinite, rolling-forcing, matrix-game-2, "
                  "matrix-game-2-drive or matrix-game-2-run, found \"",
                  family, '"'));
}

Method own_method(const WanOptions& options) {
  Method method;
  method.memory.memory = "window";
  method.memory.sink_frames = options.sink_frames;
  method.memory.tempcache.exact_frames = options.chunk_frames;
  method.window_frames = options.sink_frames + frames_behind_sink(options);
  return method;
}

Method choose_method(Context& ctx, const WanOptions& options, const wan::TransformerConfig& config,
                     const std::string& preset, const MethodSettings& settings) {
  const Method own = own_method(options);
  Method method = make_method(preset, settings, own);
  const bool has_budget = std::any_of(settings.begin(), settings.end(), [](const auto& setting) {
    return setting.first == "memory-budget";
  });
  const std::string& memory = method.memory.memory;
  if (!has_budget && (memory == "tempcache" || memory == "flowcache"))
    // Twice a chunk at least, of which one is kept exactly.
    method.budget = {static_cast<double>(std::max(own.window_frames, 2 * options.chunk_frames) *
                                         model_sizes(options, config).frame_tokens),
                     /*is_bytes=*/false};
  WanOptions with = options;
  with.method = method;
  try_method(ctx, resolved(with, config), config);
  return method;
}

ModelSizes model_sizes(const WanOptions& options, const wan::TransformerConfig& config) {
  ModelSizes sizes;
  sizes.num_layers = config.num_layers;
  sizes.num_heads = config.num_heads;
  sizes.head_dim = config.head_dim();
  sizes.frame_tokens = options.height / wan::kPatch * (options.width / wan::kPatch);
  sizes.rope_time_pairs = config.time_pairs();
  sizes.rope_time_theta = wan::kTheta;
  return sizes;
}

NoiseSource noise_of_seed(Context& ctx, uint64_t seed) {
  // A clock that stands at frame 0: every draw says its own frame.
  const auto clock = std::make_shared<const Tensor>(Tensor::zeros(ctx.device(), DType::kI64, {1}));
  return [&ctx, seed, clock](const NoiseDraw& draw, View out) {
    fill_normal(ctx, seed, *clock, static_cast<uint32_t>(draw.step), out, draw.first_frame,
                out.dim(0));
  };
}

WanRollout::WanRollout(Context& ctx, const wan::Transformer& transformer, View text,
                       const WanOptions& options)
    : transformer_(transformer), options_(options), schedule_(options.shift), clean_clock_(ctx, 2) {
  expect(options.height >= wan::kPatch && options.width >= wan::kPatch &&
             options.height % wan::kPatch == 0 && options.width % wan::kPatch == 0,
         "latent size", str("multiples of ", wan::kPatch),
         str(options.height, " x ", options.width));
  expect(!options.steps.empty(), "steps", "at least 1", "none");
  expect(options.chunk_frames >= 1 && options.sink_frames >= 0 &&
             options.context_frames > options.sink_frames + options.chunk_frames,
         "context_frames", "more than sink and chunk together",
         str(options.context_frames, " for ", options.sink_frames, " + ", options.chunk_frames));
  options_ = resolved(options, transformer.config());
  timesteps_ = schedule_.warp(options_.steps);
  for (const float t : timesteps_) levels_.push_back(transformer.level(ctx, t));
  levels_.push_back(transformer.level(ctx, 0));
  const ModelSizes sizes = model_sizes(options_, transformer.config());
  CacheOptions cache = cache_options(method(), sizes, options_.dtype, options_.expected_frames);
  clock_ = Tensor::zeros(ctx.device(), DType::kI64, {1});
  cache.clock = clock_;
  cache.chunk_frames = options_.chunk_frames;
  cache.batch = make_commit_batch(ctx);
  cache.page_summaries = method().sparse_self;
  cache.reads_whole = !options_.moves_sink && !options_.is_rolling;
  const int64_t frame_pages = (sizes.frame_tokens + kPageTokens - 1) / kPageTokens;
  layers_.resize(static_cast<size_t>(sizes.num_layers));
  for (LayerState& layer : layers_) {
    cache.layer = &layer - layers_.data();
    layer.memory.cache = make_cache(ctx, cache);
    layer.memory.first_pages = std::max<int64_t>(1, options_.sink_frames) * frame_pages;
    layer.memory.newest_pages = frame_pages;
  }
  set_selection(ctx, method(), sizes, layers_);
  set_text(ctx, text);
  // What the modules remember is the model's own, whatever the method.
  if (transformer.config().actions.num_layers > 0)
    controls_ = wan::make_controls(
        ctx, transformer.config(), options_.dtype, clock_, options.chunk_frames,
        options.context_frames - options.chunk_frames, options.height, options.width);
}

void WanRollout::set_text(Context& ctx, View text) {
  const Workspace::Scope scope(ctx.workspace());
  // What chooses of the prompt or counts for its tokens knows them one by one.
  const bool apart = std::any_of(layers_.begin(), layers_.end(), [](const LayerState& layer) {
    return layer.prompt.selector != nullptr || layer.prompt.buckets != nullptr;
  });
  const int64_t padding = apart ? 1 : std::max<int64_t>(1, count_padding(ctx, text));
  const View read = text.rows(0, text.dim(0) - padding + 1);
  const View here = ctx.workspace().take(DType::kF32, read.shape());
  copy(ctx, read, here);
  transformer_.set_text(ctx, here, layers_, padding);
  forget_recordings(ctx);
}

void WanRollout::prepare(Context& ctx, int64_t num_frames) {
  bool moved = false;
  for (LayerState& layer : layers_) moved |= layer.memory.cache->prepare_frames(ctx, num_frames);
  if (moved) forget_recordings(ctx);
}

void WanRollout::remember_keys(Context& ctx, View q, View k, View v) {
  const int64_t num_frames = q.dim(0) / model_sizes(options_, transformer_.config()).frame_tokens;
  const ChunkPosition position{next_frame_, num_frames};
  prepare(ctx, num_frames);
  set_clock(ctx, clock_, next_frame_);
  for (LayerState& layer : layers_) layer.memory.cache->commit_chunk(ctx, q, k, v, position);
  for (LayerState& layer : layers_) layer.memory.cache->join_commits();
  next_frame_ += num_frames;
}

void WanRollout::expect_finite() const {
  for (const LayerState& layer : layers_) layer.memory.cache->expect_finite();
}

int64_t WanRollout::history_frames() const {
  return frames_behind_sink(options_);
}

void WanRollout::run(Context& ctx, bool commits, const wan::Pass& pass,
                     const std::function<void()>& steps) {
  // An observer looks at every pass, and a pass without a history is one of its own.
  if (observer_ != nullptr || next_frame_ == 0) {
    steps();
  } else {
    const PassKind kind{commits, static_cast<int64_t>(pass.levels.size()), pass.levels.front(),
                        pass.reading.sink, pass.reading.window_frames};
    recordings_[kind].run(ctx, steps);
  }
  // The first pass that has more frames in work, or moves the sink, makes room for them.
  if (count_moves() != num_moves_) forget_recordings(ctx);
}

void WanRollout::forget_recordings(Context& ctx) {
  if (!recordings_.empty()) ctx.synchronize();  // one may be running
  recordings_.clear();
  num_moves_ = count_moves();
}

size_t WanRollout::count_moves() const {
  size_t count = 0;
  for (const LayerState& layer : layers_) count += layer.memory.cache->num_growths();
  return count;
}

void WanRollout::sample(Context& ctx, View x, const wan::Pass& pass, int64_t first_frame,
                        View out) {
  run(ctx, /*commits=*/false, pass, [&] { transformer_.flow(ctx, x, pass, out); });
  const int64_t frame_tokens = model_sizes(options_, transformer_.config()).frame_tokens;
  const auto own = static_cast<double>(x.dim(0) * frame_tokens);
  // A window may be read in part; other policies decide themselves.
  double most = std::numeric_limits<double>::infinity();
  if (method().memory.memory == "window" && options_.moves_sink)
    most = static_cast<double>((options_.sink_frames + pass.reading.window_frames) * frame_tokens);
  for (const LayerState& layer : layers_) {
    const double history = static_cast<double>(layer.memory.cache->total_entries()) /
                           static_cast<double>(transformer_.config().num_heads);
    const bool selects = pass.sparse && layer.memory.selector != nullptr;
    pairs_read_ +=
        own * (own + std::min(history, most)) * (selects ? layer.memory.selector->density() : 1);
    pairs_there_ += own * static_cast<double>((first_frame + x.dim(0)) * frame_tokens);
  }
}

void WanRollout::commit(Context& ctx, View x, const wan::Pass& pass, ChunkPosition position) {
  clean_clock_.mark(0);
  run(ctx, /*commits=*/true, pass, [&] {
    transformer_.commit(ctx, x, pass, position);
    // All layers in one set of launches.
    for (LayerState& layer : layers_) layer.memory.cache->join_commits();
  });
  clean_clock_.mark(1);
}

double WanRollout::take_density() {
  const double there = std::exchange(pairs_there_, 0);
  const double read = std::exchange(pairs_read_, 0);
  return there > 0 ? read / there : 1;
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
  if (controls_) {
    wan::set_rope(ctx, *controls_);
    pass.controls = &*controls_;
  }
  if (options_.moves_sink) {
    pass.reading.sink = HistoryReading::Sink::kBeforeWindow;
    pass.reading.next_frame = first_frame;
    pass.reading.window_frames = history_frames();
    pass.reading.time_pairs = transformer_.config().time_pairs();
    pass.reading.time_theta = wan::kTheta;
  }
  return pass;
}

ChunkRollout::ChunkRollout(Context& ctx, const wan::Transformer& transformer, View text,
                           const WanOptions& options)
    : WanRollout(ctx, transformer, text, options) {
  const auto frames = [&](int64_t count) {
    return Tensor(ctx.device(), DType::kF32,
                  {count, transformer.config().out_channels, options_.height, options_.width});
  };
  chunk_ = frames(options_.chunk_frames);
  flow_ = frames(options_.chunk_frames);
  noise_ = frames(options_.chunk_frames);
  if (options_.recaches) recent_ = frames(options_.context_frames);
}

void ChunkRollout::next_chunk(Context& ctx, const NoiseSource& noise, View latents) {
  prepare(ctx, options_.chunk_frames);
  noise({next_frame_, 0}, chunk_);
  bool has_chosen = false;
  for (int64_t step = 0; step < num_steps(); ++step) {
    const auto at = static_cast<size_t>(step);
    wan::Pass noisy = pass(ctx, next_frame_, all_of(levels_[at], options_.chunk_frames));
    noisy.sparse = is_sparse_step(method(), step);
    // The first sparse step chooses of the prompt for those behind it.
    if (noisy.sparse)
      noisy.prompt =
          std::exchange(has_chosen, true) ? PromptReading::kChosen : PromptReading::kChoose;
    sample(ctx, chunk_, noisy, next_frame_, flow_);
    schedule_.to_clean(ctx, timesteps_[at], chunk_, flow_, chunk_);
    if (step + 1 == num_steps()) break;
    noise({next_frame_, step + 1}, noise_);
    schedule_.add_noise(ctx, timesteps_[at + 1], chunk_, noise_, chunk_);
  }
  copy(ctx, chunk_, latents);
  remember_chunk(ctx, options_.chunk_frames);
}

void ChunkRollout::remember(Context& ctx, View latents) {
  for (int64_t begin = 0; begin < latents.dim(0); begin += options_.chunk_frames) {
    const int64_t end = std::min(begin + options_.chunk_frames, latents.dim(0));
    prepare(ctx, end - begin);
    copy(ctx, latents.rows(begin, end), chunk_.view().rows(0, end - begin));
    remember_chunk(ctx, end - begin);
  }
}

void ChunkRollout::remember_chunk(Context& ctx, int64_t num_frames) {
  const View latents = chunk_.view().rows(0, num_frames);
  const auto clean = all_of(levels_.back(), num_frames);
  commit(ctx, latents, pass(ctx, next_frame_, clean), {next_frame_, num_frames});
  next_frame_ += num_frames;
  if (options_.recaches) keep_recent(ctx, latents);
}

View ChunkRollout::recent() const {
  return recent_.view().rows(0, num_recent_);
}

void ChunkRollout::keep_recent(Context& ctx, View latents) {
  const int64_t capacity = recent_.dim(0);
  const int64_t kept = std::min(num_recent_, capacity - latents.dim(0));
  move_to_front(ctx, recent_, num_recent_ - kept, kept);
  num_recent_ = kept + latents.dim(0);
  copy(ctx, latents, recent_.view().rows(kept, num_recent_));
}

void ChunkRollout::switch_prompt(Context& ctx, View text) {
  set_text(ctx, text);
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
  prepare(ctx, num_recent_ - unread);
  const auto clean = all_of(levels_.back(), num_recent_);
  wan::Pass again = pass(ctx, first_frame, clean);
  again.unread_frames = unread;
  // To the caches the chunk in work begins where it is read.
  set_clock(ctx, clock_, first_frame + unread);
  again.reading.next_frame = first_frame + unread;
  commit(ctx, recent(), again, {first_frame + unread, num_recent_ - unread});
}

RollingRollout::RollingRollout(Context& ctx, const wan::Transformer& transformer, View text,
                               const WanOptions& options, int64_t num_chunks)
    : WanRollout(ctx, transformer, text, options), num_chunks_(num_chunks) {
  expect(num_chunks == 0 || num_chunks >= num_steps(), "length",
         str("at least ", num_steps(), " chunks"), std::to_string(num_chunks));
  const int64_t in_work = num_steps() * options_.chunk_frames;
  const auto frames = [&](int64_t count) {
    return Tensor(ctx.device(), DType::kF32,
                  {count, transformer.config().out_channels, options_.height, options_.width});
  };
  noisy_ = frames(in_work);
  clean_ = frames(in_work);
  flow_ = frames(in_work);
  noise_ = frames(options_.chunk_frames);
}

void RollingRollout::next_chunk(Context& ctx, const NoiseSource& noise, View latents) {
  LONGTAKE_CHECK(num_chunks_ == 0 || first_chunk() < num_chunks_);
  prepare(ctx, options_.chunk_frames);
  // A chunk is finished by the pass that is its last step.
  for (const int64_t last = first_chunk() + num_steps() - 1; window_ <= last;)
    run_window(ctx, noise);
  copy(ctx, chunk(clean_, 0), latents);
  remember_clean(ctx, options_.chunk_frames);
  // The chunks still in work move up.
  move_to_front(ctx, noisy_, options_.chunk_frames, (num_steps() - 1) * options_.chunk_frames);
}

void RollingRollout::remember(Context& ctx, View latents) {
  LONGTAKE_CHECK(window_ == 0, "chunks are in work");
  for (int64_t begin = 0; begin < latents.dim(0); begin += options_.chunk_frames) {
    const int64_t end = std::min(begin + options_.chunk_frames, latents.dim(0));
    prepare(ctx, end - begin);
    copy(ctx, latents.rows(begin, end), clean_.view().rows(0, end - begin));
    remember_clean(ctx, end - begin);
  }
  given_frames_ = next_frame_;
}

void RollingRollout::switch_prompt(Context& ctx, View text) {
  set_text(ctx, text);
}

void RollingRollout::run_window(Context& ctx, const NoiseSource& noise) {
  const int64_t first = first_chunk();
  const int64_t newest = num_chunks_ == 0 ? window_ : std::min(window_, num_chunks_ - 1);
  const int64_t count = newest - first + 1;
  const auto step_of = [&](int64_t index) { return window_ - first - index; };
  const auto first_frame_of = [&](int64_t index) {
    return next_frame_ + index * options_.chunk_frames;
  };
  if (newest == window_) noise({first_frame_of(count - 1), 0}, chunk(noisy_, count - 1));

  frame_levels_.clear();
  for (int64_t i = 0; i < count; ++i)
    frame_levels_.insert(frame_levels_.end(), static_cast<size_t>(options_.chunk_frames),
                         &levels_[static_cast<size_t>(step_of(i))]);
  wan::Pass all = pass(ctx, next_frame_, frame_levels_);
  const int64_t num_frames = count * options_.chunk_frames;
  all.reading.window_frames = options_.context_frames - num_frames - options_.sink_frames;
  all.sparse = is_sparse_step(method(), 0);
  if (all.sparse) all.prompt = PromptReading::kChoose;
  sample(ctx, noisy_.view().rows(0, num_frames), all, next_frame_,
         flow_.view().rows(0, num_frames));

  for (int64_t i = 0; i < count; ++i) {
    const int64_t step = step_of(i);
    schedule_.to_clean(ctx, timesteps_[static_cast<size_t>(step)], chunk(noisy_, i),
                       chunk(flow_, i), chunk(clean_, i));
    if (step + 1 == num_steps()) continue;
    noise({first_frame_of(i), step + 1}, noise_);
    schedule_.add_noise(ctx, timesteps_[static_cast<size_t>(step) + 1], chunk(clean_, i), noise_,
                        chunk(noisy_, i));
  }
  ++window_;
}

void RollingRollout::remember_clean(Context& ctx, int64_t num_frames) {
  const auto clean = all_of(levels_.back(), num_frames);
  wan::Pass alone = pass(ctx, next_frame_, clean);
  // As many frames as fit; the sink is read in its own place while they reach back to it.
  alone.reading.sink = next_frame_ <= history_frames() ? HistoryReading::Sink::kInPlace
                                                       : HistoryReading::Sink::kHidden;
  commit(ctx, clean_.view().rows(0, num_frames), alone, {next_frame_, num_frames});
  next_frame_ += num_frames;
}

}  // namespace longtake
