// Packing of pages and their summaries.
#include "kv/device_pages.h"

#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include "kv/device_pages.cuh"

namespace longtake::cuda {

namespace {

// One block a page, one thread a chunk of 8 channels at a time.
__global__ void __launch_bounds__(256)
    pack_kernel(const uint4* k, const uint4* v, const float* bias, int num_tokens, int num_heads,
                int head_dim, const int32_t* pages, unsigned char* store) {
  const int head = blockIdx.y, chunks = head_dim / 8;
  const int begin = blockIdx.x * kPageKeys, used = min(kPageKeys, num_tokens - begin);
  unsigned char* page =
      store + static_cast<int64_t>(pages[head * gridDim.x + blockIdx.x]) * paged_bytes(head_dim);
  const int half = kPageKeys * head_dim * 2;
  const auto weight_of = [&](int slot) {
    if (slot >= used) return 0.0F;
    return bias ? expf(bias[static_cast<int64_t>(head) * num_tokens + begin + slot]) : 1.0F;
  };
  for (int i = threadIdx.x; i < kPageKeys * chunks; i += blockDim.x) {
    const int slot = i / chunks, chunk = i % chunks;
    const int64_t token = begin + min(slot, used - 1);
    const int64_t at = (token * num_heads + head) * chunks + chunk;
    *reinterpret_cast<uint4*>(page + chunk_offset(slot, chunk)) = k[at];
    uint4 value = slot < used ? v[at] : uint4{};
    if (bias && slot < used) {
      const float weight = weight_of(slot);
      auto* pairs = reinterpret_cast<__nv_bfloat162*>(&value);
      for (int p = 0; p < 4; ++p) {
        const float2 pair = __bfloat1622float2(pairs[p]);
        pairs[p] = __floats2bfloat162_rn(pair.x * weight, pair.y * weight);
      }
    }
    *reinterpret_cast<uint4*>(page + half + chunk_offset(slot, chunk)) = value;
  }
  if (threadIdx.x < kPageKeys) {
    reinterpret_cast<float*>(page + 2 * half)[threadIdx.x] = weight_of(threadIdx.x);
  }
}

// The same in f32.
__global__ void __launch_bounds__(256)
    pack_f32_kernel(const float4* k, const float4* v, const float* bias, int num_tokens,
                    int num_heads, int head_dim, const int32_t* pages, unsigned char* store) {
  const int head = blockIdx.y, chunks = head_dim / 4;
  const int begin = blockIdx.x * kPageKeys, used = min(kPageKeys, num_tokens - begin);
  auto* keys =
      reinterpret_cast<float4*>(store + static_cast<int64_t>(pages[head * gridDim.x + blockIdx.x]) *
                                            paged_bytes(head_dim, PageFormat::kF32));
  float4* values = keys + kPageKeys * chunks;
  const auto weight_of = [&](int slot) {
    if (slot >= used) return 0.0F;
    return bias ? expf(bias[static_cast<int64_t>(head) * num_tokens + begin + slot]) : 1.0F;
  };
  for (int i = threadIdx.x; i < kPageKeys * chunks; i += blockDim.x) {
    const int slot = i / chunks, chunk = i % chunks;
    const int64_t token = begin + min(slot, used - 1);
    const int64_t at = (token * num_heads + head) * chunks + chunk;
    keys[i] = k[at];
    const float weight = weight_of(slot);
    const float4 value = weight > 0 ? v[at] : float4{};
    values[i] = make_float4(value.x * weight, value.y * weight, value.z * weight, value.w * weight);
  }
  if (threadIdx.x < kPageKeys) {
    reinterpret_cast<float*>(values + kPageKeys * chunks)[threadIdx.x] = weight_of(threadIdx.x);
  }
}

// The largest of a block's 256 values.
__device__ float block_max(float value) {
  __shared__ float by_warp[8];
  for (int step = 16; step > 0; step /= 2) value = fmaxf(value, __shfl_xor_sync(~0U, value, step));
  __syncthreads();
  if (threadIdx.x % 32 == 0) by_warp[threadIdx.x / 32] = value;
  __syncthreads();
  for (float other : by_warp) value = fmaxf(value, other);
  return value;
}

// One block a page of 8-bit keys and values, 128 channels.
__global__ void __launch_bounds__(256)
    pack_fp8_kernel(const __nv_bfloat16* k, const __nv_bfloat16* v, const float* bias,
                    int num_tokens, int num_heads, const int32_t* pages, unsigned char* store) {
  constexpr int kDim = 128, kMatrix = kPageKeys * kDim;
  constexpr float kLargest = 448;  // of e4m3
  const int head = blockIdx.y;
  const int begin = blockIdx.x * kPageKeys, used = min(kPageKeys, num_tokens - begin);
  unsigned char* page = store + static_cast<int64_t>(pages[head * gridDim.x + blockIdx.x]) *
                                    paged_bytes(kDim, PageFormat::kFp8);
  const auto at = [&](int slot) {
    return (static_cast<int64_t>(begin + slot) * num_heads + head) * kDim;
  };
  const auto weight_of = [&](int slot) {
    if (slot >= used) return 0.0F;
    return bias ? expf(bias[static_cast<int64_t>(head) * num_tokens + begin + slot]) : 1.0F;
  };
  const auto value_of = [&](int slot, int channel) {
    return slot < used ? __bfloat162float(v[at(slot) + channel]) * weight_of(slot) : 0.0F;
  };
  float largest_key = 0, largest_value = 0;
  for (int i = threadIdx.x; i < used * kDim; i += blockDim.x) {
    largest_key = fmaxf(largest_key, fabsf(__bfloat162float(k[at(i / kDim) + i % kDim])));
    largest_value = fmaxf(largest_value, fabsf(value_of(i / kDim, i % kDim)));
  }
  largest_key = block_max(largest_key);
  largest_value = block_max(largest_value);
  const float key_scale = largest_key > 0 ? largest_key / kLargest : 1;
  const float exponent = largest_value > 0 ? ceilf(log2f(largest_value / kLargest)) : 0;
  const float value_factor = exp2f(-exponent);
  const auto rounded = [](float x) { return __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3); };
  for (int i = threadIdx.x; i < kMatrix; i += blockDim.x) {
    const int row = i / 128, column = i % 128;
    const int offset = row * 128 + ((column / 16 ^ (row & 7)) << 4) + column % 16;
    const int slot = min(row, used - 1);
    page[offset] = rounded(__bfloat162float(k[at(slot) + column]) / key_scale);
    // Row: a channel. Of 32 columns, 4 c + {0..3} and 16 + 4 c + {0..3} are what thread c of four
    // holds of the terms: keys 2 c + {0, 1} of every 8.
    const int key = column / 16 * 16 + (column / 2 & 1) * 8 + (column / 4 & 3) * 2 + (column & 1);
    page[kMatrix + offset] = rounded(value_of(key, row) * value_factor);
  }
  auto* floats = reinterpret_cast<float*>(page + 2 * kMatrix);
  if (threadIdx.x < kPageKeys) floats[threadIdx.x] = weight_of(threadIdx.x) * value_factor;
  if (threadIdx.x < 4) {
    floats[kPageKeys + threadIdx.x] = threadIdx.x == 0   ? key_scale
                                      : threadIdx.x == 1 ? exponent
                                                         : 0.0F;
  }
}

// Two channels of a page's key. In 8 bits they want the page's scale yet.
template <int D, PageFormat kFormat>
__device__ float2 key_pair(const unsigned char* page, int slot, int channel) {
  if constexpr (kFormat == PageFormat::kBf16) {
    const auto* at = page + chunk_offset(slot, channel / 8) + channel % 8 * 2;
    return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(at));
  } else if constexpr (kFormat == PageFormat::kF32) {
    return *reinterpret_cast<const float2*>(page + (slot * D + channel) * 4);
  } else {
    const int at = slot * D + ((channel / 16 ^ (slot & 7)) << 4) + channel % 16;
    const auto* pair = reinterpret_cast<const __nv_fp8_e4m3*>(page + at);
    return {static_cast<float>(pair[0]), static_cast<float>(pair[1])};
  }
}

