// Elementwise ops on Highway.
#include "ops/elementwise.h"

#include <cmath>

#include "device/dispatch.h"
#include "device/parallel.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/elementwise_cpu.cpp"
#include "hwy/foreach_target.h"  // stands first: it parses this file once per target

#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"
#include "ops/simd-inl.h"

HWY_BEFORE_NAMESPACE();

namespace longtake::HWY_NAMESPACE {

// out[i] = f(x[i]) for elements [begin, end), any pair of float types.
template <class F>
void map(View x, int64_t begin, int64_t end, View out, const F& f) {
  for_float_type(x.dtype(), [&]<typename In>() {
    for_float_type(out.dtype(), [&]<typename Out>() {
      const In* from = x.data<In>() + begin;
      Out* to = out.data<Out>() + begin;
      for_lanes(static_cast<size_t>(end - begin), [&](auto d, size_t i) HWY_ATTR {
        store_f32(d, f(d, load_f32(d, from + i)), to + i);
      });
    });
  });
}

void add(View x, View y, int64_t begin, int64_t end) {
  for_float_type(y.dtype(), [&]<typename T>() {
    float* to = x.data<float>() + begin;
    const T* from = y.data<T>() + begin;
    for_lanes(static_cast<size_t>(end - begin), [&](auto d, size_t i) HWY_ATTR {
      store_f32(d, hn::Add(load_f32(d, to + i), load_f32(d, from + i)), to + i);
    });
  });
}

void add_gated(View x, View y, View gate, int64_t begin, int64_t end) {
  const int64_t dim = gate.dim(0);
  const float* factor = gate.data<float>();
  for_float_type(y.dtype(), [&]<typename T>() {
    for (int64_t row = begin; row < end; ++row) {
      float* to = x.data<float>() + row * dim;
      const T* from = y.data<T>() + row * dim;
      for_lanes(static_cast<size_t>(dim), [&](auto d, size_t i) HWY_ATTR {
        const auto sum =
            hn::MulAdd(load_f32(d, from + i), load_f32(d, factor + i), load_f32(d, to + i));
        store_f32(d, sum, to + i);
      });
    }
  });
}

void silu(View x, int64_t begin, int64_t end, View out) {
  map(x, begin, end, out, [](auto d, auto v) HWY_ATTR {
    return hn::Div(v, hn::Add(hn::Set(d, 1.0F), hn::Exp(d, hn::Neg(v))));
  });
}

void relu(View x, int64_t begin, int64_t end, View out) {
  map(x, begin, end, out, [](auto d, auto v) HWY_ATTR { return hn::Max(v, hn::Zero(d)); });
}

void convert(View x, int64_t begin, int64_t end, View out) {
  map(x, begin, end, out, [](auto, auto v) HWY_ATTR { return v; });
}

void axpby(float a, View x, float b, View y, int64_t begin, int64_t end, View out) {
  const float* first = x.data<float>() + begin;
  const float* second = y.data<float>() + begin;
  float* to = out.data<float>() + begin;
  for_lanes(static_cast<size_t>(end - begin), [&](auto d, size_t i) HWY_ATTR {
    const auto scaled = hn::Mul(hn::Set(d, b), load_f32(d, second + i));
    store_f32(d, hn::MulAdd(hn::Set(d, a), load_f32(d, first + i), scaled), to + i);
  });
}

void multiply(View x, View y, int64_t begin, int64_t end, View out) {
  for_float_type(out.dtype(), [&]<typename Out>() {
    const float* first = x.data<float>() + begin;
    const float* second = y.data<float>() + begin;
    Out* to = out.data<Out>() + begin;
    for_lanes(static_cast<size_t>(end - begin), [&](auto d, size_t i) HWY_ATTR {
      store_f32(d, hn::Mul(load_f32(d, first + i), load_f32(d, second + i)), to + i);
    });
  });
}

}  // namespace longtake::HWY_NAMESPACE

HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace longtake::cpu {
namespace {

HWY_EXPORT(add);
HWY_EXPORT(add_gated);
HWY_EXPORT(silu);
HWY_EXPORT(relu);
HWY_EXPORT(convert);
HWY_EXPORT(axpby);
HWY_EXPORT(multiply);

constexpr int64_t kGrain = 16384;  // elements; below this a second thread costs more than it helps

}  // namespace

void add(Context& ctx, View x, View y) {
  const auto part = HWY_DYNAMIC_DISPATCH(add);
  parallel_for(ctx, x.numel(), kGrain, [&](int64_t begin, int64_t end) { part(x, y, begin, end); });
}

void add_gated(Context& ctx, View x, View y, View gate) {
  const auto rows = HWY_DYNAMIC_DISPATCH(add_gated);
  parallel_for(ctx, x.dim(0), kGrain / x.dim(1) + 1,
               [&](int64_t begin, int64_t end) { rows(x, y, gate, begin, end); });
}

void silu(Context& ctx, View x, View out) {
  const auto part = HWY_DYNAMIC_DISPATCH(silu);
  parallel_for(ctx, x.numel(), kGrain / 4,
               [&](int64_t begin, int64_t end) { part(x, begin, end, out); });
}

void relu(Context& ctx, View x, View out) {
  const auto part = HWY_DYNAMIC_DISPATCH(relu);
  parallel_for(ctx, x.numel(), kGrain,
               [&](int64_t begin, int64_t end) { part(x, begin, end, out); });
}

void convert(Context& ctx, View x, View out) {
  const auto part = HWY_DYNAMIC_DISPATCH(convert);
  parallel_for(ctx, x.numel(), kGrain,
               [&](int64_t begin, int64_t end) { part(x, begin, end, out); });
}

void axpby(Context& ctx, float a, View x, float b, View y, View out) {
  const auto part = HWY_DYNAMIC_DISPATCH(axpby);
  parallel_for(ctx, x.numel(), kGrain,
               [&](int64_t begin, int64_t end) { part(a, x, b, y, begin, end, out); });
}

void multiply(Context& ctx, View x, View y, View out) {
  const auto part = HWY_DYNAMIC_DISPATCH(multiply);
  parallel_for(ctx, x.numel(), kGrain,
               [&](int64_t begin, int64_t end) { part(x, y, begin, end, out); });
}

// A latent frame is small, so one plain loop on one thread serves.
void soft_limit(Context&, View x, float limit, View out) {
  for_float_type(out.dtype(), [&]<typename Out>() {
    for (int64_t i = 0; i < x.numel(); ++i)
      out.data<Out>()[i] = static_cast<Out>(limit * std::tanh(x.data<float>()[i] / limit));
  });
}

}  // namespace longtake::cpu
#endif  // HWY_ONCE
