// AnnSA on NVIDIA GPUs: which pages a tile of queries attends to, found and listed on the device.
// CUDA builds only; the CPU's twin, with the reasons for the rule, is select.h.
//
// The rule: a page is known by its mean key and by how many plain keys it stands for. The softmax
// of every query over all pages so known gives each of them a mass; a tile reads the pages of most
// mass, summed over its queries, until they hold the share of the keys that is asked for. On the
// GPU the products with the mean keys are exact (of bf16): on tensor cores they cost less than the
// estimates (match.h) that pay on a CPU, so that both of AnnSA's engines choose alike here. Ties go
// to the page that comes first.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "attention/paged_attention.h"
#include "device/cuda_check.h"

namespace longtake::cuda {

struct ListOptions {
  double density =
      0.25;             // keys listed over keys there, by head; the pages always listed come first
  int first_pages = 0;  // at both ends of a head's pages: always listed
  int last_pages = 0;
};

class PageLister {
 public:
  // For at most so many rows (heads times tiles of kTileQueries queries) and pages of one head;
  // head_dim 64 or 128.
  PageLister(int max_rows, int max_pages_per_head, int head_dim);

  int max_rows() const { return max_rows_; }

  int max_pages_per_head() const { return max_pages_; }

  // Lists for q [num_queries, num_heads, D], bf16 or, with q_is_f32, f32, each in ascending order
  // of the head's pages; valid until the next call. One launch, which may be captured. Throws Error
  // for options out of range. A head of more pages than max_pages_per_head is read as if it had no
  // more.
  PageLists list(const void* q, bool q_is_f32, int64_t num_queries, const HeadPages& heads,
                 const PageSummaries& summaries, float scale, const ListOptions& options,
                 cudaStream_t stream);

  // Keys listed over keys there, all heads and queries, of the latest lists that the device has
  // made; 1 before any.
  double density() const { return *density_.data(); }

 private:
  int max_rows_, max_pages_, head_dim_;
  DeviceArray<int32_t> offsets_, pages_;
  DeviceArray<int32_t> counts_;    // by row: pages, keys, keys there
  DeviceArray<uint32_t> arrived_;  // blocks that are done
  PageLockedArray<volatile double> density_;
};

}  // namespace longtake::cuda
