// pixel_shuffle on the CPU: moves memory only, so one loop serves both directions and all types.
#include "device/dispatch.h"
#include "device/parallel.h"
#include "ops/pixel_shuffle.h"

namespace longtake::cpu {
namespace {

// Calls move(small element, large element) for every element, as offsets from the tensors' start.
// small is [H, W, 4 C].
template <typename Move>
void for_elements(Context& ctx, const Shape& small, const Move& move) {
  const int64_t width = small[1];
  const int64_t channels = small[2] / 4;
  parallel_for(ctx, small[0], 8, [&](int64_t begin, int64_t end) {
    for (int64_t y = begin; y < end; ++y) {
      for (int64_t i = 0; i < 2; ++i) {
        for (int64_t x = 0; x < width; ++x) {
          const int64_t near = (y * width + x) * 4 * channels + 2 * i;
          const int64_t far = ((2 * y + i) * 2 * width + 2 * x) * channels;
          for (int64_t j = 0; j < 2; ++j) {
            for (int64_t c = 0; c < channels; ++c) move(near + 4 * c + j, far + j * channels + c);
          }
        }
      }
    }
  });
}

}  // namespace

void pixel_shuffle(Context& ctx, View x, View out) {
  for_float_type(x.dtype(), [&]<typename T>() {
    const T* from = x.data<T>();
    T* to = out.data<T>();
    for_elements(ctx, x.shape(), [=](int64_t near, int64_t far) { to[far] = from[near]; });
  });
}

void pixel_unshuffle(Context& ctx, View x, View out) {
  for_float_type(x.dtype(), [&]<typename T>() {
    const T* from = x.data<T>();
    T* to = out.data<T>();
    for_elements(ctx, out.shape(), [=](int64_t near, int64_t far) { to[near] = from[far]; });
  });
}

}  // namespace longtake::cpu
