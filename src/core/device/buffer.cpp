#include "device/buffer.h"

#include <atomic>
#include <new>
#include <utility>

#include "base/error.h"
#include "build_config.h"
#include "device/cuda_device.h"

namespace longtake {
namespace {

constexpr std::align_val_t kAlignment{64};

std::atomic<uint64_t> allocations{0};

}  // namespace

Buffer::Buffer(Device device, size_t bytes) : device_(device), bytes_(bytes) {
  if (bytes == 0) return;
  if (device.kind == DeviceKind::kCpu) {
    data_ = static_cast<std::byte*>(::operator new(bytes, kAlignment, std::nothrow));
    if (data_ == nullptr)
      throw Error(
          str("memory: expected ", bytes, " free bytes on ", device.to_string(), ", found less"));
  } else if constexpr (kHasCuda) {
    data_ = cuda::allocate(device.index, bytes);
  } else {
    LONGTAKE_CHECK(false, "this build has no ", device.to_string(), " memory");
  }
  allocations.fetch_add(1, std::memory_order_relaxed);
}

Buffer Buffer::staging(Device device, size_t bytes) {
  if (device.kind == DeviceKind::kCpu) return Buffer(device, bytes);
  Buffer out;
  if constexpr (kHasCuda) {
    if (bytes > 0) out.data_ = cuda::allocate_page_locked(bytes);
    out.bytes_ = bytes;
    out.page_locked_ = true;
    allocations.fetch_add(1, std::memory_order_relaxed);
  }
  return out;
}

Buffer::~Buffer() {
  if (data_ == nullptr) return;
  if constexpr (kHasCuda) {
    if (page_locked_) {
      cuda::release_page_locked(data_);
      return;
    }
    if (device_.kind == DeviceKind::kCuda) {
      cuda::release(device_.index, data_);
      return;
    }
  }
  ::operator delete(data_, kAlignment);
}

Buffer::Buffer(Buffer&& other) noexcept
    : device_(other.device_),
      data_(std::exchange(other.data_, nullptr)),
      bytes_(std::exchange(other.bytes_, 0)),
      page_locked_(std::exchange(other.page_locked_, false)) {}

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  std::swap(device_, other.device_);
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  std::swap(page_locked_, other.page_locked_);
  return *this;
}

uint64_t num_buffer_allocations() {
  return allocations.load(std::memory_order_relaxed);
}

}  // namespace longtake
