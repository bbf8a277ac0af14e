// AnnSA on NVIDIA GPUs: which pages a tile of queries attends to, found and listed on the device.
// CUDA builds only; the CPU's twin, with the reasons for the rule, is select.h.
//
// The rule: a page is known by its mean key and by how many plain keys it stands for. The softmax
// of every query over all pages so known gives each of them a mass; a tile reads the pages of most
// mass, summed over its queries. On the GPU the products with the mean keys are exact: on tensor
// cores they cost less than the estimates (match.h) that pay on a CPU.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "attention/paged_attention.h"
#include "device/cuda_check.h"

namespace longtake::cuda {

struct ListOptions {
  double density = 0.25;  // pages listed over pages there, by head, rounded up
  int first_pages = 0;    // at both ends of a head's pages: always listed
  int last_pages = 0;
};

class PageLister {
 public:
  // For at most so many rows (heads times tiles of kTileQueries queries) and pages of one head;
  // head_dim 64 or 128.
  PageLister(int max_rows, int max_pages_per_head, int head_dim);

  // Lists for q bf16 [num_queries, num_heads, D], each in ascending order of the head's pages;
  // valid until the next call. Throws Error for options out of range. The host is not waited for:
  // a head of more pages than max_pages_per_head is read as if it had no more.
  PageLists list(const void* q, int64_t num_queries, const HeadPages& heads,
                 const PageSummaries& summaries, float scale, const ListOptions& options,
                 cudaStream_t stream);

 private:
  int max_rows_, max_pages_, head_dim_;
  DeviceArray<int32_t> offsets_, pages_;
};

}  // namespace longtake::cuda
