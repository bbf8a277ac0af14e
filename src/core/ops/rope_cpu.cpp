// rope on the CPU: memory-bound, a plain loop that the compiler vectorises.
#include "device/dispatch.h"
#include "device/parallel.h"
#include "ops/rope.h"

namespace longtake::cpu {

void rope(Context& ctx, View x, View cos, View sin, View out) {
  const int64_t heads = x.dim(1);
  const int64_t pairs = x.dim(2) / 2;
  for_float_type(x.dtype(), [&]<typename In>() {
    for_float_type(out.dtype(), [&]<typename Out>() {
      parallel_for(ctx, x.dim(0), 16, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin * heads; row < end * heads; ++row) {
          const float* c = cos.data<float>() + row / heads * pairs;
          const float* s = sin.data<float>() + row / heads * pairs;
          const In* from = x.data<In>() + row * pairs * 2;
          Out* to = out.data<Out>() + row * pairs * 2;
          for (int64_t i = 0; i < pairs; ++i) {
            const auto a = static_cast<float>(from[2 * i]);
            const auto b = static_cast<float>(from[2 * i + 1]);
            to[2 * i] = static_cast<Out>(a * c[i] - b * s[i]);
            to[2 * i + 1] = static_cast<Out>(a * s[i] + b * c[i]);
          }
        }
      });
    });
  });
}

}  // namespace longtake::cpu
