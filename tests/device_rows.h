// What attention on a GPU reads, on the CPU, for tests: twins in device_rows_cuda.cpp and
// device_rows_none.cpp.
#pragma once

#include <cstdint>

#include "device/context.h"
#include "kv/page.h"
#include "tensor/tensor.h"

namespace longtake::testing_support {

// Keys and values as rows [tokens, heads, channels] f32.
struct Rows {
  Tensor k, v;
};

// Of a cache that keeps frames apart: its history, then the chunk in work. A GPU lists its history
// from the newest frame on, behind the sink; here it is from the oldest on, if the sink is read.
Rows device_rows(Context& ctx, const KvView& view, int64_t sink_frames, int64_t frame_tokens);

}  // namespace longtake::testing_support
