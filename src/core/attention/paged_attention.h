// Softmax attention on NVIDIA GPUs over pages of keys and values, dense or by page lists. CUDA
// builds only; the CPU's twin is attend.h.
//
// A page holds kPageKeys keys of one head as the tensor cores read them, so that one bulk copy
// brings it in and nothing is rearranged on the way:
//
//   keys     bf16 [D/64][128][64]   the 16-byte chunks of row r permuted by XOR with r mod 8
//   values   bf16 [D/64][128][64]   likewise; each row times its weight
//   weights  f32  [128]             how many plain keys a slot counts as: e^bias; 0: unused
//
// or, at half the bytes and for twice the products a second, in 8 bits (e4m3, 128 channels only):
//
//   keys     e4m3 [128][128]        over a scale of the page; chunks of row r permuted likewise
//   values   e4m3 [128][128]        channels by keys (the tensor cores want it so), over a power of
//                                   two of the page; keys of every 32 in the order in which the
//                                   accumulators of the first product hold them
//   weights  f32  [128]             over the same power of two
//   scales   f32  [4]               of keys; log2 of that of values; 0; 0
//
// A bias b on a key's logit multiplies its share of the softmax by e^b, above and below the line:
//   out = sum_j e^(s_j) (w_j v_j) / sum_j e^(s_j) w_j,   w_j = e^(b_j).
// With w_j v_j in store the products cost what they cost without a bias, and the sum below the line
// is a multiply-add in place of an add: the bias is free. Unused slots repeat a used key (so that
// the running maximum stays that of true logits) under weight 0 and value 0: no masking either.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "device/cuda_check.h"

namespace longtake::cuda {

inline constexpr int kPageKeys = 128;
inline constexpr int kTileQueries = 128;  // queries that share one list of pages

enum class PageFormat : uint8_t { kBf16, kFp8 };

// Bytes of one page; head_dim is 64 or 128, in 8 bits 128.
constexpr size_t paged_bytes(int head_dim, PageFormat format = PageFormat::kBf16) {
  const auto matrix = static_cast<size_t>(kPageKeys * head_dim);
  const size_t weights = kPageKeys * sizeof(float);
  return format == PageFormat::kBf16 ? 4 * matrix + weights : 2 * matrix + weights + 16;
}

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

// Writes tokens [0, num_tokens) of every head into pages: page i of head h becomes store page
// pages[h * ceil(num_tokens / kPageKeys) + i]. k, v bf16 [num_tokens, num_heads, D]; bias f32
// [num_heads, num_tokens] or null: the natural logarithm of the weights. All on the device.
void pack_pages(const void* k, const void* v, const float* bias, int64_t num_tokens, int num_heads,
                int head_dim, PageFormat format, const int32_t* pages, void* store,
                cudaStream_t stream);

}  // namespace longtake::cuda
