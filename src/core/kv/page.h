// The storage unit of keys and values: a page holds kPageTokens keys of one head, packed as the
// attention kernel reads them, with one bias per key that is added to its logit.
//
//   keys     f32: [D][64]   bf16: [D/2][64][2]   pairs of channels side by side, for dot products
//   values   f32: [64][D]   bf16: [64/2][D][2]   pairs of keys side by side
//   bias     f32 [64]       0 for a plain key, -inf for an unused slot, log m for m merged keys
//   buckets  u16 [64]       what the key was assigned to, kNoBucket: nothing; attention skips them
//
// Unused slots hold zeros, so that a probability of 0 times a value is 0.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "base/dtype.h"
#include "device/buffer.h"
#include "device/context.h"
#include "tensor/tensor.h"

namespace longtake {

inline constexpr int64_t kPageTokens = 64;

// Of a key or a query: the prompt token that it was assigned to (attention/prompt_buckets.h).
using Bucket = uint16_t;
inline constexpr Bucket kNoBucket = 0xffff;

struct KvPage {
  std::byte* keys = nullptr;
  std::byte* values = nullptr;
  float* bias = nullptr;
  Bucket* buckets = nullptr;
  int32_t num_keys = 0;   // used slots, from slot 0 on
  bool has_bias = false;  // false: every bias is 0, the kernel need not read it
  uint32_t version = 0;   // changes with the contents
};

using PageList = std::vector<KvPage>;

namespace cuda {
struct DevicePages;
int64_t num_heads(const DevicePages& pages);
// k, v [T, N, D] f32 | bf16 packed into pages in `store`, which is allocated; it must live as long
// as what is returned. The last token counts as `last_count`.
std::shared_ptr<const DevicePages> pack_tokens(Context& ctx, View k, View v, int64_t last_count,
                                               Buffer& store);
}  // namespace cuda

// What attention reads: for each head its pages, in any order.
struct KvView {
  DType dtype = DType::kF32;
  int64_t head_dim = 0;
  std::span<const PageList> heads;            // on the CPU
  const cuda::DevicePages* device = nullptr;  // on CUDA (kv/device_pages.h)

  int64_t num_heads() const;
};

// Bytes of keys, values, bias and buckets of one page; a multiple of 64.
size_t page_bytes(DType dtype, int64_t head_dim);

// Empties a page: zeros, every bias -inf, no buckets.
void clear_page(KvPage& page, DType dtype, int64_t head_dim);

// Writes tokens [begin, begin + count) of one head behind the page's last used slot, with bias 0.
// k, v [L, N, D] in the page's dtype; buckets [L], or empty: none.
void append_tokens(KvPage& page, View k, View v, int64_t head, int64_t begin, int64_t count,
                   std::span<const Bucket> buckets = {});

// One token out of a page and into one: key, value [D] f32, rounded to the page's dtype. `slot` of
// write_token may be the first unused one; then it becomes used.
void read_token(const KvPage& page, DType dtype, int64_t head_dim, int64_t slot, float* key,
                float* value);
void write_token(KvPage& page, DType dtype, int64_t head_dim, int64_t slot, const float* key,
                 const float* value, float bias, Bucket bucket = kNoBucket);

// Gives used slots 0, 1, ... these biases, [num_keys].
void set_biases(KvPage& page, const float* biases);

// Moves the last token of page `from` into used slot `slot` of page `to`; the pages may be one.
void move_last_token(KvPage& from, KvPage& to, DType dtype, int64_t head_dim, int64_t slot);

// Pages of equal size from slabs that never move; freed pages are used again.
class PageStore {
 public:
  PageStore(Device device, DType dtype, int64_t head_dim)
      : device_(device), dtype_(dtype), head_dim_(head_dim) {}

  DType dtype() const { return dtype_; }

  int64_t head_dim() const { return head_dim_; }

  // At least `count` pages can be taken without an allocation.
  void reserve(size_t count);
  // An empty page. Doubles the store when none is free.
  KvPage take();
  void give_back(const KvPage& page);

  size_t bytes() const;

  // Slabs allocated so far: the growth of a cache, as distinct from allocations of a step.
  size_t num_slabs() const { return slabs_.size(); }

 private:
  Device device_;
  DType dtype_;
  int64_t head_dim_;
  std::vector<Buffer> slabs_;
  std::vector<KvPage> free_;
  size_t num_pages_ = 0;
};

// A fixed set of keys and values, packed once: the prompt's, for cross attention. Lies on ctx's
// device; a graph that read it (device/graph.h) must be recorded again when another takes its
// place.
class KvPages {
 public:
  KvPages() = default;
  // k, v [T, N, D] f32 | bf16. last_count: of equal tokens that the last one stands for.
  KvPages(Context& ctx, View k, View v, int64_t last_count = 1);

  KvView view() const { return {dtype_, head_dim_, heads_, device_.get()}; }

  size_t bytes() const { return buffer_.bytes(); }

 private:
  DType dtype_ = DType::kF32;
  int64_t head_dim_ = 0;
  Buffer buffer_;
  std::vector<PageList> heads_;                      // on the CPU
  std::shared_ptr<const cuda::DevicePages> device_;  // on CUDA
};

}  // namespace longtake
