// What the CUDA twins of one Context share. CUDA builds only.
#pragma once

#include <cublasLt.h>
#include <cuda_runtime_api.h>

#include <cstddef>

#include "device/context.h"
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

  int num_multiprocessors() const { return num_multiprocessors_; }

 private:
  int index_;
  cudaStream_t stream_ = nullptr;
  cublasLtHandle_t blas_ = nullptr;
  DeviceArray<std::byte> blas_workspace_;
  int num_multiprocessors_ = 0;
};

inline cudaStream_t stream_of(const Context& ctx) {
  return ctx.cuda()->stream();
}

}  // namespace longtake::cuda
