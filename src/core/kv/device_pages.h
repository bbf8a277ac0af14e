// Pages of keys and values on NVIDIA GPUs: their layout, what is known of each, and what attention
// reads of a cache. CUDA builds only; the CPU's twin is page.h.
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
// or, for comparison with the CPU, in f32 (any number of channels that is a multiple of 16):
//
//   keys     f32  [128][D]
//   values   f32  [128][D]          each row times its weight
//   weights  f32  [128]
//
// Unused slots repeat a used key (so that the running maximum stays that of true logits) under
// weight 0 and value 0: no masking.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "device/cuda_check.h"

namespace longtake::cuda {

inline constexpr int kPageKeys = 128;

enum class PageFormat : uint8_t { kBf16, kFp8, kF32 };

// Bytes of one page, a multiple of 16.
constexpr size_t paged_bytes(int head_dim, PageFormat format = PageFormat::kBf16) {
  const auto matrix = static_cast<size_t>(kPageKeys * head_dim);
  const size_t weights = kPageKeys * sizeof(float);
  switch (format) {
    case PageFormat::kBf16:
      return 4 * matrix + weights;
    case PageFormat::kFp8:
      return 2 * matrix + weights + 16;
    case PageFormat::kF32:
      return 8 * matrix + weights;
  }
  return 0;
}

// Throws Error for pages that no kernel reads.
void expect_head_dim(int head_dim, PageFormat format);

// Writes tokens [0, num_tokens) of every head into pages: page i of head h becomes store page
// pages[h * ceil(num_tokens / kPageKeys) + i]. k, v [num_tokens, num_heads, D] bf16, for kF32 f32;
// bias f32 [num_heads, num_tokens] or null: the natural logarithm of the weights. All on the
// device.
void pack_pages(const void* k, const void* v, const float* bias, int64_t num_tokens, int num_heads,
                int head_dim, PageFormat format, const int32_t* pages, void* store,
                cudaStream_t stream);

// The pages of all heads, in order, on the device: head h has pages[begin[h]] ... pages[begin[h+1]
// - 1], numbers in the store.
struct HeadPages {
  int32_t num_heads = 0;
  const int32_t* begin = nullptr;  // [num_heads + 1]
  const int32_t* pages = nullptr;
};

// Pages of one store to be summed up: what was written.
struct SummaryJob {
  const void* store = nullptr;
  const int32_t* pages = nullptr;  // [count]; numbers below 0 are none
  int count = 0;
  // Out, by number of the page: as PageSummaries.
  void* means = nullptr;
  float* weights = nullptr;
  int32_t* counts = nullptr;

  bool operator==(const SummaryJob&) const = default;
};

// What is known of each page of a store: what AnnSA chooses by (attention/page_lists.h).
class PageSummaries {
 public:
  // head_dim 64 or 128.
  PageSummaries(int64_t store_pages, int head_dim, PageFormat format = PageFormat::kBf16);

  // Looks at `count` pages again: after they were written. Numbers below 0 are skipped.
  void update(const void* store, const int32_t* pages, int count, cudaStream_t stream);

  // The same later, by update_all().
  SummaryJob job(const void* store, const int32_t* pages, int count) const {
    return {store, pages, count, means_.data(), weights_.data(), counts_.data()};
  }

  // Jobs [num_jobs] on the device, of stores of this kind; none has more than most_pages pages.
  void update_all(const SummaryJob* jobs, int num_jobs, int most_pages, cudaStream_t stream) const;

  const void* means() const { return means_.data(); }  // bf16 [store_pages, D]

  const float* weights() const { return weights_.data(); }  // f32 [store_pages]: summed

  const int32_t* counts() const { return counts_.data(); }  // i32 [store_pages]: used slots

 private:
  int head_dim_;
  PageFormat format_;
  DeviceArray<uint16_t> means_;
  DeviceArray<float> weights_;
  DeviceArray<int32_t> counts_;
};

// What attention reads of a cache or a prompt. What it points to lies on the device, belongs to the
// cache and may change by work on the stream alone, without the host; `version` counts the host's
// calls that may have changed heads.begin.
struct DevicePages {
  PageFormat format = PageFormat::kBf16;
  int head_dim = 0;
  const void* store = nullptr;
  HeadPages heads;
  int max_pages_per_head = 0;
  int64_t num_tokens = 0;                    // of every head, where the host knows: of a prompt
  const PageSummaries* summaries = nullptr;  // null: none are kept
  int first_pages = 0, last_pages = 0;       // at both ends of a head's pages: always read
  uint64_t version = 0;
};

}  // namespace longtake::cuda