// One block a page, a thread a pair of channels.
template <int D, PageFormat kFormat>
__device__ void summarise(const SummaryJob& job, int index) {
  if (index >= job.count) return;
  const int number = job.pages[index], channel = 2 * threadIdx.x;
  if (number < 0) return;
  const auto* store = static_cast<const unsigned char*>(job.store);
  const unsigned char* page = store + static_cast<int64_t>(number) * paged_bytes(D, kFormat);
  constexpr size_t kMatrices =
      paged_bytes(D, kFormat) - kPageKeys * 4 - (kFormat == PageFormat::kFp8 ? 16 : 0);
  const auto* slots = reinterpret_cast<const float*>(page + kMatrices);
  float2 sum = {};
  float weight = 0;
  int used = 0;
  for (int slot = 0; slot < kPageKeys; ++slot) {
    const float w = slots[slot];
    if (w == 0) continue;
    const float2 key = key_pair<D, kFormat>(page, slot, channel);
    sum.x += key.x;
    sum.y += key.y;
    weight += w;
    ++used;
  }
  float factor = 1.0F / static_cast<float>(max(1, used));
  if constexpr (kFormat == PageFormat::kFp8) {
    factor *= slots[kPageKeys];
    weight *= exp2f(slots[kPageKeys + 1]);
  }
  static_cast<__nv_bfloat162*>(job.means)[static_cast<int64_t>(number) * (D / 2) + threadIdx.x] =
      __floats2bfloat162_rn(sum.x * factor, sum.y * factor);
  if (threadIdx.x == 0) {
    job.weights[number] = weight;
    job.counts[number] = used;
  }
}

