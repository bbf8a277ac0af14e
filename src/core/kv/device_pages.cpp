#include "kv/device_pages.h"

#include <numeric>
#include <vector>

#include "device/cuda_device.h"
#include "device/cuda_runtime.h"
#include "kv/page.h"

namespace longtake::cuda {

int64_t num_heads(const DevicePages& pages) {
  return pages.heads.num_heads;
}

std::shared_ptr<const DevicePages> pack_tokens(Context& ctx, View k, View v, Buffer& store) {
  auto pages = std::make_shared<DevicePages>();
  const auto heads = static_cast<int>(k.dim(1)), dim = static_cast<int>(k.dim(2));
  const auto per_head = static_cast<int>((k.dim(0) + kPageKeys - 1) / kPageKeys);
  pages->format = k.dtype() == DType::kF32 ? PageFormat::kF32 : PageFormat::kBf16;
  expect_head_dim(dim, pages->format);
  pages->head_dim = dim;
  pages->max_pages_per_head = per_head;
  pages->num_tokens = k.dim(0);
  // Page numbers, which are in order, and where each head's begin stand behind the pages.
  const size_t store_bytes =
      static_cast<size_t>(heads * per_head) * paged_bytes(dim, pages->format);
  std::vector<int32_t> numbers(static_cast<size_t>(heads * per_head + heads + 1));
  std::iota(numbers.begin(), numbers.end(), 0);
  int32_t* begin = numbers.data() + heads * per_head;
  for (int h = 0; h <= heads; ++h) begin[h] = h * per_head;
  store = Buffer(ctx.device(), store_bytes + numbers.size() * sizeof(int32_t));
  auto* table = reinterpret_cast<int32_t*>(store.data() + store_bytes);
  copy_bytes_now(numbers.data(), table, numbers.size() * sizeof(int32_t), Direction::kToDevice);
  pages->store = store.data();
  pages->heads = {heads, table + heads * per_head, table};
  pack_pages(k.raw(), v.raw(), nullptr, k.dim(0), heads, dim, pages->format, table, store.data(),
             stream_of(ctx));
  return pages;
}

}  // namespace longtake::cuda
