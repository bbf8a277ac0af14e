// AnnSA: which pages of the history a tile of queries attends to. Two rules rank the pages:
//   shared  queries and keys meet in one index: a page is known by its mean key, and counts as much
//           as the mass that softmax would give it, by an estimate of how well it matches each
//           query (match.h);
//   prompt  queries and keys meet in the prompt: a page counts as much as the pairs of a query and
//           a key in one bucket (prompt_buckets.h), and is not read if there is none.
//
// A tile of queries attends to the best pages, so many that the share of keys read is the density
// asked for. Pages at both ends of the list that the caller names (sink, newest frame, chunk in
// work) are always among them.
#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "ann/index.h"
#include "attention/attend.h"
#include "device/context.h"
#include "kv/page.h"
#include "tensor/tensor.h"

namespace longtake {

enum class SelectBuckets : uint8_t { kShared, kPrompt };

struct SelectOptions {
  AnnEngine ann = AnnEngine::kLsh;
  double density = 0.25;      // keys read over keys there, 0..1; the pages always read come first
  int64_t tile_queries = 32;  // queries that share a list of pages
  uint64_t seed = 0;          // of the random projections
  SelectBuckets buckets = SelectBuckets::kShared;
};

class PageSelector {
 public:
  virtual ~PageSelector() = default;
  PageSelector(const PageSelector&) = delete;
  PageSelector& operator=(const PageSelector&) = delete;

  // Lists for q [L, N, D] over all pages of kv; valid until the next call. The first `first_pages`
  // and last `last_pages` of every head are always read (on CUDA those that kv.device names). Only
  // pages that changed since the last call are looked at again. buckets [L]: of the queries; the
  // rule `prompt` needs them, as it needs those of the keys.
  virtual Selection select(Context& ctx, View q, const KvView& kv, int64_t first_pages,
                           int64_t last_pages, float scale,
                           std::span<const Bucket> buckets = {}) = 0;

  // Keys read over keys there, of the last selection; on CUDA of the latest one that has been made.
  virtual double density() const = 0;

 protected:
  PageSelector() = default;
};

// For the context's device. Throws Error (kUsage) for options out of range, or that the device does
// not have: CUDA knows shared buckets only, tiles of 128 queries, and products in place of both
// engines' estimates (page_lists.h).
std::unique_ptr<PageSelector> make_page_selector(Context& ctx, int64_t num_heads, int64_t head_dim,
                                                 const SelectOptions& options);

namespace cpu {
extern decltype(longtake::make_page_selector) make_page_selector;
}

namespace cuda {
extern decltype(longtake::make_page_selector) make_page_selector;
}

}  // namespace longtake
