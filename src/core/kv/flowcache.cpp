// Policy `flowcache`: the cache compression of FlowCache (arXiv 2602.10825), a baseline. Over the
// budget, every head keeps the keys of highest score
//
//   lambda * importance - (1 - lambda) * redundancy
//   importance  mean attention that the newest chunk's queries give the key, among the kept keys;
//               the largest of 7 neighbours in the order of the keys
//   redundancy  softmax over keys of the mean cosine to all others
//
// in their order; the others' values are dropped, not averaged, and nothing is counted.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "ann/project.h"
#include "base/error.h"
#include "device/dispatch.h"
#include "device/parallel.h"
#include "kv/host_cache.h"

namespace longtake {
namespace {

constexpr double kLambda = 0.07;
constexpr int64_t kPool = 3;  // neighbours on either side

class FlowCache final : public HostCache {
 public:
  FlowCache(Context& ctx, const CacheOptions& options)
      : HostCache(ctx, options), heads_(static_cast<size_t>(options.num_heads)) {
    if (options.budget_tokens < options.tokens_per_frame)
      throw Error(ErrorKind::kUsage,
                  str("memory-budget: expected at least ", options.tokens_per_frame,
                      " keys per head (one frame), found ", options.budget_tokens));
    // The budget, a chunk that joins it, and the chunk in work.
    const auto pages_of = [](int64_t tokens) { return (tokens + kPageTokens - 1) / kPageTokens; };
    const int64_t pages = pages_of(options.budget_tokens + options.tokens_per_frame) +
                          pages_of(options.tokens_per_frame);
    store_.reserve(static_cast<size_t>(options.num_heads * pages));
    for (PageList& list : pages_) list.reserve(static_cast<size_t>(pages));
  }

  bool wants_queries() const override { return true; }

  void observe_queries(Context&, View q, ChunkPosition) override {
    num_queries_ = q.dim(0);
    for (int64_t i = 0; i < options_.num_heads; ++i) {
      std::vector<float>& rows = heads_[static_cast<size_t>(i)].queries;
      rows.resize(static_cast<size_t>(num_queries_ * options_.head_dim));
      for_float_type(q.dtype(), [&]<typename T>() {
        for (int64_t t = 0; t < num_queries_; ++t) {
          const T* from = q.data<T>() + (t * options_.num_heads + i) * options_.head_dim;
          for (int64_t d = 0; d < options_.head_dim; ++d)
            rows[static_cast<size_t>(t * options_.head_dim + d)] = static_cast<float>(from[d]);
        }
      });
    }
  }

  void commit(Context& ctx, View k, View v, ChunkPosition) override {
    check_chunk(k, v);
    drop_current();
    append(k, v, 0, k.dim(0), /*fill=*/true);
    const int64_t count = entries();
    for (Head& head : heads_) {
      if (!tracing_) break;
      const auto first = static_cast<int32_t>(num_committed_);
      head.ids.resize(static_cast<size_t>(count));
      std::iota(head.ids.end() - k.dim(0), head.ids.end(), first);
    }
    num_committed_ += k.dim(0);
    if (count <= options_.budget_tokens) return;
    parallel_for(ctx, options_.num_heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) compress(i, count);
    });
    const int64_t left = (options_.budget_tokens + kPageTokens - 1) / kPageTokens;
    erase(left, num_history_pages(0));
    evicted_ += (count - options_.budget_tokens) * options_.num_heads;
  }

  void reset() override {
    HostCache::reset();
    num_committed_ = evicted_ = 0;
    for (Head& head : heads_) head.ids.clear();
  }

  MergeCounts merge_counts() const override { return {0, evicted_}; }

  void trace_members() override {
    LONGTAKE_CHECK(num_committed_ == 0);
    tracing_ = true;
  }

  std::vector<int32_t> members(int64_t head, int64_t num_committed) const override {
    LONGTAKE_CHECK(tracing_);
    std::vector<int32_t> out(static_cast<size_t>(num_committed), -1);
    const std::vector<int32_t>& ids = heads_[static_cast<size_t>(head)].ids;
    for (size_t entry = 0; entry < ids.size(); ++entry)
      out[static_cast<size_t>(ids[entry])] = static_cast<int32_t>(entry);
    return out;
  }

 protected:
  std::vector<int64_t> policy_state() const override { return {num_committed_, evicted_}; }

  bool set_policy_state(const std::vector<int64_t>& state) override {
    const auto fits = [this](const PageList& list) {
      int64_t keys = 0;
      for (const KvPage& page : list) keys += page.num_keys;
      return keys == entries() && keys <= options_.budget_tokens;
    };
    if (state.size() != 2 || !std::all_of(pages_.begin(), pages_.end(), fits)) return false;
    num_committed_ = state[0];
    evicted_ = state[1];
    return num_committed_ >= entries() && evicted_ >= 0;
  }

 private:
  struct Head {
    std::vector<float> queries;       // [L, D]: of the newest chunk
    std::vector<int32_t> ids;         // by entry: which committed key it is; if traced
    std::vector<float> keys, values;  // [count, D]; the rest is scratch too
    std::vector<float> logits, importance, row;
    std::vector<double> score;
    std::vector<int32_t> order;
  };

