#include "metrics/attention.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>

#include "base/error.h"
#include "device/dispatch.h"
#include "metrics/page_math.h"

namespace longtake {
namespace {

int64_t num_keys(const PageList& pages) {
  int64_t count = 0;
  for (const KvPage& page : pages) count += page.num_keys;
  return count;
}

// Softmax of one query over a head's keys, written to p [keys]; pages that are not `chosen` get 0,
// and all do where none is or every key is masked. Writes out [D], the mean of values.
void probabilities(const float* q, const PageList& pages, DType dtype, double scale,
                   const std::vector<char>& chosen, std::vector<double>& p,
                   std::vector<double>& out) {
  const auto dim = static_cast<int64_t>(out.size());
  double most = -INFINITY;
  size_t at = 0;
  for (size_t n = 0; n < pages.size(); ++n) {
    const auto count = static_cast<size_t>(pages[n].num_keys);
    if (chosen[n]) {
      page_logits(q, pages[n], dtype, dim, scale, p.data() + at);
      for (size_t i = at; i < at + count; ++i) most = std::max(most, p[i]);
    } else {
      std::fill_n(p.data() + at, count, -INFINITY);
    }
    at += count;
  }
  std::fill(out.begin(), out.end(), 0.0);
  if (most == -INFINITY) {
    std::fill(p.begin(), p.end(), 0.0);
    return;
  }
  double sum = 0;
  for (double& x : p) sum += x = x == -INFINITY ? 0 : std::exp(x - most);
  for (double& x : p) x /= sum;
  at = 0;
  for (const KvPage& page : pages) {
    constexpr double kLeast = 1e-12;
    add_page_values(p.data() + at, kLeast, page, dtype, dim, out.data());
    at += static_cast<size_t>(page.num_keys);
  }
}

}  // namespace

void AttentionScore::add(const AttentionScore& other) {
  recall += other.recall;
  oracle += other.oracle;
  overlap += other.overlap;
  error += other.error;
  density += other.density;
  tile_density += other.tile_density;
  bound += other.bound;
  count += other.count;
}

AttentionScore AttentionScore::mean() const {
  const double n = std::max<double>(1, static_cast<double>(count));
  return {recall / n,  oracle / n,       overlap / n, error / n,
          density / n, tile_density / n, bound / n,   1};
}

std::vector<AttentionScore> score_heads(View q, const KvView& dense, const KvView& kept,
                                        const Selection* selection,
                                        const std::vector<std::vector<int32_t>>& members,
                                        float scale, int64_t stride) {
  const int64_t dim = dense.head_dim;
  std::vector<AttentionScore> scores(static_cast<size_t>(dense.num_heads()));
  std::vector<float> row(static_cast<size_t>(dim));
  std::vector<double> out(row.size()), dense_out(row.size()), p, own, mass, best;
  for (int64_t head = 0; head < dense.num_heads(); ++head) {
    const PageList& all = dense.heads[static_cast<size_t>(head)];
    const PageList& left = kept.heads[static_cast<size_t>(head)];
    const int64_t num_all = num_keys(all), num_left = num_keys(left);
    const std::vector<char> everything(all.size(), 1);
    p.resize(static_cast<size_t>(num_all));
    own.resize(static_cast<size_t>(num_left));
    // The entry of every dense key; keys behind those that members name are the chunk in work.
    std::vector<int32_t> entry(p.size());
    std::iota(entry.begin(), entry.end(), 0);
    if (!members.empty()) {
      const std::vector<int32_t>& known = members[static_cast<size_t>(head)];
      std::copy(known.begin(), known.end(), entry.begin());
      const auto current = num_all - static_cast<int64_t>(known.size());
      for (int64_t i = 0; i < current; ++i)
        entry[known.size() + static_cast<size_t>(i)] = static_cast<int32_t>(num_left - current + i);
    }
    for (int64_t token = stride / 2; token < q.dim(0); token += stride) {
      for_float_type(q.dtype(), [&]<typename T>() {
        const T* from = q.data<T>() + (token * q.dim(1) + head) * dim;
        for (int64_t d = 0; d < dim; ++d) row[static_cast<size_t>(d)] = static_cast<float>(from[d]);
      });
      std::vector<char> chosen(left.size(), selection == nullptr);
      if (selection != nullptr) {
        const int64_t tiles = (q.dim(0) + selection->tile_queries - 1) / selection->tile_queries;
        const auto list = static_cast<size_t>(head * tiles + token / selection->tile_queries);
        for (int32_t i = selection->offsets[list]; i < selection->offsets[list + 1]; ++i)
          chosen[static_cast<size_t>(selection->pages[static_cast<size_t>(i)])] = 1;
      }
      std::vector<char> read;  // of every key
      for (size_t n = 0; n < left.size(); ++n)
        read.insert(read.end(), static_cast<size_t>(left[n].num_keys), chosen[n]);
      probabilities(row.data(), all, dense.dtype, scale, everything, p, dense_out);
      probabilities(row.data(), left, kept.dtype, scale, chosen, own, out);
      AttentionScore one;
      one.count = 1;
      mass.assign(own.size(), 0.0);
      for (size_t i = 0; i < p.size(); ++i) {
        if (entry[i] < 0 || entry[i] >= num_left) continue;
        mass[static_cast<size_t>(entry[i])] += p[i];
        if (read[static_cast<size_t>(entry[i])]) one.recall += p[i];
      }
      for (size_t i = 0; i < mass.size(); ++i) one.overlap += std::min(mass[i], own[i]);
      const auto num_read = std::count(read.begin(), read.end(), 1);
      one.density = static_cast<double>(num_read) / static_cast<double>(num_all);
      one.tile_density =
          static_cast<double>(kPageTokens * std::count(chosen.begin(), chosen.end(), 1)) /
          static_cast<double>(num_all);
      best = p;
      const auto most = std::min<int64_t>(num_read, num_all);
      std::nth_element(best.begin(), best.begin() + std::max<int64_t>(0, most - 1), best.end(),
                       std::greater<>());
      one.oracle = std::accumulate(best.begin(), best.begin() + most, 0.0);
      double difference = 0, norm = 0;
      for (size_t d = 0; d < out.size(); ++d) {
        difference += (out[d] - dense_out[d]) * (out[d] - dense_out[d]);
        norm += dense_out[d] * dense_out[d];
      }
      one.error = norm > 0 ? std::sqrt(difference / norm) : 0;
      scores[static_cast<size_t>(head)].add(one);
    }
  }
  return scores;
}

AttentionScore score_attention(View q, const KvView& dense, const KvView& kept,
                               const Selection* selection,
                               const std::vector<std::vector<int32_t>>& members, float scale,
                               int64_t stride) {
  AttentionScore sum;
  for (const AttentionScore& head : score_heads(q, dense, kept, selection, members, scale, stride))
    sum.add(head);
  return sum;
}

}  // namespace longtake
