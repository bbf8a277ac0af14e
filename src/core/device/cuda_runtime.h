// What the CUDA twins of one Context share. CUDA builds only.
#pragma once

#include <cublasLt.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <typeindex>
#include <utility>

#include "device/context.h"
#include "device/cublas.h"
#include "device/cuda_check.h"

namespace longtake::cuda {

class Runtime {
 public:
  explicit Runtime(int index);
  ~Runtime();
  Runtime(const Runtime&) = delete;
  Runtime& operator=(const Runtime&) = delete;

  int index() const { return index_; }

  // Everything of a Context runs on this one, in order.
  cudaStream_t stream() const { return stream_; }

  cublasLtHandle_t blas() const { return blas_; }

  // Scratch of cuBLASLt: kernels on one stream may share it.
  std::byte* blas_workspace() const { return blas_workspace_.data(); }

  size_t blas_workspace_bytes() const { return blas_workspace_.size(); }

  // Products that have run before, ready to run again.
  CublasPlans& plans() { return plans_; }

  int num_multiprocessors() const { return num_multiprocessors_; }

  // Compute capability 9.0: clusters, and launches that begin early (device/launch.cuh).
  bool is_hopper_or_later() const { return is_hopper_or_later_; }

  // Shared memory that a block can have.
  size_t most_shared_bytes() const { return most_shared_bytes_; }

  // What a twin makes at its first call and keeps for later ones, by its type and a key of its own:
  // make() returns a T.
  template <typename T, typename Make>
  T& kept(int64_t key, const Make& make) {
    std::shared_ptr<void>& slot = kept_[{std::type_index(typeid(T)), key}];
    if (slot == nullptr) slot = std::make_shared<T>(make());
    return *static_cast<T*>(slot.get());
  }

 private:
  int index_;
  cudaStream_t stream_ = nullptr;
  cublasLtHandle_t blas_ = nullptr;
  DeviceArray<std::byte> blas_workspace_;
  CublasPlans plans_;
  int num_multiprocessors_ = 0;
  bool is_hopper_or_later_ = false;
  size_t most_shared_bytes_ = 0;
  std::map<std::pair<std::type_index, int64_t>, std::shared_ptr<void>> kept_;
};

inline cudaStream_t stream_of(const Context& ctx) {
  return ctx.cuda()->stream();
}

}  // namespace longtake::cuda
