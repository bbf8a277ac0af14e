#include "kv/page.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "base/error.h"
#include "build_config.h"
#include "device/dispatch.h"
#include "device/parallel.h"
#include "ops/expect.h"

namespace longtake {
namespace {

size_t half_bytes(DType dtype, int64_t head_dim) {
  return static_cast<size_t>(kPageTokens * head_dim) * size_of(dtype);
}

KvPage page_at(std::byte* data, DType dtype, int64_t head_dim) {
  const size_t half = half_bytes(dtype, head_dim);
  auto* bias = reinterpret_cast<float*>(data + 2 * half);
  return {data, data + half, bias, reinterpret_cast<Bucket*>(bias + kPageTokens), 0, true};
}

// Of a word of two bf16.
float low_half(uint32_t word) {
  return std::bit_cast<float>(word << 16);
}

float high_half(uint32_t word) {
  return std::bit_cast<float>(word & 0xffff0000U);
}

uint32_t bits_of(float value) {
  return bf16(value).bits;
}

// Keys [D / kPair][64][kPair] and values [64 / kPair][D][kPair]: kPair = 2 for bf16, 1 for f32.
// k, v: the first token's row; tokens are `stride` elements apart. Goes over the page in the order
// of its memory, so that each cache line is written once.
template <typename T>
void pack(const KvPage& page, int64_t slot, const T* k, const T* v, int64_t stride, int64_t count,
          int64_t head_dim) {
  constexpr int64_t kPair = sizeof(T) == 2 ? 2 : 1;
  T* keys = reinterpret_cast<T*>(page.keys);
  T* values = reinterpret_cast<T*>(page.values);
  for (int64_t d = 0; d < head_dim; d += kPair) {
    T* row = keys + (d * kPageTokens + slot * kPair);
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t p = 0; p < kPair; ++p) row[i * kPair + p] = k[i * stride + d + p];
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    T* row = values + (slot + i) / kPair * kPair * head_dim + (slot + i) % kPair;
    for (int64_t d = 0; d < head_dim; ++d) row[d * kPair] = v[i * stride + d];
  }
}

}  // namespace

int64_t KvView::num_heads() const {
  if constexpr (kHasCuda) {
    if (device != nullptr) return cuda::num_heads(*device);
  }
  return static_cast<int64_t>(heads.size());
}

size_t page_bytes(DType dtype, int64_t head_dim) {
  return 2 * half_bytes(dtype, head_dim) + kPageTokens * (sizeof(float) + sizeof(Bucket));
}

void clear_page(KvPage& page, DType dtype, int64_t head_dim) {
  std::memset(page.keys, 0, 2 * half_bytes(dtype, head_dim));
  std::fill_n(page.bias, kPageTokens, -std::numeric_limits<float>::infinity());
  std::fill_n(page.buckets, kPageTokens, kNoBucket);
  page.num_keys = 0;
  page.has_bias = true;
  ++page.version;
}

void append_tokens(KvPage& page, View k, View v, int64_t head, int64_t begin, int64_t count,
                   std::span<const Bucket> buckets) {
  LONGTAKE_CHECK(page.num_keys + count <= kPageTokens, page.num_keys, " + ", count);
  LONGTAKE_CHECK(buckets.empty() || static_cast<int64_t>(buckets.size()) == k.dim(0));
  const int64_t head_dim = k.dim(2);
  const int64_t stride = k.dim(1) * head_dim;
  const int64_t first = begin * stride + head * head_dim;
  for_float_type(k.dtype(), [&]<typename T>() {
    pack(page, page.num_keys, k.data<T>() + first, v.data<T>() + first, stride, count, head_dim);
  });
  // A page with a bias other than 0 or -inf keeps its flag; one that just filled up drops it.
  const bool plain =
      std::all_of(page.bias, page.bias + page.num_keys, [](float bias) { return bias == 0.0F; });
  std::fill_n(page.bias + page.num_keys, count, 0.0F);
  if (buckets.empty())
    std::fill_n(page.buckets + page.num_keys, count, kNoBucket);
  else
    std::copy_n(buckets.begin() + begin, count, page.buckets + page.num_keys);
  page.num_keys += static_cast<int32_t>(count);
  ++page.version;
  page.has_bias = !plain || page.num_keys < kPageTokens;
}

void read_token(const KvPage& page, DType dtype, int64_t head_dim, int64_t slot, float* key,
                float* value) {
  if (dtype == DType::kF32) {
    const auto* keys = reinterpret_cast<const float*>(page.keys) + slot;
    for (int64_t d = 0; d < head_dim; ++d) key[d] = keys[d * kPageTokens];
    std::copy_n(reinterpret_cast<const float*>(page.values) + slot * head_dim, head_dim, value);
    return;
  }
  LONGTAKE_CHECK(dtype == DType::kBF16, "found ", name_of(dtype));
  // Two numbers are one word: of a key two channels, of a value those of two tokens.
  const auto* keys = reinterpret_cast<const uint32_t*>(page.keys) + slot;
  for (int64_t d = 0; d + 1 < head_dim; d += 2, keys += kPageTokens) {
    key[d] = low_half(*keys);
    key[d + 1] = high_half(*keys);
  }
  const auto* values = reinterpret_cast<const uint32_t*>(page.values) + slot / 2 * head_dim;
  if (slot % 2 == 0)
    std::transform(values, values + head_dim, value, low_half);
  else
    std::transform(values, values + head_dim, value, high_half);
}

