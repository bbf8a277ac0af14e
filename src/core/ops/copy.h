// Elements from one place to another.
#pragma once

#include "device/context.h"
#include "tensor/tensor.h"

namespace longtake {

// to = from: dtypes and numbers of elements agree, devices may differ, as long as each is the CPU
// or ctx's. What comes from a CUDA device to the CPU has arrived when the call returns.
void copy(Context& ctx, View from, View to);

// The same without waiting, into Tensor::staging memory of the CPU: it has arrived after
// Context::synchronize().
void enqueue_copy(Context& ctx, View from, View to);

}  // namespace longtake
