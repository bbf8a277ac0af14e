#include "metrics/attention.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>

#include "base/error.h"
#include "device/dispatch.h"

namespace longtake {
namespace {

// One head's keys, values and biases, unpacked.
struct Keys {
  std::vector<float> keys, values;  // [count, D]
  std::vector<double> bias;
  std::vector<int32_t> page;  // of every key
  int64_t count = 0;

  Keys(const KvView& view, int64_t head) {
    const PageList& pages = view.heads[static_cast<size_t>(head)];
    for (const KvPage& p : pages) count += p.num_keys;
    keys.resize(static_cast<size_t>(count * view.head_dim));
    values.resize(keys.size());
    int64_t at = 0;
    for (size_t n = 0; n < pages.size(); ++n) {
      for (int64_t slot = 0; slot < pages[n].num_keys; ++slot, ++at) {
        read_token(pages[n], view.dtype, view.head_dim, slot, keys.data() + at * view.head_dim,
                   values.data() + at * view.head_dim);
        bias.push_back(pages[n].bias[slot]);
        page.push_back(static_cast<int32_t>(n));
      }
    }
  }
};

// Softmax of one query over keys; those not `read` get 0, and all do where none is read or every
// one is masked. Writes out [D], the mean of values.
std::vector<double> probabilities(const float* q, const Keys& keys, int64_t dim, double scale,
                                  const std::vector<char>& read, std::vector<double>& out) {
  std::vector<double> p(static_cast<size_t>(keys.count), 0.0);
  double most = -INFINITY;
  for (int64_t i = 0; i < keys.count; ++i) {
    const auto n = static_cast<size_t>(i);
    if (!read[n]) continue;
    double dot = 0;
    for (int64_t d = 0; d < dim; ++d)
      dot += double{q[d]} * double{keys.keys[static_cast<size_t>(i * dim + d)]};
    p[n] = dot * scale + keys.bias[n];
    most = std::max(most, p[n]);
  }
  out.assign(static_cast<size_t>(dim), 0.0);
  if (most == -INFINITY) {
    std::fill(p.begin(), p.end(), 0.0);
    return p;
  }
  double sum = 0;
  for (size_t n = 0; n < p.size(); ++n) sum += p[n] = read[n] ? std::exp(p[n] - most) : 0;
  for (size_t n = 0; n < p.size(); ++n) {
    if ((p[n] /= sum) < 1e-12) continue;
    for (size_t d = 0; d < out.size(); ++d)
      out[d] += p[n] * double{keys.values[n * out.size() + d]};
  }
  return p;
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
  std::vector<double> out, dense_out;
  for (int64_t head = 0; head < dense.num_heads(); ++head) {
    const Keys all(dense, head), left(kept, head);
    const std::vector<char> everything(static_cast<size_t>(all.count), 1);
    // The entry of every dense key; keys behind those that members name are the chunk in work.
    std::vector<int32_t> entry(static_cast<size_t>(all.count));
    std::iota(entry.begin(), entry.end(), 0);
    if (!members.empty()) {
      const std::vector<int32_t>& own = members[static_cast<size_t>(head)];
      std::copy(own.begin(), own.end(), entry.begin());
      const auto current = all.count - static_cast<int64_t>(own.size());
      for (int64_t i = 0; i < current; ++i)
        entry[own.size() + static_cast<size_t>(i)] = static_cast<int32_t>(left.count - current + i);
    }
    for (int64_t token = stride / 2; token < q.dim(0); token += stride) {
      for_float_type(q.dtype(), [&]<typename T>() {
        const T* from = q.data<T>() + (token * q.dim(1) + head) * dim;
        for (int64_t d = 0; d < dim; ++d) row[static_cast<size_t>(d)] = static_cast<float>(from[d]);
      });
      const size_t num_pages = kept.heads[static_cast<size_t>(head)].size();
      std::vector<char> chosen(num_pages, selection == nullptr);
      if (selection != nullptr) {
        const int64_t tiles = (q.dim(0) + selection->tile_queries - 1) / selection->tile_queries;
        const auto list = static_cast<size_t>(head * tiles + token / selection->tile_queries);
        for (int32_t i = selection->offsets[list]; i < selection->offsets[list + 1]; ++i)
          chosen[static_cast<size_t>(selection->pages[static_cast<size_t>(i)])] = 1;
      }
      std::vector<char> read(static_cast<size_t>(left.count));
      for (size_t i = 0; i < read.size(); ++i) read[i] = chosen[static_cast<size_t>(left.page[i])];
      const auto p = probabilities(row.data(), all, dim, scale, everything, dense_out);
      const auto own = probabilities(row.data(), left, dim, scale, read, out);
      AttentionScore one;
      one.count = 1;
      std::vector<double> mass(static_cast<size_t>(left.count), 0.0);
      for (size_t i = 0; i < p.size(); ++i) {
        if (entry[i] < 0) continue;
        mass[static_cast<size_t>(entry[i])] += p[i];
        if (read[static_cast<size_t>(entry[i])]) one.recall += p[i];
      }
      for (size_t i = 0; i < mass.size(); ++i) one.overlap += std::min(mass[i], own[i]);
      const auto num_read = std::count(read.begin(), read.end(), 1);
      one.density = static_cast<double>(num_read) / static_cast<double>(all.count);
      one.tile_density =
          static_cast<double>(kPageTokens * std::count(chosen.begin(), chosen.end(), 1)) /
          static_cast<double>(all.count);
      std::vector<double> best = p;
      const auto most = std::min<int64_t>(num_read, all.count);
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
