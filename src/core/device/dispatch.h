// Chooses the twin of an op: LONGTAKE_DISPATCH(ctx, op, args...) calls cpu::op or cuda::op.
// In a CPU build the discarded branch leaves no symbol behind, so no stub is needed.
#pragma once

#include "base/dtype.h"
#include "base/error.h"
#include "build_config.h"
#include "device/context.h"

#define LONGTAKE_DISPATCH(ctx, op, ...)                                                        \
  do {                                                                                         \
    if ((ctx).device().kind == ::longtake::DeviceKind::kCpu) return cpu::op(ctx, __VA_ARGS__); \
    if constexpr (::longtake::kHasCuda) {                                                      \
      return cuda::op(ctx, __VA_ARGS__);                                                       \
    } else {                                                                                   \
      throw ::longtake::Error(#op ": expected a build with CUDA, found one without");          \
    }                                                                                          \
  } while (false)

namespace longtake {

// Calls body.template operator()<T>() with T = float or bf16.
template <typename Body>
void for_float_type(DType dtype, const Body& body) {
  if (dtype == DType::kF32) {
    body.template operator()<float>();
  } else {
    LONGTAKE_CHECK(dtype == DType::kBF16, "found ", name_of(dtype));
    body.template operator()<bf16>();
  }
}

}  // namespace longtake
