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

// Calls sink(d, sums, row, e) for outputs [e, e + lanes) of each of kRows rows, 1 or 4. Four rows
// share what is read of m, and two vectors of outputs what is read of x.
template <size_t kRows, class Sink>
HWY_INLINE void project_rows(const float* x, size_t dim, const float* m, size_t outputs,
                             const Sink& sink) {
  const hn::ScalableTag<float> wide;
  const size_t lanes = hn::Lanes(wide);
  size_t done = 0;
  for (; kRows == 4 && done + 2 * lanes <= outputs; done += 2 * lanes) {
    auto a0 = hn::Zero(wide), a1 = a0, a2 = a0, a3 = a0, b0 = a0, b1 = a0, b2 = a0, b3 = a0;
    const float* row = m + done;
    for (size_t i = 0; i < dim; ++i, row += outputs) {
      const auto a = load_f32(wide, row), b = load_f32(wide, row + lanes);
      const auto x0 = hn::Set(wide, x[i]), x1 = hn::Set(wide, x[dim + i]);
      a0 = hn::MulAdd(x0, a, a0), b0 = hn::MulAdd(x0, b, b0);
      a1 = hn::MulAdd(x1, a, a1), b1 = hn::MulAdd(x1, b, b1);
      const auto x2 = hn::Set(wide, x[2 * dim + i]), x3 = hn::Set(wide, x[3 * dim + i]);
      a2 = hn::MulAdd(x2, a, a2), b2 = hn::MulAdd(x2, b, b2);
      a3 = hn::MulAdd(x3, a, a3), b3 = hn::MulAdd(x3, b, b3);
    }
    sink(wide, a0, 0, done), sink(wide, b0, 0, done + lanes);
    sink(wide, a1, 1, done), sink(wide, b1, 1, done + lanes);
    sink(wide, a2, 2, done), sink(wide, b2, 2, done + lanes);
    sink(wide, a3, 3, done), sink(wide, b3, 3, done + lanes);
  }
  for_lanes(outputs - done, [&](auto d, size_t rest) HWY_ATTR {
    const size_t e = done + rest;
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
    sink(d, sum0, 0, e);
    if constexpr (kRows == 4) sink(d, sum1, 1, e), sink(d, sum2, 2, e), sink(d, sum3, 3, e);
  });
}

// Calls sink(d, sums, row, e) for outputs [e, e + lanes) of all rows.
template <class Sink>
HWY_INLINE void project_each(const float* x, size_t rows, size_t dim, const float* m,
                             size_t outputs, const Sink& sink) {
  size_t r = 0;
  const auto of_rows = [&](auto d, auto sums, size_t row, size_t e)
                           HWY_ATTR { sink(d, sums, r + row, e); };
  for (; r + 4 <= rows; r += 4) project_rows<4>(x + r * dim, dim, m, outputs, of_rows);
  for (; r < rows; ++r) project_rows<1>(x + r * dim, dim, m, outputs, of_rows);
}

void project_all(const float* x, size_t rows, size_t dim, const float* m, size_t outputs,
                 float* out) {
  project_each(x, rows, dim, m, outputs, [&](auto d, auto sums, size_t row, size_t e) HWY_ATTR {
    store_f32(d, sums, out + row * outputs + e);
  });
}

void project_all_signs(const float* x, size_t rows, size_t dim, const float* m, size_t outputs,
                       uint64_t* out) {
  std::fill_n(out, rows, uint64_t{0});
  project_each(x, rows, dim, m, outputs, [&](auto d, auto sums, size_t row, size_t e) HWY_ATTR {
    uint64_t bits = 0;
    hn::StoreMaskBits(d, hn::Gt(sums, hn::Zero(d)), reinterpret_cast<uint8_t*>(&bits));
    out[row] |= bits << e;
  });
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

float approach_of(float* x, const float* to, float way, size_t dim) {
  const float square = distance_of(x, to, dim);
  for_lanes(dim, [&](auto d, size_t i) HWY_ATTR {
    const auto from = load_f32(d, x + i);
    const auto rest = hn::Sub(load_f32(d, to + i), from);
    store_f32(d, hn::Add(from, hn::Mul(hn::Set(d, way), rest)), x + i);
  });
  if (way == 1) std::copy_n(to, dim, x);
  return square;
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
HWY_EXPORT(project_all_signs);
HWY_EXPORT(dots_of);
HWY_EXPORT(add_softmax_of);
HWY_EXPORT(approach_of);
HWY_EXPORT(square_distance_of);
HWY_EXPORT(square_distances_of_rows);

void project(const float* x, int64_t rows, int64_t dim, const float* m, int64_t outputs,
             float* out) {
  HWY_DYNAMIC_DISPATCH(project_all)
  (x, static_cast<size_t>(rows), static_cast<size_t>(dim), m, static_cast<size_t>(outputs), out);
}

void project_signs(const float* x, int64_t rows, int64_t dim, const float* m, int64_t outputs,
                   uint64_t* out) {
  HWY_DYNAMIC_DISPATCH(project_all_signs)
  (x, static_cast<size_t>(rows), static_cast<size_t>(dim), m, static_cast<size_t>(outputs), out);
}

void dots(const float* x, int64_t rows, int64_t dim, const float* v, float* out) {
  HWY_DYNAMIC_DISPATCH(dots_of)
  (x, static_cast<size_t>(rows), static_cast<size_t>(dim), v, out);
}

void add_softmax(float* logits, int64_t count, float* mass) {
  HWY_DYNAMIC_DISPATCH(add_softmax_of)(logits, static_cast<size_t>(count), mass);
}

void square_distances_at(const float* x, const int32_t* rows, int64_t count, int64_t dim,
                         const float* v, float* out) {
  HWY_DYNAMIC_DISPATCH(square_distances_of_rows)
  (x, rows, static_cast<size_t>(count), static_cast<size_t>(dim), v, out);
}

float approach(float* x, const float* to, float way, int64_t dim) {
  return HWY_DYNAMIC_DISPATCH(approach_of)(x, to, way, static_cast<size_t>(dim));
}

float square_distance(const float* a, const float* b, int64_t dim) {
  return HWY_DYNAMIC_DISPATCH(square_distance_of)(a, b, static_cast<size_t>(dim));
}

}  // namespace longtake
#endif  // HWY_ONCE
