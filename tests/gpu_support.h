// What tests of GPU kernels share.
#pragma once

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include "device/cuda_check.h"

namespace longtake::cuda {

// In SetUp(): skips the test on a machine without a GPU, or without one of Hopper if it needs that.
inline void skip_without_gpu(bool needs_hopper = false) {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
    GTEST_SKIP() << "no NVIDIA GPU on this machine";
  }
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, 0), "GPU");
  if (needs_hopper && properties.major != 9) {
    GTEST_SKIP() << "not a Hopper GPU: " << properties.name;
  }
}

}  // namespace longtake::cuda
