#include "kv/device_store.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "base/error.h"
#include "device/cuda_check.h"

namespace longtake::cuda {
namespace {

constexpr size_t kWords = 960;  // arguments of a launch end at 4 KiB

struct Packet {
  uint32_t words[kWords];
};

__global__ void store_kernel(const __grid_constant__ Packet packet, int count, uint32_t* to) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) to[i] = packet.words[i];
}

}  // namespace

void store(const void* from, size_t bytes, void* to, cudaStream_t stream) {
  LONGTAKE_CHECK(bytes % sizeof(uint32_t) == 0, bytes);
  const auto* words = static_cast<const uint32_t*>(from);
  const size_t total = bytes / sizeof(uint32_t);
  for (size_t begin = 0; begin < total; begin += kWords) {
    const size_t count = std::min(kWords, total - begin);
    Packet packet{};
    std::memcpy(packet.words, words + begin, count * sizeof(uint32_t));
    store_kernel<<<1, 256, 0, stream>>>(packet, static_cast<int>(count),
                                        static_cast<uint32_t*>(to) + begin);
  }
  check(cudaGetLastError(), "descriptions of commits");
}

}  // namespace longtake::cuda
