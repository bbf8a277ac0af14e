// Weights of files as f32. On the CPU, while models are loaded.
#pragma once

#include "tensor/tensor.h"

namespace longtake {

// out = data: i8 * scale[row] (rows along the first axis), bf16 widened, or a copy. data f32 | bf16
// | i8, scale [rows] f32 for i8, else empty; out f32 with as many elements. All on the CPU.
void widen(View data, View scale, View out);

}  // namespace longtake
