// CUDA's error codes as our errors. CUDA builds only.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <type_traits>
#include <utility>
#include <vector>

#include "base/error.h"

namespace longtake::cuda {

// Throws Error: "what: CUDA's own words".
inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw Error(str(what, ": ", cudaGetErrorString(status)));
}

// Device memory of `count` elements, owned and only moved. Contents start undefined.
template <typename T>
class DeviceArray {
 public:
  DeviceArray() = default;

  explicit DeviceArray(size_t count) : count_(count) {
    if (count == 0) return;
    if (cudaMalloc(reinterpret_cast<void**>(&data_), count * sizeof(T)) != cudaSuccess) {
      static_cast<void>(cudaGetLastError());
      throw Error(str("GPU memory: expected ", count * sizeof(T), " bytes, found fewer free"));
    }
  }

  ~DeviceArray() { static_cast<void>(cudaFree(data_)); }

  DeviceArray(DeviceArray&& other) noexcept : data_(other.data_), count_(other.count_) {
    other.data_ = nullptr;
    other.count_ = 0;
  }

  DeviceArray& operator=(DeviceArray&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(count_, other.count_);
    return *this;
  }

  T* data() const { return data_; }

  size_t size() const { return count_; }

 private:
  T* data_ = nullptr;
  size_t count_ = 0;
};

// Host memory of `count` elements that the device writes by itself; owned and not moved. Contents
// start undefined.
template <typename T>
class PageLockedArray {
 public:
  explicit PageLockedArray(size_t count) {
    void* data = nullptr;
    check(cudaMallocHost(&data, count * sizeof(T)), "page-locked memory");
    data_ = static_cast<T*>(data);
  }

  ~PageLockedArray() { static_cast<void>(cudaFreeHost(const_cast<std::remove_cv_t<T>*>(data_))); }

  PageLockedArray(const PageLockedArray&) = delete;
  PageLockedArray& operator=(const PageLockedArray&) = delete;

  T* data() const { return data_; }

 private:
  T* data_ = nullptr;
};

// Copies `count` elements and is done with it: cudaMemcpy returns while what it has read is still
// on its way to the GPU, and our streams do not wait for the stream of that copy.
template <typename T>
void copy_to_device(const T* from, size_t count, T* to) {
  check(cudaMemcpy(to, from, count * sizeof(T), cudaMemcpyHostToDevice), "copy to the GPU");
  check(cudaDeviceSynchronize(), "copy to the GPU");
}

template <typename T>
DeviceArray<T> on_device(const std::vector<T>& host) {
  DeviceArray<T> array(host.size());
  copy_to_device(host.data(), host.size(), array.data());
  return array;
}

template <typename T>
std::vector<T> on_host(const DeviceArray<T>& array) {
  std::vector<T> host(array.size());
  check(cudaMemcpy(host.data(), array.data(), array.size() * sizeof(T), cudaMemcpyDeviceToHost),
        "copy from the GPU");
  return host;
}

}  // namespace longtake::cuda
