#include "ann/project.h"

#include <algorithm>
#include <cmath>
#include <cstddef>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ann/project_cpu.cpp"
#include "hwy/foreach_target.h"  // stands first: it parses this file once per target

#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"
#include "ops/simd-inl.h"

HWY_BEFORE_NAMESPACE();

namespace longtake::HWY_NAMESPACE {

// Four rows at a time share what is read of m.
template <size_t kRows>
HWY_INLINE void project_rows(const float* x, size_t dim, const float* m, size_t outputs,
                             float* out) {
  for_lanes(outputs, [&](auto d, size_t e) HWY_ATTR {
    auto sum0 = hn::Zero(d), sum1 = sum0, sum2 = sum0, sum3 = sum0;
    for (size_t i = 0; i < dim; ++i) {
      const auto column = load_f32(d, m + i * outputs + e);
      sum0 = hn::MulAdd(hn::Set(d, x[i]), column, sum0);
      if constexpr (kRows == 4) {
        sum1 = hn::MulAdd(hn::Set(d, x[dim + i]), column, sum1);
        sum2 = hn::MulAdd(hn::Set(d, x[2 * dim + i]), column, sum2);
        sum3 = hn::MulAdd(hn::Set(d, x[3 * dim + i]), column, sum3);
      }
    }
    store_f32(d, sum0, out + e);
    if constexpr (kRows == 4) {
      store_f32(d, sum1, out + outputs + e);
      store_f32(d, sum2, out + 2 * outputs + e);
      store_f32(d, sum3, out + 3 * outputs + e);
    }
  });
}

void project_all(const float* x, size_t rows, size_t dim, const float* m, size_t outputs,
                 float* out) {
  size_t r = 0;
  for (; r + 4 <= rows; r += 4) project_rows<4>(x + r * dim, dim, m, outputs, out + r * outputs);
  for (; r < rows; ++r) project_rows<1>(x + r * dim, dim, m, outputs, out + r * outputs);
}

HWY_INLINE float dot_of(const float* x, size_t dim, const float* v) {
  const hn::ScalableTag<float> d;
  auto sum = hn::Zero(d);
  float rest = 0;
  size_t i = 0;
  for (; i + hn::Lanes(d) <= dim; i += hn::Lanes(d))
    sum = hn::MulAdd(load_f32(d, x + i), load_f32(d, v + i), sum);
  for (; i < dim; ++i) rest += x[i] * v[i];
  return rest + hn::GetLane(hn::SumOfLanes(d, sum));
}

void dots_of(const float* x, size_t rows, size_t dim, const float* v, float* out) {
  for (size_t r = 0; r < rows; ++r) out[r] = dot_of(x + r * dim, dim, v);
}

void dots_of_rows(const float* x, const int32_t* rows, size_t count, size_t dim, const float* v,
                  float* out) {
  for (size_t i = 0; i < count; ++i)
    out[i] = dot_of(x + static_cast<size_t>(rows[i]) * dim, dim, v);
}

void add_softmax_of(float* logits, size_t count, float* mass) {
  float most = -INFINITY;
  for (size_t i = 0; i < count; ++i) most = std::max(most, logits[i]);
  float sum = 0;
  for_lanes(count, [&](auto dl, size_t i) HWY_ATTR {
    const auto e = hn::Exp(dl, hn::Sub(load_f32(dl, logits + i), hn::Set(dl, most)));
    store_f32(dl, e, logits + i);
    sum += hn::GetLane(hn::SumOfLanes(dl, e));
  });
  const float inverse = 1.0F / sum;
  for_lanes(count, [&](auto dl, size_t i) HWY_ATTR {
    store_f32(dl,
              hn::MulAdd(load_f32(dl, logits + i), hn::Set(dl, inverse), load_f32(dl, mass + i)),
              mass + i);
  });
}

void turn_terms_of(const float* query, const float* key, size_t pairs, float* terms) {
  const auto some = [&](auto d, size_t i) HWY_ATTR {
    hn::Vec<decltype(d)> k0, k1;
    hn::LoadInterleaved2(d, key + 2 * i, k0, k1);
    const auto q0 = load_f32(d, query + i), q1 = load_f32(d, query + pairs + i);
    store_f32(d, hn::MulAdd(q0, k0, hn::Mul(q1, k1)), terms + i);
    store_f32(d, hn::MulSub(q0, k1, hn::Mul(q1, k0)), terms + pairs + i);
  };
  const hn::CappedTag<float, 8> d;
  size_t i = 0;
  for (; i + hn::Lanes(d) <= pairs; i += hn::Lanes(d)) some(d, i);
  for (; i < pairs; ++i) some(hn::CappedTag<float, 1>(), i);
}

void exp_of(float* x, size_t count) {
  for_lanes(count, [&](auto d, size_t i)
                       HWY_ATTR { store_f32(d, hn::Exp(d, load_f32(d, x + i)), x + i); });
}

void log_of(float* x, size_t count) {
  for_lanes(count, [&](auto d, size_t i)
                       HWY_ATTR { store_f32(d, hn::Log(d, load_f32(d, x + i)), x + i); });
}

HWY_INLINE float distance_of(const float* a, const float* b, size_t dim) {
  const hn::ScalableTag<float> d;
  auto sum = hn::Zero(d);
  float rest = 0;
  size_t i = 0;
  for (; i + hn::Lanes(d) <= dim; i += hn::Lanes(d)) {
    const auto difference = hn::Sub(load_f32(d, a + i), load_f32(d, b + i));
    sum = hn::MulAdd(difference, difference, sum);
  }
  for (; i < dim; ++i) rest += (a[i] - b[i]) * (a[i] - b[i]);
  return rest + hn::GetLane(hn::SumOfLanes(d, sum));
}

float square_distance_of(const float* a, const float* b, size_t dim) {
  return distance_of(a, b, dim);
}

void square_distances_of_rows(const float* x, const int32_t* rows, size_t count, size_t dim,
                              const float* v, float* out) {
  for (size_t i = 0; i < count; ++i)
    out[i] = distance_of(x + static_cast<size_t>(rows[i]) * dim, v, dim);
}

}  // namespace longtake::HWY_NAMESPACE

HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace longtake {

HWY_EXPORT(project_all);
HWY_EXPORT(dots_of);
HWY_EXPORT(dots_of_rows);
HWY_EXPORT(add_softmax_of);
HWY_EXPORT(turn_terms_of);
HWY_EXPORT(exp_of);
HWY_EXPORT(log_of);
HWY_EXPORT(square_distance_of);
HWY_EXPORT(square_distances_of_rows);

void project(const float* x, int64_t rows, int64_t dim, const float* m, int64_t outputs,
             float* out) {
  HWY_DYNAMIC_DISPATCH(project_all)
  (x, static_cast<size_t>(rows), static_cast<size_t>(dim), m, static_cast<size_t>(outputs), out);
}

void dots(const float* x, int64_t rows, int64_t dim, const float* v, float* out) {
  HWY_DYNAMIC_DISPATCH(dots_of)
  (x, static_cast<size_t>(rows), static_cast<size_t>(dim), v, out);
}

void dots_at(const float* x, const int32_t* rows, int64_t count, int64_t dim, const float* v,
             float* out) {
  HWY_DYNAMIC_DISPATCH(dots_of_rows)
  (x, rows, static_cast<size_t>(count), static_cast<size_t>(dim), v, out);
}

void add_softmax(float* logits, int64_t count, float* mass) {
  HWY_DYNAMIC_DISPATCH(add_softmax_of)(logits, static_cast<size_t>(count), mass);
}

void turn_terms(const float* query, const float* key, int64_t pairs, float* terms) {
  HWY_DYNAMIC_DISPATCH(turn_terms_of)(query, key, static_cast<size_t>(pairs), terms);
}

void exp_all(float* x, int64_t count) {
  HWY_DYNAMIC_DISPATCH(exp_of)(x, static_cast<size_t>(count));
}

void log_all(float* x, int64_t count) {
  HWY_DYNAMIC_DISPATCH(log_of)(x, static_cast<size_t>(count));
}

void square_distances_at(const float* x, const int32_t* rows, int64_t count, int64_t dim,
                         const float* v, float* out) {
  HWY_DYNAMIC_DISPATCH(square_distances_of_rows)
  (x, rows, static_cast<size_t>(count), static_cast<size_t>(dim), v, out);
}

float square_distance(const float* a, const float* b, int64_t dim) {
  return HWY_DYNAMIC_DISPATCH(square_distance_of)(a, b, static_cast<size_t>(dim));
}

}  // namespace longtake
#endif  // HWY_ONCE
