// The clock of a rollout: one number on the device that says which frame is in work, so that what
// is recorded (device/graph.h) can be replayed for another frame.
#pragma once

#include <cstdint>

#include "device/context.h"
#include "tensor/tensor.h"

namespace longtake {

// clock [1] i64 = frame, in the order of the work enqueued on ctx.
void set_clock(Context& ctx, View clock, int64_t frame);

namespace cpu {
extern decltype(longtake::set_clock) set_clock;
}

namespace cuda {
extern decltype(longtake::set_clock) set_clock;
}

}  // namespace longtake
