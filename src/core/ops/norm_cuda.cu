// Norms on the GPU.
#include "ops/norm.h"
#include "ops/rows.cuh"

namespace longtake::cuda {
namespace {

template <bool kSilu>
void run_rms_norm(Context& ctx, const char* op, View x, View weight, float eps, View out) {
  const int64_t dim = x.dim(-1);
  const int64_t count = x.numel() / dim;
  const NormVectors norm{framed({{&weight, 1}, 0}, count, dim), framed({}, count, dim), eps, 0};
  const Gate none{framed({}, count, dim), false, false};
  for_float_type(x.dtype(), [&]<typename X>() {
    for_float_type(out.dtype(), [&]<typename Out>() {
      const Rows<X, X, Out> rows{x.data<X>(), nullptr, out.data<Out>(),
                                 static_cast<uint32_t>(count), static_cast<int>(dim)};
      run_norm_rows<false, kSilu, false>(ctx, op, rows, start_in_fours({x, out}), none, norm);
    });
  });
}

}  // namespace

void layer_norm(Context& ctx, View x, View scale, View shift, float eps, bool scale_plus_one,
                View out) {
  const int64_t dim = x.dim(-1);
  const Shape flat{x.numel() / dim, dim};
  cuda::frame_layer_norm(ctx, x.reshape(flat), {{&scale, 1}, 0}, {{&shift, 1}, 0}, eps,
                         scale_plus_one, out.reshape(flat));
}

void rms_norm(Context& ctx, View x, View weight, float eps, View out) {
  run_rms_norm<false>(ctx, "rms_norm", x, weight, eps, out);
}

void rms_norm_silu(Context& ctx, View x, View weight, float eps, View out) {
  run_rms_norm<true>(ctx, "rms_norm_silu", x, weight, eps, out);
}

}  // namespace longtake::cuda
