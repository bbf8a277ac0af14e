#include <algorithm>
#include <cmath>
#include <vector>

#include "ann/project.h"
#include "attention/match.h"
#include "attention/select.h"
#include "base/error.h"
#include "device/dispatch.h"
#include "device/parallel.h"
#include "ops/expect.h"

namespace longtake {
namespace {

// Mean of a page's keys, from its packed form (kv/page.h).
template <typename T>
void mean_key(const KvPage& page, int64_t dim, float* out) {
  const T* keys = reinterpret_cast<const T*>(page.keys);
  const float inverse = 1.0F / static_cast<float>(std::max<int32_t>(1, page.num_keys));
  constexpr int64_t kGroup = sizeof(T) == 2 ? 2 : 1;  // channels side by side
  for (int64_t d = 0; d < dim; d += kGroup) {
    const T* row = keys + d * kPageTokens;
    for (int64_t lane = 0; lane < kGroup; ++lane) {
      float sum = 0;  // unused slots hold zeros
      for (int64_t slot = 0; slot < kPageTokens; ++slot)
        sum += static_cast<float>(row[slot * kGroup + lane]);
      out[d + lane] = sum * inverse;
    }
  }
}

class CpuPageSelector final : public PageSelector {
 public:
  CpuPageSelector(int64_t num_heads, int64_t head_dim, const SelectOptions& options)
      : head_dim_(head_dim),
        options_(options),
        estimator_(options.ann, head_dim, options.seed),
        heads_(static_cast<size_t>(num_heads)) {}

  Selection select(Context& ctx, View q, const KvView& kv, int64_t first_pages, int64_t last_pages,
                   float scale, std::span<const Bucket> buckets) override;

  double density() const override { return density_; }

 private:
  // What is known of a page as it was when last looked at.
  struct Summary {
    const std::byte* keys = nullptr;
    uint32_t version = 0;
  };

  struct Head {
    std::vector<Summary> pages;
    std::vector<float> means;        // [pages, D]
    std::vector<float> log_weights;  // log sum exp(bias): how many plain keys a page is worth
    // Scratch of one selection.
    MatchEstimator::Scratch scratch;
    std::vector<float> logits, mass;
    std::vector<int32_t> in_bucket;  // queries of a tile, by bucket
    std::vector<int32_t> order;
    std::vector<std::vector<int32_t>> lists;  // by tile
    int64_t keys_read = 0, keys_there = 0;
  };

  void look_at(Head& head, const PageList& list, DType dtype);
  // What every page counts for queries [begin, end): head.mass.
  void weigh(Head& head, const PageList& list, int64_t begin, int64_t end,
             std::span<const Bucket> buckets) const;
  void choose(Head& head, const PageList& list, int64_t queries, int64_t first_pages,
              int64_t last_pages, std::span<const Bucket> buckets);

