// The CUDA side of device/branch.h. CUDA builds only.
#pragma once

#include <cuda_runtime_api.h>

#include "device/cuda_runtime.h"

namespace longtake::cuda {

// A stream whose work runs behind what is on the runtime's own stream now, beside what comes there
// later, until join_branch().
cudaStream_t fork_branch(Runtime& runtime);

}  // namespace longtake::cuda
