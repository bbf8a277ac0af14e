// Norms on Highway: a row is read twice or three times, from the first-level cache after the first.
#include "ops/norm.h"

#include <cmath>

#include "device/dispatch.h"
#include "device/parallel.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/norm_cpu.cpp"
#include "hwy/foreach_target.h"  // stands first: it parses this file once per target

#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"
#include "ops/simd-inl.h"

HWY_BEFORE_NAMESPACE();

namespace longtake::HWY_NAMESPACE {

// Sum over i < count of term(d, i), a vector of f32 per call.
template <class Term>
HWY_INLINE float sum_lanes(size_t count, const Term& term) {
  const hn::ScalableTag<float> d;
  const size_t lanes = hn::Lanes(d);
  auto sum0 = hn::Zero(d);
  auto sum1 = hn::Zero(d);
  size_t i = 0;
  for (; i + 2 * lanes <= count; i += 2 * lanes) {
    sum0 = hn::Add(sum0, term(d, i));
    sum1 = hn::Add(sum1, term(d, i + lanes));
  }
  float sum = hn::GetLane(hn::SumOfLanes(d, hn::Add(sum0, sum1)));
  for (; i < count; ++i) sum += hn::GetLane(term(hn::CappedTag<float, 1>(), i));
  return sum;
}

template <typename Out>
void layer_norm_rows(const float* x, const float* scale, const float* shift, float eps,
                     float scale_offset, int64_t rows, int64_t dim, Out* out) {
  const auto size = static_cast<size_t>(dim);
  for (int64_t r = 0; r < rows; ++r, x += dim, out += dim) {
    const float mean =
        sum_lanes(size, [&](auto d, size_t i) HWY_ATTR { return load_f32(d, x + i); }) /
        static_cast<float>(dim);
    const float variance = sum_lanes(size,
                                     [&](auto d, size_t i) HWY_ATTR {
                                       const auto centred =
                                           hn::Sub(load_f32(d, x + i), hn::Set(d, mean));
                                       return hn::Mul(centred, centred);
                                     }) /
                           static_cast<float>(dim);
    const float inv = 1.0F / std::sqrt(variance + eps);
    for_lanes(size, [&](auto d, size_t i) HWY_ATTR {
      const auto centred = hn::Sub(load_f32(d, x + i), hn::Set(d, mean));
      const auto factor = hn::Add(load_f32(d, scale + i), hn::Set(d, scale_offset));
      const auto normed = hn::Mul(centred, hn::Set(d, inv));
      store_f32(d, hn::MulAdd(normed, factor, load_f32(d, shift + i)), out + i);
    });
  }
}

template <bool kSilu, typename In, typename Out>
void rms_norm_rows(const In* x, const float* weight, float eps, int64_t rows, int64_t dim,
                   Out* out) {
  const auto size = static_cast<size_t>(dim);
  for (int64_t r = 0; r < rows; ++r, x += dim, out += dim) {
    const float mean_square = sum_lanes(size,
                                        [&](auto d, size_t i) HWY_ATTR {
                                          const auto v = load_f32(d, x + i);
                                          return hn::Mul(v, v);
                                        }) /
                              static_cast<float>(dim);
    const float inv = 1.0F / std::sqrt(mean_square + eps);
    for_lanes(size, [&](auto d, size_t i) HWY_ATTR {
      auto y = hn::Mul(hn::Mul(load_f32(d, x + i), hn::Set(d, inv)), load_f32(d, weight + i));
      if constexpr (kSilu) y = hn::Div(y, hn::Add(hn::Set(d, 1.0F), hn::Exp(d, hn::Neg(y))));
      store_f32(d, y, out + i);
    });
  }
}

// Rows [begin, end) of each op; the exported entry points.
void layer_norm(View x, View scale, View shift, float eps, float scale_offset, int64_t begin,
                int64_t end, View out) {
  const int64_t dim = x.dim(-1);
  for_float_type(out.dtype(), [&]<typename Out>() {
    layer_norm_rows(x.data<float>() + begin * dim, scale.data<float>(), shift.data<float>(), eps,
                    scale_offset, end - begin, dim, out.data<Out>() + begin * dim);
  });
}

void rms_norm(View x, View weight, float eps, bool silu, int64_t begin, int64_t end, View out) {
  const int64_t dim = x.dim(-1);
  for_float_type(x.dtype(), [&]<typename In>() {
    for_float_type(out.dtype(), [&]<typename Out>() {
      const auto rows = silu ? rms_norm_rows<true, In, Out> : rms_norm_rows<false, In, Out>;
      rows(x.data<In>() + begin * dim, weight.data<float>(), eps, end - begin, dim,
           out.data<Out>() + begin * dim);
    });
  });
}

}  // namespace longtake::HWY_NAMESPACE

HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace longtake::cpu {
namespace {

HWY_EXPORT(layer_norm);
HWY_EXPORT(rms_norm);

constexpr int64_t kGrainValues = 4096;  // below this a second thread costs more than it helps

template <typename Rows>
void parallel_rows(Context& ctx, View x, const Rows& rows) {
  const int64_t dim = x.dim(-1);
  parallel_for(ctx, x.numel() / dim, kGrainValues / dim + 1, rows);
}

}  // namespace

void layer_norm(Context& ctx, View x, View scale, View shift, float eps, bool scale_plus_one,
                View out) {
  const auto rows = HWY_DYNAMIC_DISPATCH(layer_norm);
  parallel_rows(ctx, x, [&](int64_t begin, int64_t end) {
    rows(x, scale, shift, eps, scale_plus_one ? 1.0F : 0.0F, begin, end, out);
  });
}

void rms_norm(Context& ctx, View x, View weight, float eps, View out) {
  const auto rows = HWY_DYNAMIC_DISPATCH(rms_norm);
  parallel_rows(ctx, x, [&](int64_t begin, int64_t end) {
    rows(x, weight, eps, /*silu=*/false, begin, end, out);
  });
}

void rms_norm_silu(Context& ctx, View x, View weight, float eps, View out) {
  const auto rows = HWY_DYNAMIC_DISPATCH(rms_norm);
  parallel_rows(ctx, x, [&](int64_t begin, int64_t end) {
    rows(x, weight, eps, /*silu=*/true, begin, end, out);
  });
}

}  // namespace longtake::cpu
#endif  // HWY_ONCE
