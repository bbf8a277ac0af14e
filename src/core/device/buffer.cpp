#include "device/buffer.h"

#include <atomic>
#include <new>
#include <utility>

#include "base/error.h"

namespace longtake {
namespace {

constexpr std::align_val_t kAlignment{64};

std::atomic<uint64_t> allocations{0};

}  // namespace

Buffer::Buffer(Device device, size_t bytes) : device_(device), bytes_(bytes) {
  LONGTAKE_CHECK(device.kind == DeviceKind::kCpu, "this build has no ", device.to_string(),
                 " memory");
  if (bytes == 0) return;
  data_ = static_cast<std::byte*>(::operator new(bytes, kAlignment, std::nothrow));
  if (data_ == nullptr)
    throw Error(
        str("memory: expected ", bytes, " free bytes on ", device.to_string(), ", found less"));
  allocations.fetch_add(1, std::memory_order_relaxed);
}

Buffer::~Buffer() {
  ::operator delete(data_, kAlignment);
}

Buffer::Buffer(Buffer&& other) noexcept
    : device_(other.device_),
      data_(std::exchange(other.data_, nullptr)),
      bytes_(std::exchange(other.bytes_, 0)) {}

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  std::swap(device_, other.device_);
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

uint64_t num_buffer_allocations() {
  return allocations.load(std::memory_order_relaxed);
}

}  // namespace longtake
