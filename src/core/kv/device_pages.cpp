#include "kv/device_pages.h"

#include <cmath>
#include <numeric>
#include <vector>

#include "device/cuda_device.h"
#include "device/cuda_runtime.h"
#include "kv/page.h"

namespace longtake::cuda {

int64_t num_heads(const DevicePages& pages) {
  return pages.heads.num_heads;
}

std::shared_ptr<const DevicePages> pack_tokens(Context& ctx, View k, View v, int64_t last_count,
                                               Buffer& store) {
  auto pages = std::make_shared<DevicePages>();
  const auto heads = static_cast<int>(k.dim(1)), dim = static_cast<int>(k.dim(2));
  const auto per_head = static_cast<int>((k.dim(0) + kPageKeys - 1) / kPageKeys);
  pages->format = k.dtype() == DType::kF32 ? PageFormat::kF32 : PageFormat::kBf16;
  expect_head_dim(dim, pages->format);
  pages->head_dim = dim;
  pages->max_pages_per_head = per_head;
  pages->num_tokens = k.dim(0);
  // Page numbers, which are in order, where each head's begin, and biases stand behind the pages.
  const size_t store_bytes =
      static_cast<size_t>(heads * per_head) * paged_bytes(dim, pages->format);
  std::vector<int32_t> numbers(static_cast<size_t>(heads * per_head + heads + 1));
  std::iota(numbers.begin(), numbers.end(), 0);
  int32_t* begin = numbers.data() + heads * per_head;
  for (int h = 0; h <= heads; ++h) begin[h] = h * per_head;
  std::vector<float> biases;
  if (last_count > 1) {
    biases.resize(static_cast<size_t>(k.dim(0) * heads), 0.0F);
    for (size_t i = 0; i < biases.size(); ++i) {
      if ((i + 1) % static_cast<size_t>(k.dim(0)) == 0)
        biases[i] = std::log(static_cast<float>(last_count));
    }
  }
  store = Buffer(ctx.device(),
                 store_bytes + numbers.size() * sizeof(int32_t) + biases.size() * sizeof(float));
  auto* table = reinterpret_cast<int32_t*>(store.data() + store_bytes);
  copy_bytes_now(numbers.data(), table, numbers.size() * sizeof(int32_t), Direction::kToDevice);
  float* device_biases = nullptr;
  if (!biases.empty()) {
    device_biases = reinterpret_cast<float*>(table + numbers.size());
    copy_bytes_now(biases.data(), device_biases, biases.size() * sizeof(float),
                   Direction::kToDevice);
  }
  pages->store = store.data();
  pages->heads = {heads, table + heads * per_head, table};
  pack_pages(k.raw(), v.raw(), device_biases, k.dim(0), heads, dim, pages->format, table,
             store.data(), stream_of(ctx));
  return pages;
}

}  // namespace longtake::cuda
