#include "metrics/error_bound.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "device/dispatch.h"
#include "metrics/page_math.h"

namespace longtake {
namespace {

// A part of the mass and the factor by which it changes.
struct Part {
  double factor, mass;
};

// Logits of one query, [entries] in list order.
void logits_of(const float* q, const PageList& pages, DType dtype, int64_t dim, double scale,
               std::vector<double>& out) {
  out.clear();
  for (const KvPage& page : pages) {
    out.resize(out.size() + static_cast<size_t>(page.num_keys));
    page_logits(q, page, dtype, dim, scale,
                out.data() + out.size() - static_cast<size_t>(page.num_keys));
  }
}

}  // namespace

double moved_mass_bound(std::span<const double> logits, std::span<const double> low,
                        std::span<const double> high) {
  if (logits.empty()) return 0;
  const double most = *std::max_element(logits.begin(), logits.end());
  double total = 0;
  for (const double logit : logits) total += std::exp(logit - most);
  // What grows, the most first; what shrinks, the most first. What stands for itself is one part.
  std::vector<Part> grows, shrinks;
  double merged = 0;
  for (size_t i = 0; i < logits.size(); ++i) {
    if (low[i] == logits[i] && high[i] == logits[i]) continue;
    const double mass = std::exp(logits[i] - most) / total;
    grows.push_back({std::exp(high[i] - logits[i]), mass});
    shrinks.push_back({std::exp(low[i] - logits[i]), mass});
    merged += mass;
  }
  const double rest = std::max(0.0, 1 - merged);
  grows.push_back({1, rest});
  shrinks.push_back({1, rest});
  const auto lesser = [](const Part& a, const Part& b) { return a.factor < b.factor; };
  std::sort(grows.rbegin(), grows.rend(), lesser);
  std::sort(shrinks.begin(), shrinks.end(), lesser);

  // From x = 0 on: an x of the mass has grown to `up`, the others have shrunk to `down`. On every
  // piece both are straight, so that the best x is at an end or where the slope is 0.
  double x = 0, up = 0;
  double down = std::accumulate(shrinks.begin(), shrinks.end(), 0.0,
                                [](double sum, const Part& p) { return sum + p.factor * p.mass; });
  if (!std::isfinite(down)) return 1;
  double best = 0;
  size_t g = 0, s = shrinks.size();  // shrinks that count: before s, the last ones leave first
  double left_g = grows[0].mass, left_s = shrinks[s - 1].mass;
  while (g < grows.size() && s > 0) {
    const double step = std::min(left_g, left_s);
    const double rise = grows[g].factor, fall = shrinks[s - 1].factor;
    const auto value = [&](double way) {
      const double grown = up + rise * way;
      const double all = grown + std::max(0.0, down - fall * way);
      return all > 0 ? grown / all - (x + way) : 0.0;
    };
    if (!std::isfinite(rise * step)) return 1;
    best = std::max(best, value(step));
    const double slope = rise * down + fall * up, bend = rise - fall;
    if (bend != 0) {
      const double way = (std::sqrt(slope) - (up + down)) / bend;
      if (way > 0 && way < step) best = std::max(best, value(way));
    }
    x += step;
    up += rise * step;
    down = std::max(0.0, down - fall * step);
    left_g -= step;
    left_s -= step;
    if (left_g <= 0 && ++g < grows.size()) left_g = grows[g].mass;
    if (left_s <= 0 && --s > 0) left_s = shrinks[s - 1].mass;
  }
  return std::clamp(best, 0.0, 1.0);
}

double moved_mass_bound(View q, const KvCache& cache, int64_t frame, float scale, int64_t stride) {
  const KvView kv = cache.view();
  const int64_t dim = kv.head_dim;
  double sum = 0;
  std::vector<float> query(static_cast<size_t>(dim));
  std::vector<double> logits, low, high;
  for (int64_t head = 0; head < kv.num_heads(); ++head) {
    for (int64_t token = stride / 2; token < q.dim(0); token += stride) {
      if (!cache.is_bounded()) {
        sum += 1;
        continue;
      }
      for_float_type(q.dtype(), [&]<typename T>() {
        const T* from = q.data<T>() + (token * q.dim(1) + head) * dim;
        for (int64_t d = 0; d < dim; ++d)
          query[static_cast<size_t>(d)] = static_cast<float>(from[d]);
      });
      logits_of(query.data(), kv.heads[static_cast<size_t>(head)], kv.dtype, dim, double{scale},
                logits);
      low = high = logits;
      cache.bound_log_mass(head, query.data(), frame, low.data(), high.data());
      sum += moved_mass_bound(logits, low, high);
    }
  }
  return sum;
}

}  // namespace longtake
