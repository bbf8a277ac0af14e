#include "kv/tempcache_metric.h"

#include <algorithm>
#include <cmath>
#include <istream>
#include <ostream>

#include "ann/project.h"

namespace longtake {
namespace {

// Lower triangle L [D, D] of a positive matrix: a = L L^T.
std::vector<double> cholesky(const std::vector<double>& a, size_t dim) {
  std::vector<double> lower(dim * dim, 0.0);
  for (size_t i = 0; i < dim; ++i) {
    for (size_t j = 0; j <= i; ++j) {
      double rest = a[i * dim + j];
      for (size_t k = 0; k < j; ++k) rest -= lower[i * dim + k] * lower[j * dim + k];
      // What rounding made negative counts as a direction that no query sees.
      if (i == j)
        lower[i * dim + i] = std::sqrt(std::max(rest, 0.0));
      else if (lower[j * dim + j] > 0)
        lower[i * dim + j] = rest / lower[j * dim + j];
    }
  }
  return lower;
}

template <typename T>
void write_all(std::ostream& out, const std::vector<T>& values) {
  out.write(reinterpret_cast<const char*>(values.data()),
            static_cast<std::streamsize>(values.size() * sizeof(T)));
}

template <typename T>
void read_all(std::istream& in, std::vector<T>& values) {
  in.read(reinterpret_cast<char*>(values.data()),
          static_cast<std::streamsize>(values.size() * sizeof(T)));
}

}  // namespace

KeyMetric::KeyMetric(int64_t head_dim, MergeRule rule) : head_dim_(head_dim), rule_(rule) {
  clear();
}

void KeyMetric::clear() {
  const auto dim = static_cast<size_t>(head_dim_);
  num_queries_ = 0;
  second_moment_.assign(dim * dim, 0.0);
  map_.assign(dim * dim, 0.0F);
  centre_.assign(dim, 0.0F);
}

void KeyMetric::observe(const float* queries, int64_t count) {
  if (rule_ == MergeRule::kPaper) return;
  const auto dim = static_cast<size_t>(head_dim_);
  // One chunk in f32, so that the loops are wide; its sum joins the others in f64.
  transposed_.resize(dim * static_cast<size_t>(count));
  product_.resize(dim * dim);
  for (size_t t = 0; t < static_cast<size_t>(count); ++t) {
    for (size_t i = 0; i < dim; ++i)
      transposed_[i * static_cast<size_t>(count) + t] = queries[t * dim + i];
  }
  project(transposed_.data(), head_dim_, count, queries, head_dim_, product_.data());
  for (size_t i = 0; i < dim * dim; ++i) second_moment_[i] += static_cast<double>(product_[i]);
  num_queries_ += count;
}

void KeyMetric::refresh(const float* keys, int64_t count) {
  const auto dim = static_cast<size_t>(head_dim_);
  if (rule_ == MergeRule::kNats) {
    std::vector<double> mean(dim * dim, 0.0);
    for (size_t i = 0; i < dim; ++i) {
      if (num_queries_ == 0) mean[i * dim + i] = 1;
      for (size_t j = 0; j <= i && num_queries_ > 0; ++j)
        mean[i * dim + j] = second_moment_[i * dim + j] / static_cast<double>(num_queries_);
    }
    const std::vector<double> lower = cholesky(mean, dim);
    const double scale = 1.0 / std::sqrt(static_cast<double>(dim));
    for (size_t i = 0; i < dim * dim; ++i) map_[i] = static_cast<float>(lower[i] * scale);
  }
  std::fill(centre_.begin(), centre_.end(), 0.0F);
  std::vector<float> mapped(dim);
  std::vector<float> centre(dim, 0.0F);
  for (int64_t t = 0; t < count; ++t) {
    map(keys + t * head_dim_, mapped.data());
    for (size_t d = 0; d < dim; ++d) centre[d] += mapped[d] / static_cast<float>(count);
  }
  centre_ = centre;
}

void KeyMetric::map(const float* key, float* out) const {
  const auto dim = static_cast<size_t>(head_dim_);
  for (size_t d = 0; d < dim; ++d) out[d] = -centre_[d];
  if (rule_ == MergeRule::kPaper) {
    double square = 0;
    for (size_t d = 0; d < dim; ++d) square += double{key[d]} * double{key[d]};
    const auto inverse = static_cast<float>(square > 0 ? 1.0 / std::sqrt(square) : 0.0);
    for (size_t d = 0; d < dim; ++d) out[d] += key[d] * inverse;
    return;
  }
  for (size_t i = 0; i < dim; ++i) {
    for (size_t j = 0; j <= i; ++j) out[j] += key[i] * map_[i * dim + j];
  }
}

void KeyMetric::map_all(const float* keys, int64_t count, float* out) const {
  if (rule_ == MergeRule::kPaper) {
    for (int64_t t = 0; t < count; ++t) map(keys + t * head_dim_, out + t * head_dim_);
    return;
  }
  project(keys, count, head_dim_, map_.data(), head_dim_, out);
  for (int64_t t = 0; t < count; ++t) {
    float* row = out + t * head_dim_;
    for (int64_t d = 0; d < head_dim_; ++d) row[d] -= centre_[static_cast<size_t>(d)];
  }
}

void KeyMetric::write(std::ostream& out) const {
  out.write(reinterpret_cast<const char*>(&num_queries_), sizeof num_queries_);
  write_all(out, second_moment_);
  write_all(out, map_);
  write_all(out, centre_);
}

bool KeyMetric::read(std::istream& in) {
  in.read(reinterpret_cast<char*>(&num_queries_), sizeof num_queries_);
  read_all(in, second_moment_);
  read_all(in, map_);
  read_all(in, centre_);
  return static_cast<bool>(in) && num_queries_ >= 0;
}

}  // namespace longtake
