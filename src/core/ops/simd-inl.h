// Highway pieces that the CPU kernels share: loads and stores of f32 | bf16 as f32 lanes, loops
// over whole vectors and a tail. Included once per target, inside each kernel file.

// Highway's toggle: this file is parsed again for every target.
#if defined(LONGTAKE_OPS_SIMD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef LONGTAKE_OPS_SIMD_INL_H_
#undef LONGTAKE_OPS_SIMD_INL_H_
#else
#define LONGTAKE_OPS_SIMD_INL_H_
#endif

#include <cstddef>
#include <cstdint>

#include "base/dtype.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();

namespace longtake::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

template <class DF>
HWY_INLINE hn::Vec<DF> load_f32(DF d, const float* p) {
  return hn::LoadU(d, p);
}

template <class DF>
HWY_INLINE hn::Vec<DF> load_f32(DF d, const bf16* p) {
  const hn::RebindToUnsigned<DF> du;
  const hn::Rebind<uint16_t, DF> dh;
  const auto half = hn::LoadU(dh, reinterpret_cast<const uint16_t*>(p));
  return hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(du, half)));
}

template <class DF>
HWY_INLINE void store_f32(DF d, hn::Vec<DF> v, float* p) {
  hn::StoreU(v, d, p);
}

// Rounds to nearest even (Highway 1.0.3 truncates). A NaN may lose its payload's low bits only.
template <class DF>
HWY_INLINE void store_f32(DF /*d*/, hn::Vec<DF> v, bf16* p) {
  const hn::RebindToUnsigned<DF> du;
  const hn::Rebind<uint16_t, DF> dh;
  const auto bits = hn::BitCast(du, v);
  const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(du, 1));
  const auto rounded = hn::Add(bits, hn::Add(odd, hn::Set(du, 0x7fff)));
  const auto quiet = hn::Or(bits, hn::Set(du, 0x400000));
  const auto nan = hn::RebindMask(du, hn::IsNaN(v));
  const auto out = hn::ShiftRight<16>(hn::IfThenElse(nan, quiet, rounded));
  hn::StoreU(hn::TruncateTo(dh, out), dh, reinterpret_cast<uint16_t*>(p));
}

// Calls body(d, i) for whole vectors of f32, then for single lanes, until count elements are done.
template <class Body>
HWY_INLINE void for_lanes(size_t count, const Body& body) {
  const hn::ScalableTag<float> d;
  size_t i = 0;
  for (; i + hn::Lanes(d) <= count; i += hn::Lanes(d)) body(d, i);
  for (; i < count; ++i) body(hn::CappedTag<float, 1>(), i);
}

}  // namespace longtake::HWY_NAMESPACE

HWY_AFTER_NAMESPACE();

#endif  // toggle
