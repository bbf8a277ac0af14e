// A block of memory on one device, owned and only moved. CPU blocks are 64-byte aligned. Contents
// start undefined.
#pragma once

#include <cstddef>
#include <cstdint>

#include "device/device.h"

namespace longtake {

class Buffer {
 public:
  Buffer() = default;
  Buffer(Device device, size_t bytes);  // throws Error when memory is short, naming the size
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
};

// Number of Buffers allocated by this process so far: a steady step must not move it.
uint64_t num_buffer_allocations();

}  // namespace longtake
