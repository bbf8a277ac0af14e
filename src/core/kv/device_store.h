// Small values from the host to the device by launches whose arguments they are: a record keeps
// them, and nothing on the host has to outlive it. CUDA builds only.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

namespace longtake::cuda {

// bytes: a multiple of 4.
void store(const void* from, size_t bytes, void* to, cudaStream_t stream);

}  // namespace longtake::cuda