  int64_t head_dim_;
  SelectOptions options_;
  MatchEstimator estimator_;
  std::vector<Head> heads_;
  std::vector<int32_t> offsets_, pages_;
  double density_ = 1;
};

Selection CpuPageSelector::select(Context& ctx, View q, const KvView& kv, int64_t first_pages,
                                  int64_t last_pages, float scale,
                                  std::span<const Bucket> buckets) {
  const int64_t queries = q.dim(0);
  const bool by_prompt = options_.buckets == SelectBuckets::kPrompt;
  LONGTAKE_CHECK(!by_prompt || static_cast<int64_t>(buckets.size()) == queries, buckets.size());
  expect_shape("select", q, {queries, static_cast<int64_t>(heads_.size()), head_dim_});
  LONGTAKE_CHECK(kv.num_heads() == static_cast<int64_t>(heads_.size()));
  const Workspace::Scope scope(ctx.workspace());
  const View rows =
      ctx.workspace().take(DType::kF32, {kv.num_heads(), std::max<int64_t>(1, queries), head_dim_});
  parallel_for(ctx, kv.num_heads(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      Head& head = heads_[static_cast<size_t>(i)];
      const PageList& list = kv.heads[static_cast<size_t>(i)];
      if (!by_prompt) {
        float* own = rows.data<float>() + i * queries * head_dim_;
        copy_head(q, i, own);
        look_at(head, list, kv.dtype);
        // Estimated log mass of every page under every query.
        head.logits.resize(static_cast<size_t>(queries) * list.size());
        estimator_.estimate(own, queries, head.means.data(), head.log_weights.data(),
                            static_cast<int64_t>(list.size()), scale, head.scratch,
                            head.logits.data());
      }
      choose(head, list, queries, first_pages, last_pages, buckets);
    }
  });
  offsets_.assign(1, 0);
  pages_.clear();
  int64_t read = 0, there = 0;
  for (const Head& head : heads_) {
    for (const std::vector<int32_t>& list : head.lists) {
      pages_.insert(pages_.end(), list.begin(), list.end());
      offsets_.push_back(static_cast<int32_t>(pages_.size()));
    }
    read += head.keys_read;
    there += head.keys_there;
  }
  density_ = there > 0 ? static_cast<double>(read) / static_cast<double>(there) : 1;
  return {options_.tile_queries, offsets_, pages_};
}

void CpuPageSelector::look_at(Head& head, const PageList& list, DType dtype) {
  head.pages.resize(list.size());
  head.log_weights.resize(list.size());
  head.means.resize(list.size() * static_cast<size_t>(head_dim_));
  for (size_t p = 0; p < list.size(); ++p) {
    const KvPage& page = list[p];
    Summary& known = head.pages[p];
    if (known.keys == page.keys && known.version == page.version) continue;
    known = {page.keys, page.version};
    for_float_type(dtype, [&]<typename T>() {
      mean_key<T>(page, head_dim_, head.means.data() + p * static_cast<size_t>(head_dim_));
    });
    float weight = static_cast<float>(page.num_keys);
    if (page.has_bias) {
      weight = 0;
      for (int32_t slot = 0; slot < page.num_keys; ++slot) weight += std::exp(page.bias[slot]);
    }
    head.log_weights[p] = std::log(std::max(weight, 1e-30F));
  }
}

void CpuPageSelector::weigh(Head& head, const PageList& list, int64_t begin, int64_t end,
                            std::span<const Bucket> buckets) const {
  const auto pages = static_cast<int64_t>(list.size());
  head.mass.assign(list.size(), 0.0F);
  if (options_.buckets == SelectBuckets::kShared) {
    for (int64_t t = begin; t < end; ++t)
      add_softmax(head.logits.data() + t * pages, pages, head.mass.data());
    return;
  }
  head.in_bucket.clear();
  for (int64_t t = begin; t < end; ++t) {
    const Bucket own = buckets[static_cast<size_t>(t)];
    if (own == kNoBucket) continue;
    if (head.in_bucket.size() <= own) head.in_bucket.resize(size_t{own} + 1);
    ++head.in_bucket[own];
  }
  for (size_t p = 0; p < list.size(); ++p) {
    const KvPage& page = list[p];
    for (int32_t slot = 0; slot < page.num_keys; ++slot) {
      const Bucket own = page.buckets[slot];
      if (own >= head.in_bucket.size()) continue;
      const auto pairs = static_cast<float>(head.in_bucket[own]);
      head.mass[p] += page.has_bias ? pairs * std::exp(page.bias[slot]) : pairs;
    }
  }
}

void CpuPageSelector::choose(Head& head, const PageList& list, int64_t queries, int64_t first_pages,
                             int64_t last_pages, std::span<const Bucket> buckets) {
  const auto pages = static_cast<int64_t>(list.size());
  const int64_t tiles = (queries + options_.tile_queries - 1) / options_.tile_queries;
  int64_t total = 0;
  for (const KvPage& page : list) total += page.num_keys;
  const auto wanted =
      static_cast<int64_t>(std::ceil(options_.density * static_cast<double>(total)));
  head.lists.resize(static_cast<size_t>(tiles));
  head.keys_read = 0;
  head.keys_there = total * queries;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t begin = tile * options_.tile_queries;
    const int64_t end = std::min(queries, begin + options_.tile_queries);
    weigh(head, list, begin, end, buckets);
    std::vector<int32_t>& chosen = head.lists[static_cast<size_t>(tile)];
    chosen.clear();
    int64_t keys = 0;
    head.order.clear();
    for (int32_t p = 0; p < pages; ++p) {
      if (p < first_pages || p >= pages - last_pages) {
        chosen.push_back(p);
        keys += list[static_cast<size_t>(p)].num_keys;
      } else {
        head.order.push_back(p);
      }
    }
    std::sort(head.order.begin(), head.order.end(), [&](int32_t a, int32_t b) {
      const float x = head.mass[static_cast<size_t>(a)];
      const float y = head.mass[static_cast<size_t>(b)];
      return x != y ? x > y : a < b;
    });
    const bool by_prompt = options_.buckets == SelectBuckets::kPrompt;
    for (const int32_t p : head.order) {
      if (keys >= wanted || (by_prompt && head.mass[static_cast<size_t>(p)] == 0)) break;
      chosen.push_back(p);
      keys += list[static_cast<size_t>(p)].num_keys;
    }
    std::sort(chosen.begin(), chosen.end());
    head.keys_read += keys * (end - begin);
  }
}

}  // namespace

std::unique_ptr<PageSelector> cpu::make_page_selector(Context&, int64_t num_heads, int64_t head_dim,
                                                      const SelectOptions& options) {
  return std::make_unique<CpuPageSelector>(num_heads, head_dim, options);
}

}  // namespace longtake
