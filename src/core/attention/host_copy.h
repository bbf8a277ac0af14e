// HostCopy: what attention reads of a cache or a prompt, where the host can look at it. For
// measurements: making one waits for a device.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "attention/attend.h"
#include "device/context.h"
#include "kv/page.h"

namespace longtake {

namespace cuda {

// Pages as they lie on the device.
struct RawPages {
  size_t page_bytes = 0;
  std::vector<int32_t> numbers;             // in the store, ascending
  std::unique_ptr<std::byte[]> bytes;       // of those pages, one after the other
  std::vector<std::vector<int32_t>> heads;  // what each head reads: places among `numbers`
};

// A device's lists begin with the chunk in work, of chunk_tokens; here it comes last. Waits.
RawPages copy_pages(Context& ctx, const DevicePages& pages, int64_t chunk_tokens);

// Store pages that each row reads (attention/paged_attention.h). Waits.
std::vector<std::vector<int32_t>> copy_lists(Context& ctx, const PageLists& lists);

inline constexpr int64_t kHostPages = 2;  // that a page of the device becomes

// The same as pages of the host; values lose their weights.
void unpack(const RawPages& raw, DType dtype, int64_t head_dim, PageStore& store,
            std::vector<PageList>& heads);

}  // namespace cuda

// A selection that owns its lists.
struct HostSelection {
  int64_t tile_queries = 0;
  std::vector<int32_t> offsets, pages;

  Selection view() const { return {tile_queries, offsets, pages}; }
};

class HostCopy {
 public:
  // chunk_tokens: of the chunk in work that a cache's view shows; 0: none, as in a history alone or
  // in a prompt. On the CPU nothing is copied: the pages are the view's own, which must stay.
  HostCopy(Context& ctx, const KvView& view, int64_t chunk_tokens);
  ~HostCopy();

  // History, then the chunk in work; unused slots are not shown (a group of weight 0 that ends a
  // page of the device is taken for one). Several threads may ask.
  KvView view() const;

  // A selection made over the view, in pages of the copy.
  HostSelection selection(Context& ctx, const Selection& selection) const;

 private:
  struct Unpacked;

  DType dtype_;
  int64_t head_dim_;
  std::vector<PageList> heads_;          // on the CPU
  std::unique_ptr<cuda::RawPages> raw_;  // of a device
  std::unique_ptr<Unpacked> unpacked_;
};

}  // namespace longtake
