#include "device/context.h"

#include <omp.h>

#include <algorithm>

#include "base/error.h"
#include "build_config.h"
#include "device/cuda_device.h"

namespace longtake {
namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kMinBlockBytes = size_t{1} << 20;

}  // namespace

View Workspace::take(DType dtype, const Shape& shape) {
  const size_t wanted = static_cast<size_t>(shape.numel()) * size_of(dtype);
  const size_t bytes = (wanted + kAlignment - 1) / kAlignment * kAlignment;
  while (block_ < blocks_.size() && blocks_[block_].bytes() - used_ < bytes) {
    ++block_;
    used_ = 0;
  }
  if (block_ == blocks_.size())
    blocks_.emplace_back(device_, std::max({bytes, bytes_reserved(), kMinBlockBytes}));
  std::byte* data = blocks_[block_].data() + used_;
  used_ += bytes;
  return View(data, dtype, device_, shape);
}

size_t Workspace::bytes_reserved() const {
  size_t total = 0;
  for (const Buffer& block : blocks_) total += block.bytes();
  return total;
}

Context::Context(Device device, int threads)
    : device_(device), threads_(threads > 0 ? threads : omp_get_num_procs()), workspace_(device) {
  if (device.kind == DeviceKind::kCuda) {
    if constexpr (kHasCuda) {
      cuda_ = cuda::make_runtime(device.index);
    } else {
      throw Error(ErrorKind::kUsage,
                  str("device ", device.to_string(), ": expected cpu, found a build without CUDA"));
    }
  }
  omp_set_num_threads(
      threads_);  // oneDNN and our own loops share OpenMP's pool, so they never compete for cores
}

void Context::synchronize() {
  if constexpr (kHasCuda) {
    if (cuda_ != nullptr) cuda::synchronize(*cuda_);
  }
}

}  // namespace longtake
