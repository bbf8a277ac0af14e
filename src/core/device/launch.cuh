// Launches that begin while the launch before them on the stream still runs (compute capability 9.0
// and later; CUDA's programmatic dependent launch): their blocks come to be and bring in what no
// launch writes, such as weights, before they wait. A graph records them as they are. Older chips
// start them when the launch before has ended. For .cu files.
//
// A kernel that is launched so calls wait_for_previous() in every thread before it reads what other
// launches write, and before it writes: behind it all launches before are done and seen.
#pragma once

#include <cuda_runtime_api.h>
#include <nv/target>

#include <cstddef>

#include "device/cuda_check.h"

namespace longtake::cuda {

// Once all blocks have called it or ended, the next launch may begin, if it is one of these.
__device__ inline void let_next_begin() {
  NV_IF_TARGET(NV_PROVIDES_SM_90, (asm volatile("griddepcontrol.launch_dependents;");));
}

__device__ inline void wait_for_previous() {
  NV_IF_TARGET(NV_PROVIDES_SM_90, (asm volatile("griddepcontrol.wait;" ::: "memory");));
}

// What cudaLaunchKernelEx wants of a launch that begins early. Not copied: it points at itself.
class EarlyLaunch {
 public:
  // early: false for chips before compute capability 9.0. cluster: blocks of a cluster along x; 1:
  // none.
  EarlyLaunch(cudaStream_t stream, bool early, dim3 grid, unsigned threads, size_t shared_bytes,
              unsigned cluster = 1) {
    config_.gridDim = grid;
    config_.blockDim = dim3(threads);
    config_.dynamicSmemBytes = shared_bytes;
    config_.stream = stream;
    config_.attrs = attributes_;
    if (early) {
      cudaLaunchAttribute& serial = attributes_[config_.numAttrs++];
      serial.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      serial.val.programmaticStreamSerializationAllowed = 1;
    }
    if (cluster > 1) {
      cudaLaunchAttribute& size = attributes_[config_.numAttrs++];
      size.id = cudaLaunchAttributeClusterDimension;
      size.val.clusterDim = {cluster, 1, 1};
    }
  }

  EarlyLaunch(const EarlyLaunch&) = delete;
  EarlyLaunch& operator=(const EarlyLaunch&) = delete;

  const cudaLaunchConfig_t* config() const { return &config_; }

  template <typename... Parameters>
  void run(const char* op, void (*kernel)(Parameters...), const Parameters&... arguments) const {
    check(cudaLaunchKernelEx(&config_, kernel, arguments...), op);
  }

 private:
  cudaLaunchConfig_t config_{};
  cudaLaunchAttribute attributes_[2] = {};
};

}  // namespace longtake::cuda
