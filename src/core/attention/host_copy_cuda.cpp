#include <algorithm>
#include <cmath>
#include <cstring>

#include "attention/host_copy.h"
#include "attention/paged_attention.h"
#include "base/error.h"
#include "device/cuda_runtime.h"
#include "kv/device_layout.h"
#include "kv/device_weight.h"

namespace longtake::cuda {
namespace {

static_assert(kPageKeys == kHostPages * kPageTokens);

template <typename T>
std::vector<T> read(const T* from, size_t count, cudaStream_t stream) {
  std::vector<T> out(count);
  check(cudaMemcpyAsync(out.data(), from, count * sizeof(T), cudaMemcpyDeviceToHost, stream),
        "copy from the GPU");
  check(cudaStreamSynchronize(stream), "copy from the GPU");
  return out;
}

float narrowed(const std::byte* at) {
  uint16_t bits;
  std::memcpy(&bits, at, sizeof bits);
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float out;
  std::memcpy(&out, &wide, sizeof out);
  return out;
}

// Row `row` of a matrix of a page (device_pages.h) in f32.
void read_row(const std::byte* matrix, DType dtype, int64_t head_dim, int64_t row, float* out) {
  if (dtype == DType::kF32) {
    std::memcpy(out, matrix + row * head_dim * 4, static_cast<size_t>(head_dim) * 4);
    return;
  }
  for (int64_t chunk = 0; chunk < head_dim / 8; ++chunk) {
    const std::byte* at =
        matrix + chunk / 8 * (kPageKeys * 128) + row * 128 + ((chunk % 8 ^ row % 8) * 16);
    for (int64_t i = 0; i < 8; ++i) out[chunk * 8 + i] = narrowed(at + 2 * i);
  }
}

}  // namespace

RawPages copy_pages(Context& ctx, const DevicePages& pages, int64_t chunk_tokens) {
  LONGTAKE_CHECK(pages.format != PageFormat::kFp8, "pages of 8 bits are not copied");
  cudaStream_t stream = stream_of(ctx);
  const auto heads = static_cast<size_t>(pages.heads.num_heads);
  const auto chunk = static_cast<int32_t>((chunk_tokens + kPageKeys - 1) / kPageKeys);
  const std::vector<int32_t> begin = read(pages.heads.begin, heads + 1, stream);
  const std::vector<int32_t> listed =
      read(pages.heads.pages, static_cast<size_t>(begin[heads]), stream);
  RawPages out;
  out.page_bytes = paged_bytes(pages.head_dim, pages.format);
  for (size_t head = 0; head < heads; ++head) {
    const auto first = listed.begin() + begin[head], last = listed.begin() + begin[head + 1];
    std::vector<int32_t>& own = out.heads.emplace_back(first + chunk, last);
    own.insert(own.end(), first, first + chunk);
    out.numbers.insert(out.numbers.end(), own.begin(), own.end());
  }
  std::sort(out.numbers.begin(), out.numbers.end());
  out.numbers.erase(std::unique(out.numbers.begin(), out.numbers.end()), out.numbers.end());
  for (std::vector<int32_t>& own : out.heads) {
    for (int32_t& page : own)
      page = static_cast<int32_t>(std::lower_bound(out.numbers.begin(), out.numbers.end(), page) -
                                  out.numbers.begin());
  }
  out.bytes = std::make_unique_for_overwrite<std::byte[]>(out.numbers.size() * out.page_bytes);
  const auto* store = static_cast<const std::byte*>(pages.store);
  for (size_t i = 0; i < out.numbers.size();) {
    size_t end = i + 1;  // of pages that lie side by side
    while (end < out.numbers.size() && out.numbers[end] == out.numbers[end - 1] + 1) ++end;
    check(cudaMemcpyAsync(out.bytes.get() + i * out.page_bytes,
                          store + static_cast<size_t>(out.numbers[i]) * out.page_bytes,
                          (end - i) * out.page_bytes, cudaMemcpyDeviceToHost, stream),
          "copy of pages");
    i = end;
  }
  check(cudaStreamSynchronize(stream), "copy of pages");
  return out;
}

std::vector<std::vector<int32_t>> copy_lists(Context& ctx, const PageLists& lists) {
  cudaStream_t stream = stream_of(ctx);
  const auto count = static_cast<size_t>(lists.num_lists);
  const std::vector<int32_t> offsets = read(lists.offsets, count + 1, stream);
  const size_t room = lists.stride > 0 ? count * static_cast<size_t>(lists.stride)
                                       : static_cast<size_t>(offsets[count]);
  const std::vector<int32_t> pages = read(lists.pages, room, stream);
  std::vector<std::vector<int32_t>> rows;
  for (int32_t row = 0; row < lists.num_rows(); ++row) {
    const auto list = static_cast<size_t>(row / lists.rows_per_list);
    const int32_t length = offsets[list + 1] - offsets[list];
    const auto first = pages.begin() + (lists.stride > 0 ? row / lists.rows_per_list * lists.stride
                                                         : offsets[list]);
    rows.emplace_back(first, first + length);
  }
  return rows;
}

void unpack(const RawPages& raw, DType dtype, int64_t head_dim, PageStore& store,
            std::vector<PageList>& heads) {
  const size_t matrix = (raw.page_bytes - kPageKeys * sizeof(float)) / 2;
  std::vector<float> key(static_cast<size_t>(head_dim)), value(key.size());
  heads.resize(raw.heads.size());
  for (size_t head = 0; head < raw.heads.size(); ++head) {
    for (const int32_t place : raw.heads[head]) {
      const std::byte* page = raw.bytes.get() + static_cast<size_t>(place) * raw.page_bytes;
      float weights[kPageKeys];
      std::memcpy(weights, page + 2 * matrix, sizeof weights);
      int64_t used = kPageKeys;
      while (used > 0 && weights[used - 1] == 0) --used;
      for (int64_t part = 0; part < kHostPages; ++part) {
        KvPage to = store.take();
        for (int64_t slot = 0; slot < kPageTokens; ++slot) {
          const int64_t row = part * kPageTokens + slot;
          if (row >= used) break;
          read_row(page, dtype, head_dim, row, key.data());
          read_row(page + matrix, dtype, head_dim, row, value.data());
          const float weight = weights[row];
          if (weight > 0 && weight != 1) {
            for (float& x : value) x /= weight;
          }
          write_token(to, dtype, head_dim, slot, key.data(), value.data(), bias_of(weight));
        }
        heads[head].push_back(to);
      }
    }
  }
}

}  // namespace longtake::cuda
