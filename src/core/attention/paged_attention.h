// Softmax attention on NVIDIA GPUs over pages of keys and values, dense or by page lists. CUDA
// builds only; the CPU's twin is attend.h.
//
// A bias b on a key's logit multiplies its share of the softmax by e^b, above and below the line:
//   out = sum_j e^(s_j) (w_j v_j) / sum_j e^(s_j) w_j,   w_j = e^(b_j).
// With w_j v_j in store (kv/device_pages.h) the products cost what they cost without a bias, and
// the sum below the line is a multiply-add in place of an add: the bias is free.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "device/cuda_check.h"
#include "kv/device_pages.h"

namespace longtake::cuda {

inline constexpr int kTileQueries = 128;  // queries that share one list of pages

// Which pages each row reads. Row (head * tiles + tile), tiles = ceil(num_queries / kTileQueries),
// reads pages[first[row]] .. pages[first[row] + offsets[row + 1] - offsets[row] - 1], all on the
// device. Rows may share a stretch of `pages`: for dense attention all tiles of a head do.
struct PageLists {
  int32_t num_rows = 0;
  const int32_t* offsets = nullptr;  // [num_rows + 1], offsets[0] = 0: lengths summed up
  const int32_t* first = nullptr;    // [num_rows]; null: the same as offsets
  const int32_t* pages = nullptr;    // page numbers in the store
};

enum class AttentionKernel : uint8_t {
  kBest,      // what suits the device
  kPortable,  // mma.sync and cp.async: compute capability 8.0 and later
  kHopper,    // wgmma and bulk copies: 9.0
};

// The kernel with its plan and workspace: as large as the device, whatever the number of keys.
//
// Work is balanced on the device without a look from the host: plan() deals whole rows to thread
// blocks in turn, neighbours in step so that they find each other's pages in the second-level
// cache, and cuts the last rows between the blocks so that all of them read equally many pages. Cut
// rows are put together by a second kernel, in a fixed order: the same lists give the same bits.
class PagedAttention {
 public:
  // For the current device. Throws Error for a head_dim other than 64 and 128, and when the device
  // cannot run the kernel; pages in 8 bits need 128 channels and Hopper.
  explicit PagedAttention(int head_dim, AttentionKernel kernel = AttentionKernel::kBest,
                          PageFormat format = PageFormat::kBf16);

  // Once for every change of lists.offsets; the lists of later calls to run may differ in `first`
  // and `pages` only.
  void plan(const PageLists& lists, cudaStream_t stream);

  // out = softmax(q k^T * scale + log w) v. q, out bf16 [num_queries, num_heads, D]; store: pages
  // of paged_bytes(D, format), aligned to 16 bytes; scale > 0. Queries without any key, or with
  // none of positive weight, give zeros.
  void run(const void* q, int64_t num_queries, int num_heads, const void* store,
           const PageLists& lists, float scale, void* out, cudaStream_t stream);

  AttentionKernel kernel() const { return kernel_; }

  size_t workspace_bytes() const;

 private:
  int head_dim_;
  AttentionKernel kernel_;
  PageFormat format_;
  int num_blocks_ = 0;
  DeviceArray<int32_t> plan_;
  DeviceArray<float> partial_;
};

}  // namespace longtake::cuda
