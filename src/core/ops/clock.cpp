#include "ops/clock.h"

#include "device/dispatch.h"
#include "ops/expect.h"

namespace longtake {

void set_clock(Context& ctx, View clock, int64_t frame) {
  expect_shape("set_clock", clock, {1});
  expect_dtype("set_clock", clock, DType::kI64);
  LONGTAKE_DISPATCH(ctx, set_clock, clock, frame);
}

void cpu::set_clock(Context&, View clock, int64_t frame) {
  clock.data<int64_t>()[0] = frame;
}

}  // namespace longtake
