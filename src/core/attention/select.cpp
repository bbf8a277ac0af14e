#include "attention/select.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <numbers>
#include <numeric>

#include "ann/project.h"
#include "base/error.h"
#include "base/philox.h"
#include "device/dispatch.h"
#include "device/parallel.h"
#include "ops/expect.h"

namespace longtake {
namespace {

constexpr int64_t kSigns = 64;

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

}  // namespace

PageSelector::PageSelector(int64_t num_heads, int64_t head_dim, const SelectOptions& options)
    : head_dim_(head_dim), options_(options), heads_(static_cast<size_t>(num_heads)) {
  if (!(options.density >= 0) || !(options.density <= 1))
    throw Error(ErrorKind::kUsage, str("density: expected 0..1, found ", options.density));
  if (options.tile_queries < 1)
    throw Error(ErrorKind::kUsage,
                str("tile of queries: expected 1 or more, found ", options.tile_queries));
  if (options.ann == AnnEngine::kQuant) return;
  directions_.resize(static_cast<size_t>(head_dim * kSigns));
  fill_normal(options.seed, 0, 0, directions_.data(), head_dim * kSigns);
}

Selection PageSelector::select(Context& ctx, View q, const KvView& kv, int64_t first_pages,
                               int64_t last_pages, float scale) {
  const int64_t queries = q.dim(0);
  expect_shape("select", q, {queries, static_cast<int64_t>(heads_.size()), head_dim_});
  LONGTAKE_CHECK(kv.num_heads() == static_cast<int64_t>(heads_.size()));
  const Workspace::Scope scope(ctx.workspace());
  const View rows =
      ctx.workspace().take(DType::kF32, {kv.num_heads(), std::max<int64_t>(1, queries), head_dim_});
  parallel_for(ctx, kv.num_heads(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      Head& head = heads_[static_cast<size_t>(i)];
      const PageList& list = kv.heads[static_cast<size_t>(i)];
      float* own = rows.data<float>() + i * queries * head_dim_;
      for_float_type(q.dtype(), [&]<typename T>() {
        for (int64_t t = 0; t < queries; ++t) {
          const T* from = q.data<T>() + (t * kv.num_heads() + i) * head_dim_;
          for (int64_t d = 0; d < head_dim_; ++d)
            own[t * head_dim_ + d] = static_cast<float>(from[d]);
        }
      });
      look_at(head, list, kv.dtype);
      estimate(head, own, queries, scale);
      choose(head, list, queries, first_pages, last_pages);
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

void PageSelector::look_at(Head& head, const PageList& list, DType dtype) {
  head.pages.resize(list.size());
  head.means.resize(list.size() * static_cast<size_t>(head_dim_));
  for (size_t p = 0; p < list.size(); ++p) {
    const KvPage& page = list[p];
    Summary& known = head.pages[p];
    if (known.keys == page.keys && known.version == page.version) continue;
    known = {page.keys, page.version, 0};
    for_float_type(dtype, [&]<typename T>() {
      mean_key<T>(page, head_dim_, head.means.data() + p * static_cast<size_t>(head_dim_));
    });
    float weight = static_cast<float>(page.num_keys);
    if (page.has_bias) {
      weight = 0;
      for (int32_t slot = 0; slot < page.num_keys; ++slot) weight += std::exp(page.bias[slot]);
    }
    known.log_weight = std::log(std::max(weight, 1e-30F));
  }
}

// head.logits [queries, pages]: estimated log mass of every page under every query.
void PageSelector::estimate(Head& head, const float* queries, int64_t count, float scale) {
  const auto pages = static_cast<int64_t>(head.pages.size());
  const auto dim = static_cast<size_t>(head_dim_);
  // Centred on the mean of all pages: a constant for every query, which softmax does not see.
  std::vector<float>& centred = head.centred;
  centred = head.means;
  for (size_t d = 0; d < dim; ++d) {
    float sum = 0;
    for (size_t p = 0; p < head.pages.size(); ++p) sum += centred[p * dim + d];
    const float mean = pages > 0 ? sum / static_cast<float>(pages) : 0;
    for (size_t p = 0; p < head.pages.size(); ++p) centred[p * dim + d] -= mean;
  }
  head.logits.resize(static_cast<size_t>(count * pages));
  if (options_.ann == AnnEngine::kQuant) {
    round_to_8_bits(centred.data(), pages, head_dim_);
    head.mass.assign(queries, queries + count * head_dim_);
    round_to_8_bits(head.mass.data(), count, head_dim_);
    head.columns.resize(centred.size());
    for (size_t p = 0; p < head.pages.size(); ++p) {
      for (size_t d = 0; d < dim; ++d)
        head.columns[d * head.pages.size() + p] = centred[p * dim + d];
    }
    project(head.mass.data(), count, head_dim_, head.columns.data(), pages, head.logits.data());
    for (int64_t t = 0; t < count; ++t) {
      for (int64_t p = 0; p < pages; ++p) {
        float& logit = head.logits[static_cast<size_t>(t * pages + p)];
        logit = scale * logit + head.pages[static_cast<size_t>(p)].log_weight;
      }
    }
    return;
  }
  const auto code_of = [&](const float* x) {
    float signs[kSigns];
    project(x, 1, head_dim_, directions_.data(), kSigns, signs);
    uint64_t code = 0;
    for (int64_t i = 0; i < kSigns; ++i) code |= uint64_t{signs[i] > 0} << i;
    return code;
  };
  head.codes.resize(head.pages.size());
  head.columns.resize(head.pages.size());
  for (size_t p = 0; p < head.pages.size(); ++p) {
    head.codes[p] = code_of(centred.data() + p * dim);
    head.columns[p] = length(centred.data() + p * dim, head_dim_);
  }
  float cosine[kSigns + 1];
  for (int64_t h = 0; h <= kSigns; ++h)
    cosine[h] = static_cast<float>(
        std::cos(std::numbers::pi * static_cast<double>(h) / static_cast<double>(kSigns)));
  for (int64_t t = 0; t < count; ++t) {
    const float* query = queries + t * head_dim_;
    const uint64_t code = code_of(query);
    const float stretch = scale * length(query, head_dim_);
    for (size_t p = 0; p < head.pages.size(); ++p)
      head.logits[static_cast<size_t>(t) * head.pages.size() + p] =
          stretch * head.columns[p] * cosine[std::popcount(code ^ head.codes[p])] +
          head.pages[p].log_weight;
  }
}

void PageSelector::choose(Head& head, const PageList& list, int64_t queries, int64_t first_pages,
                          int64_t last_pages) {
  const auto pages = static_cast<int64_t>(list.size());
  const int64_t tiles = (queries + options_.tile_queries - 1) / options_.tile_queries;
  int64_t total = 0;
  for (const KvPage& page : list) total += page.num_keys;
  const auto wanted =
      static_cast<int64_t>(std::ceil(options_.density * static_cast<double>(total)));
  head.lists.resize(static_cast<size_t>(tiles));
  head.keys_read = 0;
  head.keys_there = total * queries;
  head.mass.resize(static_cast<size_t>(pages));
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t begin = tile * options_.tile_queries;
    const int64_t end = std::min(queries, begin + options_.tile_queries);
    std::fill(head.mass.begin(), head.mass.end(), 0.0F);
    for (int64_t t = begin; t < end; ++t) {
      float* row = head.logits.data() + t * pages;
      add_softmax(row, pages, head.mass.data());
    }
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
    for (const int32_t p : head.order) {
      if (keys >= wanted) break;
      chosen.push_back(p);
      keys += list[static_cast<size_t>(p)].num_keys;
    }
    std::sort(chosen.begin(), chosen.end());
    head.keys_read += keys * (end - begin);
  }
}

}  // namespace longtake