  void compress(int64_t index, int64_t count) {
    Head& head = heads_[static_cast<size_t>(index)];
    PageList& pages = pages_[static_cast<size_t>(index)];
    const int64_t dim = options_.head_dim;
    head.keys.resize(static_cast<size_t>(count * dim));
    head.values.resize(head.keys.size());
    for (int64_t i = 0; i < count; ++i)
      read_token(pages[static_cast<size_t>(i / kPageTokens)], options_.dtype, dim, i % kPageTokens,
                 head.keys.data() + i * dim, head.values.data() + i * dim);
    rate(head, count);
    const int64_t kept = options_.budget_tokens;
    head.order.resize(static_cast<size_t>(count));
    std::iota(head.order.begin(), head.order.end(), 0);
    std::nth_element(head.order.begin(), head.order.begin() + kept, head.order.end(),
                     [&](int32_t a, int32_t b) {
                       const double x = head.score[static_cast<size_t>(a)];
                       const double y = head.score[static_cast<size_t>(b)];
                       return x != y ? x > y : a > b;  // of equals the newer
                     });
    std::sort(head.order.begin(), head.order.begin() + kept);
    for (int64_t i = 0; i < kept; ++i) {
      const int32_t from = head.order[static_cast<size_t>(i)];
      if (from == i) continue;
      write_token(pages[static_cast<size_t>(i / kPageTokens)], options_.dtype, dim, i % kPageTokens,
                  head.keys.data() + from * dim, head.values.data() + from * dim, 0,
                  pages[static_cast<size_t>(from / kPageTokens)].buckets[from % kPageTokens]);
      if (tracing_) head.ids[static_cast<size_t>(i)] = head.ids[static_cast<size_t>(from)];
    }
    if (tracing_) head.ids.resize(static_cast<size_t>(kept));
    // The rest of the last page that stays is emptied.
    if (kept % kPageTokens == 0) return;
    KvPage& last = pages[static_cast<size_t>(kept / kPageTokens)];
    head.row.assign(static_cast<size_t>(dim), 0.0F);
    for (int64_t slot = kept % kPageTokens; slot < last.num_keys; ++slot)
      write_token(last, options_.dtype, dim, slot, head.row.data(), head.row.data(),
                  -std::numeric_limits<float>::infinity());
    last.num_keys = static_cast<int32_t>(kept % kPageTokens);
  }

  // head.score [count] of head.keys.
  void rate(Head& head, int64_t count) {
    const int64_t dim = options_.head_dim;
    const auto scale = 1.0F / std::sqrt(static_cast<float>(dim));
    head.importance.assign(static_cast<size_t>(count), 0.0F);
    head.logits.resize(static_cast<size_t>(count));
    for (int64_t t = 0; t < num_queries_; ++t) {
      head.row.assign(head.queries.begin() + t * dim, head.queries.begin() + (t + 1) * dim);
      for (float& x : head.row) x *= scale;
      dots(head.keys.data(), count, dim, head.row.data(), head.logits.data());
      add_softmax(head.logits.data(), count, head.importance.data());
    }
    // Cosines to all others at once: by the sum of the keys' directions.
    std::vector<double>& score = head.score;
    score.assign(static_cast<size_t>(count), 0.0);
    head.row.assign(static_cast<size_t>(dim), 0.0F);
    const auto length = [&](const float* key) {
      double square = 0;
      for (int64_t d = 0; d < dim; ++d) square += double{key[d]} * double{key[d]};
      return std::max(std::sqrt(square), 1e-20);
    };
    for (int64_t i = 0; i < count; ++i) {
      const float* key = head.keys.data() + i * dim;
      const double inverse = 1 / length(key);
      for (int64_t d = 0; d < dim; ++d)
        head.row[static_cast<size_t>(d)] += static_cast<float>(double{key[d]} * inverse);
    }
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) {
      const float* key = head.keys.data() + i * dim;
      double dot = 0;
      for (int64_t d = 0; d < dim; ++d)
        dot += double{key[d]} * double{head.row[static_cast<size_t>(d)]};
      const double cosine = (dot / length(key) - 1) / static_cast<double>(count);
      sum += score[static_cast<size_t>(i)] = std::exp(cosine);
    }
    const double queries = std::max<double>(1, static_cast<double>(num_queries_));
    for (int64_t i = 0; i < count; ++i) {
      const auto begin = head.importance.begin() + std::max<int64_t>(0, i - kPool);
      const auto end = head.importance.begin() + std::min(count, i + kPool + 1);
      const double importance = double{*std::max_element(begin, end)} / queries;
      double& own = score[static_cast<size_t>(i)];
      own = kLambda * importance - (1 - kLambda) * own / sum;
    }
  }

  std::vector<Head> heads_;
  int64_t num_queries_ = 0, num_committed_ = 0, evicted_ = 0;
  bool tracing_ = false;
};

}  // namespace

std::unique_ptr<KvCache> make_flow_cache(Context& ctx, const CacheOptions& options) {
  return std::make_unique<FlowCache>(ctx, options);
}

}  // namespace longtake
