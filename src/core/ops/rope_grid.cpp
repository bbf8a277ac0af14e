#include "ops/rope_grid.h"

#include <cmath>

#include "device/dispatch.h"
#include "ops/expect.h"

namespace longtake {

void rope_grid(Context& ctx, View clock, const RopeGrid& grid, View cos, View sin) {
  expect_shape("rope_grid clock", clock, {1});
  expect_dtype("rope_grid clock", clock, DType::kI64);
  expect_rank("rope_grid cos", cos, 2);
  expect_shape("rope_grid cos", cos, {cos.dim(0), grid.time_pairs + 2 * grid.space_pairs});
  expect_shape("rope_grid sin", sin, cos.shape());
  expect_dtype("rope_grid cos", cos, DType::kF32);
  expect_dtype("rope_grid sin", sin, DType::kF32);
  LONGTAKE_CHECK(cos.dim(0) % (grid.rows * grid.columns) == 0, cos.dim(0), " tokens");
  LONGTAKE_DISPATCH(ctx, rope_grid, clock, grid, cos, sin);
}

void cpu::rope_grid(Context&, View clock, const RopeGrid& grid, View cos, View sin) {
  const int64_t frame_tokens = grid.rows * grid.columns;
  const int64_t num_frames = cos.dim(0) / frame_tokens;
  const int64_t pairs = cos.dim(1);
  const int64_t first_frame = clock.data<int64_t>()[0];
  // What a position turns is computed once and written for all tokens that have it.
  const auto turn = [&](int64_t position, int64_t count, int64_t first_pair,
                        const auto& for_tokens) {
    for (int64_t i = 0; i < count; ++i) {
      const double angle =
          static_cast<double>(position) *
          std::pow(grid.theta, -static_cast<double>(i) / static_cast<double>(count));
      const auto c = static_cast<float>(std::cos(angle)), s = static_cast<float>(std::sin(angle));
      for_tokens([&](int64_t token) {
        cos.data<float>()[token * pairs + first_pair + i] = c;
        sin.data<float>()[token * pairs + first_pair + i] = s;
      });
    }
  };
  for (int64_t f = 0; f < num_frames; ++f)
    turn(first_frame + f, grid.time_pairs, 0, [&](const auto& body) {
      for (int64_t token = 0; token < frame_tokens; ++token) body(f * frame_tokens + token);
    });
  for (int64_t y = 0; y < grid.rows; ++y)
    turn(y, grid.space_pairs, grid.time_pairs, [&](const auto& body) {
      for (int64_t f = 0; f < num_frames; ++f) {
        for (int64_t x = 0; x < grid.columns; ++x) body((f * grid.rows + y) * grid.columns + x);
      }
    });
  for (int64_t x = 0; x < grid.columns; ++x)
    turn(x, grid.space_pairs, grid.time_pairs + grid.space_pairs, [&](const auto& body) {
      for (int64_t line = 0; line < num_frames * grid.rows; ++line) body(line * grid.columns + x);
    });
}

}  // namespace longtake
