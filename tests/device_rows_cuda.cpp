#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "base/dtype.h"
#include "device/cuda_check.h"
#include "device_rows.h"
#include "kv/device_pages.h"

namespace longtake::testing_support {
namespace {

using cuda::DevicePages;
using cuda::kPageKeys;

template <typename T>
std::vector<T> downloaded(const void* from, size_t count) {
  std::vector<T> out(count);
  cuda::check(cudaMemcpy(out.data(), from, count * sizeof(T), cudaMemcpyDeviceToHost), "download");
  return out;
}

// A page on the CPU.
class Page {
 public:
  Page(const DevicePages& pages, int32_t number)
      : dim_(pages.head_dim), is_wide_(pages.format == cuda::PageFormat::kF32) {
    const size_t bytes = cuda::paged_bytes(dim_, pages.format);
    raw_ = downloaded<std::byte>(
        static_cast<const std::byte*>(pages.store) + static_cast<size_t>(number) * bytes, bytes);
    weights_ = reinterpret_cast<const float*>(raw_.data() + 2 * matrix());
  }

  int64_t num_keys() const {
    return std::count_if(weights_, weights_ + kPageKeys, [](float weight) { return weight > 0; });
  }

  // Slots are used from the first on, with weight 1 where nothing merges.
  void read(int slot, float* key, float* value) const {
    for (int d = 0; d < dim_; ++d) {
      key[d] = number(0, slot, d);
      value[d] = number(matrix(), slot, d);
    }
  }

 private:
  size_t matrix() const { return static_cast<size_t>(kPageKeys * dim_) * (is_wide_ ? 4 : 2); }

  float number(size_t base, int row, int channel) const {
    if (is_wide_) return reinterpret_cast<const float*>(raw_.data() + base)[row * dim_ + channel];
    const int chunk = channel / 8;
    const int offset =
        chunk / 8 * (kPageKeys * 128) + row * 128 + ((chunk % 8 ^ row % 8) * 16) + channel % 8 * 2;
    bf16 x;
    std::memcpy(&x, raw_.data() + base + static_cast<size_t>(offset), sizeof x);
    return static_cast<float>(x);
  }

  int dim_;
  bool is_wide_;
  std::vector<std::byte> raw_;
  const float* weights_;
};

}  // namespace

Rows device_rows(Context& ctx, const KvView& view, int64_t sink_frames, int64_t frame_tokens) {
  ctx.synchronize();
  const DevicePages& pages = *view.device;
  const auto heads = static_cast<size_t>(pages.heads.num_heads);
  const auto begin = downloaded<int32_t>(pages.heads.begin, heads + 1);
  const auto list = downloaded<int32_t>(pages.heads.pages, static_cast<size_t>(begin.back()));
  const int64_t frame_pages = (frame_tokens + kPageKeys - 1) / kPageKeys;
  const int64_t work = pages.first_pages - (sink_frames + 1) * frame_pages;
  const int64_t frames = (begin[1] - begin[0] - work) / frame_pages;
  const int64_t sink = std::min(sink_frames, frames);
  // In the order of the rows.
  std::vector<int64_t> order;
  const auto add = [&](int64_t first, int64_t count) {
    for (int64_t i = 0; i < count; ++i) order.push_back(first + i);
  };
  add(work, sink * frame_pages);
  for (int64_t f = frames - 1; f >= sink; --f) add(work + f * frame_pages, frame_pages);
  add(0, work);

  std::vector<Page> all;
  int64_t tokens = 0;
  for (size_t head = 0; head < heads; ++head) {
    for (const int64_t at : order) {
      all.emplace_back(pages, list[static_cast<size_t>(begin[head] + at)]);
      if (head == 0) tokens += all.back().num_keys();
    }
  }
  const Shape shape{tokens, static_cast<int64_t>(heads), view.head_dim};
  Rows rows{Tensor(Device{}, DType::kF32, shape), Tensor(Device{}, DType::kF32, shape)};
  for (size_t head = 0; head < heads; ++head) {
    int64_t token = 0;
    for (size_t i = 0; i < order.size(); ++i) {
      const Page& page = all[head * order.size() + i];
      for (int slot = 0; slot < page.num_keys(); ++slot, ++token) {
        const int64_t at =
            (token * static_cast<int64_t>(heads) + static_cast<int64_t>(head)) * view.head_dim;
        page.read(slot, rows.k.data<float>() + at, rows.v.data<float>() + at);
      }
    }
  }
  return rows;
}

}  // namespace longtake::testing_support