void write_token(KvPage& page, DType dtype, int64_t head_dim, int64_t slot, const float* key,
                 const float* value, float bias, Bucket bucket) {
  LONGTAKE_CHECK(slot <= page.num_keys && slot < kPageTokens, slot, " of ", page.num_keys);
  if (dtype == DType::kF32) {
    auto* keys = reinterpret_cast<float*>(page.keys) + slot;
    for (int64_t d = 0; d < head_dim; ++d) keys[d * kPageTokens] = key[d];
    std::copy_n(value, head_dim, reinterpret_cast<float*>(page.values) + slot * head_dim);
  } else {
    LONGTAKE_CHECK(dtype == DType::kBF16, "found ", name_of(dtype));
    auto* keys = reinterpret_cast<uint32_t*>(page.keys) + slot;
    for (int64_t d = 0; d + 1 < head_dim; d += 2, keys += kPageTokens)
      *keys = bits_of(key[d]) | bits_of(key[d + 1]) << 16;
    auto* values = reinterpret_cast<uint32_t*>(page.values) + slot / 2 * head_dim;
    if (slot % 2 == 0) {
      for (int64_t d = 0; d < head_dim; ++d)
        values[d] = (values[d] & 0xffff0000U) | bits_of(value[d]);
    } else {
      for (int64_t d = 0; d < head_dim; ++d)
        values[d] = (values[d] & 0xffffU) | bits_of(value[d]) << 16;
    }
  }
  page.bias[slot] = bias;
  page.buckets[slot] = bucket;
  ++page.version;
  page.num_keys = std::max(page.num_keys, static_cast<int32_t>(slot) + 1);
  // An unused slot's bias is -inf; only a page that is full can be without any.
  page.has_bias =
      bias != 0.0F || page.num_keys < kPageTokens ||
      std::any_of(page.bias, page.bias + kPageTokens, [](float at) { return at != 0.0F; });
}

void set_biases(KvPage& page, const float* biases) {
  std::copy_n(biases, page.num_keys, page.bias);
  ++page.version;
  page.has_bias =
      std::any_of(page.bias, page.bias + kPageTokens, [](float at) { return at != 0.0F; });
}

void move_last_token(KvPage& from, KvPage& to, DType dtype, int64_t head_dim, int64_t slot) {
  LONGTAKE_CHECK(from.num_keys > 0);
  const int64_t last = from.num_keys - 1;
  std::vector<float> row(static_cast<size_t>(2 * head_dim));
  const float bias = from.bias[last];
  read_token(from, dtype, head_dim, last, row.data(), row.data() + head_dim);
  write_token(to, dtype, head_dim, slot, row.data(), row.data() + head_dim, bias,
              from.buckets[last]);
  std::fill(row.begin(), row.end(), 0.0F);
  write_token(from, dtype, head_dim, last, row.data(), row.data() + head_dim,
              -std::numeric_limits<float>::infinity());
  from.num_keys = static_cast<int32_t>(last);
}

void PageStore::reserve(size_t count) {
  if (free_.size() >= count) return;
  const size_t fresh = count - free_.size();
  const size_t bytes = page_bytes(dtype_, head_dim_);
  slabs_.emplace_back(device_, fresh * bytes);
  num_pages_ += fresh;
  free_.reserve(num_pages_);
  std::byte* data = slabs_.back().data();
  // Taken from the back: fill in backwards, so that pages are handed out in the order of memory.
  for (size_t i = fresh; i > 0; --i)
    free_.push_back(page_at(data + (i - 1) * bytes, dtype_, head_dim_));
}

KvPage PageStore::take() {
  constexpr size_t kLeastGrowth = 64;
  if (free_.empty()) reserve(std::max(num_pages_, kLeastGrowth));
  KvPage page = free_.back();
  free_.pop_back();
  clear_page(page, dtype_, head_dim_);
  return page;
}

void PageStore::give_back(const KvPage& page) {
  free_.push_back(page);
}

size_t PageStore::bytes() const {
  return num_pages_ * page_bytes(dtype_, head_dim_);
}

KvPages::KvPages(Context& ctx, View k, View v, int64_t last_count) {
  expect_rank("keys", k, 3);
  expect_float("keys", k);
  expect_shape("values", v, k.shape());
  expect_dtype("values", v, k.dtype());
  LONGTAKE_CHECK(last_count == 1 || (last_count > 1 && k.dim(0) > 0), last_count);
  dtype_ = k.dtype();
  head_dim_ = k.dim(2);
  if (ctx.device().kind == DeviceKind::kCuda) {
    if constexpr (kHasCuda) device_ = cuda::pack_tokens(ctx, k, v, last_count, buffer_);
    return;
  }
  const int64_t tokens = k.dim(0);
  const int64_t heads = k.dim(1);
  const int64_t pages = (tokens + kPageTokens - 1) / kPageTokens;
  const size_t bytes = page_bytes(dtype_, head_dim_);
  buffer_ = Buffer(ctx.device(), static_cast<size_t>(heads * pages) * bytes);
  heads_.resize(static_cast<size_t>(heads));
  std::byte* data = buffer_.data();
  for (int64_t head = 0; head < heads; ++head) {
    for (int64_t begin = 0; begin < tokens; begin += kPageTokens, data += bytes) {
      KvPage page = page_at(data, dtype_, head_dim_);
      clear_page(page, dtype_, head_dim_);
      append_tokens(page, k, v, head, begin, std::min(kPageTokens, tokens - begin));
      if (last_count > 1 && begin + kPageTokens >= tokens) {
        page.bias[page.num_keys - 1] = std::log(static_cast<float>(last_count));
        page.has_bias = true;
      }
      heads_[static_cast<size_t>(head)].push_back(page);
    }
  }
}

}  // namespace longtake
