// What a cache or a selection does to attention: the mass that dense attention over the whole
// history gives to keys, against what is left of it. Everything is computed in double from the
// pages, for a sample of queries.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "attention/attend.h"
#include "kv/page.h"
#include "tensor/tensor.h"

namespace longtake {

// Sums over queries and heads; mean() of each is the figure.
struct AttentionScore {
  double recall = 0;        // dense mass on the pages kept
  double oracle = 0;        // dense mass on as many keys, the best ones of each query
  double overlap = 0;       // over entries: min(dense mass of the members, mass given to the entry)
  double error = 0;         // relative L2 of the output; 1 where nothing is read
  double density = 0;       // keys read / keys of dense attention
  double tile_density = 0;  // slots of the pages read, unused ones too / keys of dense attention
  double bound = 0;         // most that 1 - overlap can be; see metrics/error_bound.h
  int64_t count = 0;

  void add(const AttentionScore& other);
  AttentionScore mean() const;
};

// By head: every `stride`-th query of q [L, N, D] (rotated): attention over `dense`, the whole
// history, against attention over `kept` (with a selection: over what it selects). Both views end
// with the same chunk in work. members[head][i]: which entry of kept (slots in list order) stands
// for key i of dense's history, -1: none does; empty: key i is entry i.
std::vector<AttentionScore> score_heads(View q, const KvView& dense, const KvView& kept,
                                        const Selection* selection,
                                        const std::vector<std::vector<int32_t>>& members,
                                        float scale, int64_t stride);

// The sum over heads.
AttentionScore score_attention(View q, const KvView& dense, const KvView& kept,
                               const Selection* selection,
                               const std::vector<std::vector<int32_t>>& members, float scale,
                               int64_t stride);

}  // namespace longtake
