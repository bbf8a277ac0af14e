#include "ops/noise.h"

#include "base/philox.h"
#include "device/dispatch.h"
#include "ops/expect.h"

namespace longtake {

void fill_normal(Context& ctx, uint64_t seed, View clock, uint32_t step, View out,
                 int64_t first_frame, int64_t frames) {
  expect_dtype("fill_normal clock", clock, DType::kI64);
  expect_shape("fill_normal clock", clock, {1});
  expect_dtype("fill_normal out", out, DType::kF32);
  LONGTAKE_CHECK(frames > 0 && out.numel() % frames == 0, frames, " frames in ",
                 out.shape().to_string());
  if (out.empty()) return;
  LONGTAKE_DISPATCH(ctx, fill_normal, seed, clock, step, out, first_frame, frames);
}

namespace cpu {

void fill_normal(Context& /*ctx*/, uint64_t seed, View clock, uint32_t step, View out,
                 int64_t first_frame, int64_t frames) {
  const int64_t first = *clock.data<int64_t>() + first_frame;
  const int64_t count = out.numel() / frames;
  for (int64_t f = 0; f < frames; ++f)
    longtake::fill_normal(seed, static_cast<uint32_t>(first + f), step,
                          out.data<float>() + f * count, count);
}

}  // namespace cpu
}  // namespace longtake
