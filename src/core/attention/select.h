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
#include <span>
#include <vector>

#include "ann/index.h"
#include "attention/attend.h"
#include "attention/match.h"
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
  // Throws Error (kUsage) for options out of range.
  PageSelector(int64_t num_heads, int64_t head_dim, const SelectOptions& options);

  // Lists for q [L, N, D] over all pages of kv; valid until the next call. The first `first_pages`
  // and last `last_pages` of every head are always read. Only pages that changed since the last
  // call are looked at again. buckets [L]: of the queries; the rule `prompt` needs them, as it
  // needs those of the keys.
  Selection select(Context& ctx, View q, const KvView& kv, int64_t first_pages, int64_t last_pages,
                   float scale, std::span<const Bucket> buckets = {});

  // Keys read over keys there, of the last selection.
  double density() const { return density_; }

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

}  // namespace longtake
