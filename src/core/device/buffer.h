// A block of memory on one device, owned and only moved; 64-byte aligned or better. Contents start
// undefined.
#pragma once

#include <cstddef>
#include <cstdint>

#include "device/device.h"

namespace longtake {

class Buffer {
 public:
  Buffer() = default;
  Buffer(Device device, size_t bytes);  // throws Error when memory is short, naming the size
  // CPU memory for traffic with `device`: page-locked where that makes copies faster and lets them
  // run beside the host.
  static Buffer staging(Device device, size_t bytes);
  ~Buffer();
  Buffer(Buffer&& other) noexcept;
  Buffer& operator=(Buffer&& other) noexcept;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  std::byte* data() const { return data_; }

  size_t bytes() const { return bytes_; }

  Device device() const { return device_; }

 private:
  Device device_;
  std::byte* data_ = nullptr;
  size_t bytes_ = 0;
  bool page_locked_ = false;
};

// Number of Buffers allocated by this process so far: a steady step must not move it.
uint64_t num_buffer_allocations();

}  // namespace longtake
