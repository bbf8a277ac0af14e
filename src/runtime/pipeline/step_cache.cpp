#include "pipeline/step_cache.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "ops/copy.h"

namespace longtake {

StepCache::StepCache(Context& ctx, const StepCacheOptions& options, const Shape& stream)
    : options_(options), residual_(ctx.device(), DType::kF32, stream) {
  LONGTAKE_CHECK(options.reuse != StepReuse::kNone);
}

void StepCache::begin_chunk(int64_t num_steps) {
  step_ = 0;
  num_steps_ = num_steps;
  change_ = 0;
}

bool StepCache::must_run(Context& ctx, View time, View x) {
  const View watched = options_.reuse == StepReuse::kTeaCache ? time : x;
  if (!(now_.shape() == watched.shape()))
    now_ = Tensor::staging(ctx.device(), DType::kF32, watched.shape());
  copy(ctx, watched, now_);
  const auto* values = now_.data<float>();
  const bool forced = step_ == 0 || step_ + 1 >= num_steps_;
  if (!forced) change_ += relative_change(values, previous_.data(), now_.numel());
  previous_.assign(values, values + now_.numel());
  ++step_;
  ran_ = forced || change_ >= options_.threshold;
  if (ran_) change_ = 0;
  return ran_;
}

double relative_change(const float* now, const float* before, int64_t count) {
  constexpr double kLeast = 1e-8;  // a chunk of zeros changes without bound, not by NaN
  double change = 0, size = 0;
  for (int64_t i = 0; i < count; ++i) {
    change += std::abs(double{now[i]} - double{before[i]});
    size += std::abs(double{before[i]});
  }
  return change / std::max(size, kLeast * static_cast<double>(count));
}

}  // namespace longtake
