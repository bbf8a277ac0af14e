#include "attention/match.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <numbers>

#include "ann/project.h"
#include "base/philox.h"
#include "device/dispatch.h"

namespace longtake {
namespace {

constexpr int64_t kSigns = 64;

// x [count, dim] as 8-bit integers with one scale a row, and back: what the 8-bit product sees.
void round_to_8_bits(float* x, int64_t count, int64_t dim) {
  constexpr float kLevels = 127;
  for (int64_t r = 0; r < count; ++r, x += dim) {
    float peak = 0;
    for (int64_t d = 0; d < dim; ++d) peak = std::max(peak, std::abs(x[d]));
    if (peak == 0) continue;
    const float scale = peak / kLevels;
    for (int64_t d = 0; d < dim; ++d) x[d] = scale * std::nearbyint(x[d] / scale);
  }
}

float length(const float* x, int64_t dim) {
  float square = 0;
  for (int64_t d = 0; d < dim; ++d) square += x[d] * x[d];
  return std::sqrt(square);
}

// keys [count, dim] minus their mean.
void centre(const float* keys, size_t count, size_t dim, std::vector<float>& out) {
  out.assign(keys, keys + count * dim);
  for (size_t d = 0; d < dim; ++d) {
    float sum = 0;
    for (size_t i = 0; i < count; ++i) sum += out[i * dim + d];
    const float mean = count > 0 ? sum / static_cast<float>(count) : 0;
    for (size_t i = 0; i < count; ++i) out[i * dim + d] -= mean;
  }
}

}  // namespace

void copy_head(View x, int64_t head, float* out) {
  const int64_t dim = x.dim(2);
  for_float_type(x.dtype(), [&]<typename T>() {
    for (int64_t t = 0; t < x.dim(0); ++t) {
      const T* from = x.data<T>() + (t * x.dim(1) + head) * dim;
      for (int64_t d = 0; d < dim; ++d) out[t * dim + d] = static_cast<float>(from[d]);
    }
  });
}

MatchEstimator::MatchEstimator(AnnEngine engine, int64_t head_dim, uint64_t seed)
    : engine_(engine), head_dim_(head_dim) {
  if (engine == AnnEngine::kQuant) return;
  directions_.resize(static_cast<size_t>(head_dim * kSigns));
  fill_normal(seed, 0, 0, directions_.data(), head_dim * kSigns);
}

uint64_t MatchEstimator::code(const float* vector) const {
  float signs[kSigns];
  project(vector, 1, head_dim_, directions_.data(), kSigns, signs);
  uint64_t code = 0;
  for (int64_t i = 0; i < kSigns; ++i) code |= uint64_t{signs[i] > 0} << i;
  return code;
}

void MatchEstimator::estimate(const float* queries, int64_t count, const float* keys,
                              const float* log_weights, int64_t num_keys, float scale,
                              Scratch& scratch, float* logits) const {
  const auto dim = static_cast<size_t>(head_dim_);
  const auto num = static_cast<size_t>(num_keys);
  centre(keys, num, dim, scratch.centred);
  float* centred = scratch.centred.data();
  if (engine_ == AnnEngine::kQuant) {
    round_to_8_bits(centred, num_keys, head_dim_);
    scratch.rounded.assign(queries, queries + count * head_dim_);
    round_to_8_bits(scratch.rounded.data(), count, head_dim_);
    scratch.columns.resize(num * dim);
    for (size_t i = 0; i < num; ++i) {
      for (size_t d = 0; d < dim; ++d) scratch.columns[d * num + i] = centred[i * dim + d];
    }
    project(scratch.rounded.data(), count, head_dim_, scratch.columns.data(), num_keys, logits);
    for (int64_t t = 0; t < count; ++t, logits += num_keys) {
      for (int64_t i = 0; i < num_keys; ++i) logits[i] = scale * logits[i] + log_weights[i];
    }
    return;
  }
  scratch.codes.resize(num);
  scratch.columns.resize(num);
  for (size_t i = 0; i < num; ++i) {
    scratch.codes[i] = code(centred + i * dim);
    scratch.columns[i] = length(centred + i * dim, head_dim_);
  }
  float cosine[kSigns + 1];
  for (int64_t h = 0; h <= kSigns; ++h)
    cosine[h] = static_cast<float>(
        std::cos(std::numbers::pi * static_cast<double>(h) / static_cast<double>(kSigns)));
  for (int64_t t = 0; t < count; ++t, logits += num_keys) {
    const float* query = queries + t * head_dim_;
    const uint64_t own = code(query);
    const float stretch = scale * length(query, head_dim_);
    for (size_t i = 0; i < num; ++i)
      logits[i] = stretch * scratch.columns[i] * cosine[std::popcount(own ^ scratch.codes[i])] +
                  log_weights[i];
  }
}

}  // namespace longtake
