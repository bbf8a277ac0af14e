// Paged attention in f32, for comparison with the CPU: ordinary multiply-adds, any head_dim that is
// a multiple of 16 up to 256.
//
// A block has 16 of a row's 128 queries, 16 threads each, and goes over the pages in steps of 32
// keys: their logits, two a thread, then the values of up to 16 channels a thread. Rows of keys are
// 16 bytes apart from a multiple of 128, so that the threads of a query meet different banks.
#include "attention/paged_attention.cuh"

namespace longtake::cuda {

namespace {

constexpr int kQueries = 16, kLanes = 16, kThreads = kQueries * kLanes;
constexpr int kKeys = 32;      // of one step
constexpr int kMaxChunks = 4;  // of four channels, of a thread: 256 channels
constexpr int kPad = 4;        // floats between rows

__device__ float largest_of_16(float x) {
#pragma unroll
  for (int step = 8; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(~0U, x, step));
  return x;
}

__device__ float sum_of_16(float x) {
#pragma unroll
  for (int step = 8; step > 0; step /= 2) x += __shfl_xor_sync(~0U, x, step);
  return x;
}

int shared_bytes(int head_dim) {
  return (kQueries + 2 * kKeys) * (head_dim + kPad) * 4;
}

// Grid: rows by kTileQueries / kQueries.
__global__ void __launch_bounds__(kThreads) attend_kernel(PagedArguments args, int head_dim) {
  extern __shared__ __align__(16) float floats[];
  __shared__ float terms[kQueries][kKeys], weights[kKeys];
  const int width = head_dim + kPad, chunks = head_dim / 4;
  float* q = floats;
  float* keys = q + kQueries * width;
  float* values = keys + kKeys * width;
  const int tiles = args.lists.num_rows() / args.num_heads;
  const int head = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  const int own = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int first = tile * kTileQueries + blockIdx.y * kQueries, query = first + own;
  if (first >= args.num_queries) return;
  const auto row_of = [&](auto* matrix, int token) {
    return matrix + (static_cast<int64_t>(token) * args.num_heads + head) * head_dim;
  };
  for (int i = threadIdx.x; i < kQueries * chunks; i += kThreads) {
    const int token = min(first + i / chunks, args.num_queries - 1);
    const auto* from =
        reinterpret_cast<const float4*>(row_of(static_cast<const float*>(args.q), token));
    reinterpret_cast<float4*>(q + i / chunks * width)[i % chunks] = from[i % chunks];
  }
  float4 sums[kMaxChunks] = {};
  float reference = -INFINITY, sum = 0;  // in powers of two
  const int list = blockIdx.x / args.lists.rows_per_list;
  const int32_t* pages = args.lists.pages + first_of(args.lists, list);
  const int steps = length_of(args.lists, list) * (kPageKeys / kKeys);
  for (int step = 0; step < steps; ++step) {
    const int begin = step % (kPageKeys / kKeys) * kKeys;  // in the page
    const auto* page = reinterpret_cast<const float4*>(
        args.store + static_cast<int64_t>(pages[step / (kPageKeys / kKeys)]) *
                         paged_bytes(head_dim, PageFormat::kF32));
    __syncthreads();
    for (int i = threadIdx.x; i < kKeys * chunks; i += kThreads) {
      const int at = i / chunks * (width / 4) + i % chunks;
      reinterpret_cast<float4*>(keys)[at] = page[begin * chunks + i];
      reinterpret_cast<float4*>(values)[at] = page[(kPageKeys + begin) * chunks + i];
    }
    if (threadIdx.x < kKeys) {
      weights[threadIdx.x] =
          reinterpret_cast<const float*>(page + 2 * kPageKeys * chunks)[begin + threadIdx.x];
    }
    __syncthreads();
    float logits[2] = {};
    for (int c = 0; c < chunks; ++c) {
      const float4 a = reinterpret_cast<const float4*>(q + own * width)[c];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const float4 b = reinterpret_cast<const float4*>(keys + (lane + kLanes * n) * width)[c];
        logits[n] = fmaf(a.x, b.x, fmaf(a.y, b.y, fmaf(a.z, b.z, fmaf(a.w, b.w, logits[n]))));
      }
    }
    // Unused and masked keys do not even count for the maximum.
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      logits[n] = weights[lane + kLanes * n] > 0 ? logits[n] * args.scale_log2 : -INFINITY;
    }
    const float most = fmaxf(reference, largest_of_16(fmaxf(logits[0], logits[1])));
    const float rescale = most == -INFINITY ? 1 : exp2f(reference - most);
    reference = most;
    sum *= rescale;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int key = lane + kLanes * n;
      const float term = logits[n] == -INFINITY ? 0 : exp2f(logits[n] - reference);
      sum = fmaf(term, weights[key], sum);
      terms[own][key] = term;
    }
    __syncwarp();
#pragma unroll
    for (int c = 0; c < kMaxChunks; ++c) {
      const int chunk = lane + kLanes * c;
      if (chunk >= chunks) break;
      float4 total = sums[c];
      total =
          make_float4(total.x * rescale, total.y * rescale, total.z * rescale, total.w * rescale);
#pragma unroll 8
      for (int key = 0; key < kKeys; ++key) {
        const float term = terms[own][key];
        const float4 value = reinterpret_cast<const float4*>(values + key * width)[chunk];
        total = make_float4(fmaf(term, value.x, total.x), fmaf(term, value.y, total.y),
                            fmaf(term, value.z, total.z), fmaf(term, value.w, total.w));
      }
      sums[c] = total;
    }
  }
  sum = sum_of_16(sum);
  if (query >= args.num_queries) return;
  const float inverse = sum == 0 ? 0 : 1 / sum;
  auto* out = reinterpret_cast<float4*>(row_of(static_cast<float*>(args.out), query));
#pragma unroll
  for (int c = 0; c < kMaxChunks; ++c) {
    const int chunk = lane + kLanes * c;
    if (chunk >= chunks) break;
    out[chunk] = make_float4(sums[c].x * inverse, sums[c].y * inverse, sums[c].z * inverse,
                             sums[c].w * inverse);
  }
}

}  // namespace

void prepare_f32() {
  constexpr int kMostChannels = 16 * kMaxChunks * 4;
  check(cudaFuncSetAttribute(attend_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             shared_bytes(kMostChannels)),
        "attention kernel");
}

void launch_f32(int head_dim, const PagedArguments& args, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(args.lists.num_rows()), kTileQueries / kQueries);
  attend_kernel<<<grid, kThreads, static_cast<size_t>(shared_bytes(head_dim)), stream>>>(args,
                                                                                         head_dim);
}

}  // namespace longtake::cuda
