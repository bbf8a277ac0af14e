// One unit of attention work on the CPU. Private to attend_cpu.cpp.
#pragma once

#include <cstdint>

#include "base/dtype.h"
#include "kv/page.h"

namespace longtake {

// A run of queries of one head and the pages they attend.
struct AttendTile {
  DType dtype = DType::kF32;     // of queries and pages
  const std::byte* q = nullptr;  // the first query's row [D]
  int64_t num_queries = 0;
  int64_t head_dim = 0;
  int64_t row_stride = 0;             // elements from one query (or output) row to the next: N D
  const KvPage* pages = nullptr;      // the head's list
  const int32_t* selected = nullptr;  // indices into it; null: the first num_pages
  int64_t num_pages = 0;
  float scale = 1.0F;
  float* scratch = nullptr;  // scratch_floats(num_queries, head_dim)
  DType out_dtype = DType::kF32;
  std::byte* out = nullptr;  // the first query's output row [D]

  // Accumulators [queries, D], one vector of partial sums, maximum and threshold per query.
  static constexpr int64_t kMaxLanes = 16;

  static int64_t scratch_floats(int64_t queries, int64_t dim) {
    return queries * (dim + kMaxLanes + 2);
  }
};

}  // namespace longtake
