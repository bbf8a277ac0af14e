#include "pipeline/rollout.h"

#include <algorithm>
#include <memory>
#include <utility>

#include "ops/clock.h"
#include "ops/elementwise.h"
#include "ops/noise.h"
#include "pipeline/schedule.h"
#include "pipeline/selection.h"

namespace longtake {
namespace {

// A GPU reads so many keys a head faster than it chooses among them (docs/performance.md).
constexpr int64_t kFewKeys = 4096;

bool reads_all(const Context& ctx, const CacheOptions& memory) {
  const int64_t budget = memory.tempcache.budget_tokens;
  return ctx.device().kind == DeviceKind::kCuda && memory.memory == "tempcache" && budget > 0 &&
         budget <= kFewKeys;
}

}  // namespace

Rollout::Rollout(Context& ctx, const world::Model& model, View text, const Method& method,
                 int64_t expected_frames)
    : model_(model), place_(model.transformer.make_place(ctx)) {
  const auto& sampler = model.config.sampler;
  const auto& sizes = model.config.transformer;
  const int64_t steps = method.num_steps > 0 ? method.num_steps : sampler.num_steps;
  usual_ = make_schedule(ctx, steps, sampler.shift);
  first_ = make_schedule(ctx, std::max(steps, sampler.first_steps), sampler.first_shift);
  clock_ = Tensor::zeros(ctx.device(), DType::kI64, {1});
  CacheOptions memory = cache_options(method, sizes, model.compute, expected_frames);
  memory.clock = clock_;
  memory.batch = make_commit_batch(ctx);
  reads_all_ = reads_all(ctx, memory);
  memory.page_summaries = method.sparse_self && !reads_all_;
  layers_.resize(static_cast<size_t>(sizes.num_layers));
  for (size_t n = 0; n < layers_.size(); ++n) {
    memory.layer = static_cast<int64_t>(n);
    layers_[n].memory.cache = make_cache(ctx, memory);
  }
  set_selection(ctx, method);
  if (method.step_cache.reuse != StepReuse::kNone)
    step_cache_ =
        std::make_unique<StepCache>(ctx, method.step_cache, Shape{sizes.frame_tokens(), sizes.dim});
  const Shape latent{sizes.latent_channels, sizes.latent_height, sizes.latent_width};
  velocity_ = Tensor(ctx.device(), DType::kF32, latent);
  noise_ = Tensor(ctx.device(), DType::kF32, latent);
  set_text(ctx, text);
}

Rollout::Schedule Rollout::make_schedule(Context& ctx, int64_t num_steps, double shift) const {
  Schedule out;
  out.noise_levels = noise_levels(num_steps, shift);
  for (const double t : out.noise_levels) out.levels.push_back(model_.transformer.level(ctx, t));
  return out;
}

void Rollout::set_selection(Context& ctx, const Method& method) {
  const auto& sizes = model_.config.transformer;
  method_ = method;
  method_.num_steps = num_steps();
  method_ = name_dense_parts(method_, sizes.num_layers);
  Method selecting = method_;
  selecting.sparse_self &= !reads_all_;
  longtake::set_selection(ctx, selecting, sizes, layers_);
}

void Rollout::measure_steps(Context& ctx, int64_t num_steps, world::LayerReuse* reuse) {
  usual_ = make_schedule(ctx, num_steps, model_.config.sampler.shift);
  measured_ = reuse;
}

bool Rollout::is_sparse(int64_t step) const {
  // Where a frame has more steps than the method speaks of, each does as its share of them does.
  return step < frame_steps() && is_sparse_step(method_, step * num_steps() / frame_steps());
}

int64_t Rollout::last_sparse_step() const {
  for (int64_t step = frame_steps() - 1; step >= 0; --step) {
    if (is_sparse(step)) return step;
  }
  return frame_steps() - 1;
}

void Rollout::set_text(Context& ctx, View text) {
  model_.transformer.set_text(ctx, text, layers_);
}

bool Rollout::begin_frame(Context& ctx, int64_t frame, int64_t x, int64_t y) {
  const auto pixels = static_cast<double>(model_.config.transformer.token_pixels());
  frame_ = frame;
  set_clock(ctx, clock_, frame);
  const bool has_history = layers_.front().memory.cache->entries() > 0;
  schedule_ = has_history ? &usual_ : &first_;
  if (step_cache_) step_cache_->begin_chunk(frame_steps());
  bool moved = false;
  for (LayerState& layer : layers_) moved |= layer.memory.cache->prepare_chunk(ctx);
  model_.transformer.set_place(ctx, static_cast<double>(x) / pixels,
                               static_cast<double>(y) / pixels, frame, place_);
  return moved;
}

void Rollout::denoise(Context& ctx, uint64_t seed, View z, PassObserver* observer) {
  dense_steps_run_ = sparse_steps_run_ = 0;
  fill_normal(ctx, seed, clock_, 0, z);
  for (int64_t step = 0; step < frame_steps(); ++step) {
    velocity(ctx, step, z, velocity_, observer);
    const double t = schedule_->noise_levels[static_cast<size_t>(step)];
    const double next = schedule_->noise_levels[static_cast<size_t>(step) + 1];
    if (model_.config.sampler.type == world::SamplerType::kOde || step + 1 == frame_steps()) {
      axpby(ctx, 1, z, static_cast<float>(next - t), velocity_, z);
      continue;
    }
    // Clean estimate z - t v, noised afresh to the next level.
    fill_normal(ctx, seed, clock_, static_cast<uint32_t>(step + 1), noise_);
    axpby(ctx, 1, z, static_cast<float>(-t), velocity_, z);
    axpby(ctx, static_cast<float>(1 - next), z, static_cast<float>(next), noise_, z);
  }
}

void Rollout::velocity(Context& ctx, int64_t step, View z, View out, PassObserver* observer) {
  model_.transformer.velocity(ctx, z, pass(step, observer), out);
  if (!step_cache_ || step_cache_->ran())
    ++(is_sparse(step) ? sparse_steps_run_ : dense_steps_run_);
}

void Rollout::remember(Context& ctx, View z, PassObserver* observer) {
  model_.transformer.commit(ctx, z, pass(frame_steps(), observer), {frame_, 1});
  // All layers in one set of launches.
  for (LayerState& layer : layers_) layer.memory.cache->join_commits();
}

world::Pass Rollout::pass(int64_t step, PassObserver* observer) {
  step_ = step;
  // The clean pass reads all; the first sparse step chooses of the prompt for those behind it.
  const bool sparse = is_sparse(step);
  const PromptReading prompt = !sparse                  ? PromptReading::kAll
                               : sparse_steps_run_ == 0 ? PromptReading::kChoose
                                                        : PromptReading::kChosen;
  return {schedule_->levels[static_cast<size_t>(step)],         place_,  layers_, sparse, prompt,
          measured_ != nullptr ? measured_ : step_cache_.get(), observer};
}

std::vector<std::unique_ptr<KvCache>> Rollout::take_caches() {
  std::vector<std::unique_ptr<KvCache>> caches;
  for (LayerState& layer : layers_) caches.push_back(std::move(layer.memory.cache));
  return caches;
}

double Rollout::density() const {
  const auto& sizes = model_.config.transformer;
  const auto own = static_cast<double>(sizes.frame_tokens());
  const double dense = own * static_cast<double>(frame_ + 1);
  double attended = 0;
  for (const LayerState& layer : layers_) {
    const double held = own + static_cast<double>(layer.memory.cache->total_entries()) /
                                  static_cast<double>(sizes.num_heads);
    const double kept = layer.memory.selector ? layer.memory.selector->density() : 1;
    attended += held * (static_cast<double>(dense_steps_run_) +
                        static_cast<double>(sparse_steps_run_) * kept);
  }
  return attended /
         (dense * static_cast<double>(layers_.size()) * static_cast<double>(frame_steps()));
}

}  // namespace longtake
