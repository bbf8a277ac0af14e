// Softmax attention on NVIDIA GPUs over pages of keys and values, dense or by page lists. CUDA
// builds only; the CPU's twin is attend.h.
//
// A bias b on a key's logit multiplies its share of the softmax by e^b, above and below the line:
//   out = sum_j e^(s_j) (w_j v_j) / sum_j e^(s_j) w_j,   w_j = e^(b_j).
// With w_j v_j in store (kv/device_pages.h) the products cost what they cost without a bias, and
// the sum below the line is a multiply-add in place of an add: the bias is free.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstddef>
#include <cstdint>

#include "device/cuda_check.h"
#include "kv/device_pages.h"

namespace longtake::cuda {

inline constexpr int kTileQueries = 128;  // queries that share one list of pages

// Which pages each row reads, all on the device. Row (head * tiles + tile), tiles =
// ceil(num_queries / kTileQueries), reads list row / rows_per_list: for dense attention all tiles
// of a head share one. List i has offsets[i + 1] - offsets[i] pages from pages[i * stride] on, or,
// where stride is 0, from pages[offsets[i]].
struct PageLists {
  int32_t num_lists = 0;
  int32_t rows_per_list = 1;
  int32_t max_pages = 0;  // no list is longer, for all that the host knows: how work is shared out
  int32_t stride = 0;
  const int32_t* offsets = nullptr;  // [num_lists + 1], offsets[0] = 0: lengths summed up
  const int32_t* pages = nullptr;    // page numbers in the store

  constexpr int32_t num_rows() const { return num_lists * rows_per_list; }
};

// How many clusters of 1, 2, 4, 8 and 16 blocks the device holds at a time; 0: none so large.
using ClusterRoom = std::array<int, 5>;

enum class AttentionKernel : uint8_t {
  kBest,      // what suits the device
  kPortable,  // mma.sync and cp.async: compute capability 8.0 and later
  kHopper,    // wgmma and bulk copies: 9.0
};

// The kernel with its workspace: as large as the device, whatever the number of keys.
//
// Work is shared out on the device, so that the host need not know how long the lists are, in one
// of two ways:
//   by rows    a row is one block's, or that of a cluster of 2 to 16 blocks (Hopper), each of which
//              reads as many of its pages; they exchange what they have through shared memory. One
//              launch: for few rows, or short ones.
//   by shares  every block reads equally many pages: whole rows are dealt to the blocks in turn,
//              neighbours in step so that they find each other's pages in the second-level cache,
//              and the last rows are cut between the blocks. A second launch puts cut rows
//              together.
// Either way the order is fixed: the same lists give the same bits.
class PagedAttention {
 public:
  // For the current device. Throws Error for a head_dim that no kernel reads (kv/device_pages.h),
  // and when the device cannot run the kernel; pages in 8 bits need Hopper.
  explicit PagedAttention(int head_dim, AttentionKernel kernel = AttentionKernel::kBest,
                          PageFormat format = PageFormat::kBf16);

  // out = softmax(q k^T * scale + log w) v. q, out bf16 (for pages in f32: f32) [num_queries,
  // num_heads, D]; store: pages of paged_bytes(D, format), aligned to 16 bytes; scale > 0. Queries
  // without any key, or with none of positive weight, give zeros. May be captured.
  void run(const void* q, int64_t num_queries, int num_heads, const void* store,
           const PageLists& lists, float scale, void* out, cudaStream_t stream);

  AttentionKernel kernel() const { return kernel_; }

  size_t workspace_bytes() const;

 private:
  int head_dim_;
  AttentionKernel kernel_;
  PageFormat format_;
  int num_blocks_ = 0;
  ClusterRoom room_{};
  DeviceArray<int32_t> plan_;
  DeviceArray<float> partial_;
};

}  // namespace longtake::cuda