template <int D, PageFormat kFormat>
__global__ void __launch_bounds__(D / 2) summarise_kernel(SummaryJob job) {
  summarise<D, kFormat>(job, blockIdx.x);
}

// Grid: pages, jobs.
template <int D, PageFormat kFormat>
__global__ void __launch_bounds__(D / 2) summarise_all_kernel(const SummaryJob* jobs) {
  summarise<D, kFormat>(jobs[blockIdx.y], blockIdx.x);
}

// Calls body.template operator()<D, format>() for a kind of pages that has summaries.
template <typename Body>
void for_kind(int head_dim, PageFormat format, const Body& body) {
  if (format == PageFormat::kFp8)
    body.template operator()<128, PageFormat::kFp8>();
  else if (format == PageFormat::kF32 && head_dim == 64)
    body.template operator()<64, PageFormat::kF32>();
  else if (format == PageFormat::kF32)
    body.template operator()<128, PageFormat::kF32>();
  else if (head_dim == 64)
    body.template operator()<64, PageFormat::kBf16>();
  else
    body.template operator()<128, PageFormat::kBf16>();
}

}  // namespace

void expect_head_dim(int head_dim, PageFormat format) {
  if (format == PageFormat::kFp8 && head_dim != 128) {
    throw Error(str("attention in 8 bits: expected 128 channels a head, found ", head_dim));
  }
  if (format == PageFormat::kF32) {
    if (head_dim % 16 == 0 && head_dim > 0 && head_dim <= 256) return;
    throw Error(str("attention on the GPU in f32: expected a multiple of 16 up to 256 channels a ",
                    "head, found ", head_dim));
  }
  if (head_dim != 64 && head_dim != 128) {
    throw Error(str("attention on the GPU: expected 64 or 128 channels a head, found ", head_dim));
  }
}

void pack_pages(const void* k, const void* v, const float* bias, int64_t num_tokens, int num_heads,
                int head_dim, PageFormat format, const int32_t* pages, void* store,
                cudaStream_t stream) {
  expect_head_dim(head_dim, format);
  if (num_tokens == 0 || num_heads == 0) return;
  const dim3 grid(static_cast<unsigned>((num_tokens + kPageKeys - 1) / kPageKeys),
                  static_cast<unsigned>(num_heads));
  auto* bytes = static_cast<unsigned char*>(store);
  const auto tokens = static_cast<int>(num_tokens);
  switch (format) {
    case PageFormat::kBf16:
      pack_kernel<<<grid, 256, 0, stream>>>(static_cast<const uint4*>(k),
                                            static_cast<const uint4*>(v), bias, tokens, num_heads,
                                            head_dim, pages, bytes);
      break;
    case PageFormat::kFp8:
      pack_fp8_kernel<<<grid, 256, 0, stream>>>(static_cast<const __nv_bfloat16*>(k),
                                                static_cast<const __nv_bfloat16*>(v), bias, tokens,
                                                num_heads, pages, bytes);
      break;
    case PageFormat::kF32:
      pack_f32_kernel<<<grid, 256, 0, stream>>>(static_cast<const float4*>(k),
                                                static_cast<const float4*>(v), bias, tokens,
                                                num_heads, head_dim, pages, bytes);
      break;
  }
  check(cudaGetLastError(), "packing pages");
}

PageSummaries::PageSummaries(int64_t store_pages, int head_dim, PageFormat format)
    : head_dim_(head_dim),
      format_(format),
      means_(static_cast<size_t>(store_pages * head_dim)),
      weights_(static_cast<size_t>(store_pages)),
      counts_(static_cast<size_t>(store_pages)) {
  if (head_dim != 64 && head_dim != 128) {
    throw Error(str("AnnSA on the GPU: expected 64 or 128 channels a head, found ", head_dim));
  }
  expect_head_dim(head_dim, format);
}

void PageSummaries::update(const void* store, const int32_t* pages, int count,
                           cudaStream_t stream) {
  if (count == 0) return;
  for_kind(head_dim_, format_, [&]<int D, PageFormat kFormat>() {
    summarise_kernel<D, kFormat>
        <<<static_cast<unsigned>(count), D / 2, 0, stream>>>(job(store, pages, count));
  });
  check(cudaGetLastError(), "summaries of pages");
}

void PageSummaries::update_all(const SummaryJob* jobs, int num_jobs, int most_pages,
                               cudaStream_t stream) const {
  if (num_jobs == 0 || most_pages == 0) return;
  const dim3 grid(static_cast<unsigned>(most_pages), static_cast<unsigned>(num_jobs));
  for_kind(head_dim_, format_, [&]<int D, PageFormat kFormat>() {
    summarise_all_kernel<D, kFormat><<<grid, D / 2, 0, stream>>>(jobs);
  });
  check(cudaGetLastError(), "summaries of pages");
}

}  // namespace longtake::cuda
