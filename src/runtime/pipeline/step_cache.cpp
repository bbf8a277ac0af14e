#include "pipeline/step_cache.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <set>
#include <utility>

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
  if (!forced) {
    const double change = relative_change(values, previous_.data(), now_.numel());
    const bool mapped = options_.polynomial && !options_.polynomial->empty();
    change_ += mapped ? change_at(*options_.polynomial, change) : change;
  }
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

double change_at(std::span<const double> coefficients, double x) {
  double out = 0;
  for (auto c = coefficients.rbegin(); c != coefficients.rend(); ++c) out = out * x + *c;
  return std::max(out, 0.0);
}

std::vector<double> fit_polynomial(std::span<const double> x, std::span<const double> y,
                                   int64_t degree) {
  LONGTAKE_CHECK(x.size() == y.size() && degree >= 0);
  const std::set<double> different(x.begin(), x.end());
  const size_t terms = std::min(static_cast<size_t>(degree) + 1, different.size());
  // Powers orthogonal to one another over the points (Gram-Schmidt): normal equations of plain ones
  // lose half of the digits.
  std::vector<std::vector<double>> values, powers;  // of each term: at the points, coefficients
  std::vector<double> out(terms, 0.0);
  for (size_t n = 0; n < terms; ++n) {
    std::vector<double> value(x.size(), 1.0), power(terms, 0.0);
    power[n] = 1;
    for (size_t i = 0; i < x.size(); ++i) value[i] = std::pow(x[i], static_cast<double>(n));
    const auto take_away = [&](size_t other) {
      const double share =
          std::inner_product(value.begin(), value.end(), values[other].begin(), 0.0);
      for (size_t i = 0; i < x.size(); ++i) value[i] -= share * values[other][i];
      for (size_t k = 0; k < terms; ++k) power[k] -= share * powers[other][k];
    };
    for (int pass = 0; pass < 2; ++pass) {
      for (size_t other = 0; other < n; ++other) take_away(other);
    }
    const double norm =
        std::sqrt(std::inner_product(value.begin(), value.end(), value.begin(), 0.0));
    for (double& v : value) v /= norm;
    for (double& p : power) p /= norm;
    const double share = std::inner_product(value.begin(), value.end(), y.begin(), 0.0);
    for (size_t k = 0; k < terms; ++k) out[k] += share * power[k];
    values.push_back(std::move(value));
    powers.push_back(std::move(power));
  }
  return out;
}

}  // namespace longtake
