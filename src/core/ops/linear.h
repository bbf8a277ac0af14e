// Linear layers: y = act(x W^T + b). Weights are packed once into the layout the CPU kernel likes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "device/context.h"
#include "tensor/tensor.h"

namespace longtake {

enum class Activation { kNone, kSilu, kGeluTanh };

// True when this machine has matrix products in bf16 (AVX-512 or better); if not, compute in f32.
bool bf16_products_supported();

class LinearWeight {
 public:
  // weight [out, in] f32 | bf16 | i8; scale [out] f32 for i8 (value = i8 * scale[row]), else empty;
  // bias [out] f32 or empty. compute f32 | bf16: what inputs and packed weights are stored as.
  LinearWeight(Context& ctx, View weight, View scale, View bias, DType compute);
  ~LinearWeight();
  LinearWeight(LinearWeight&&) noexcept;
  LinearWeight& operator=(LinearWeight&&) noexcept;

  int64_t in_features() const;
  int64_t out_features() const;
  DType compute_dtype() const;
  size_t bytes() const;  // packed weight and bias

  struct Impl;

  Impl& impl() const { return *impl_; }

 private:
  std::unique_ptr<Impl> impl_;
};

// out = act(x W^T + b). x [L, in] in the weight's compute dtype, out [L, out] f32 | bf16. Sums in
// f32. The first call with a new L builds a kernel (milliseconds); later calls find it. Safe to
// call with one weight from several threads, each with its own ctx.
void linear(Context& ctx, View x, const LinearWeight& weight, Activation activation, View out);

namespace cpu {
extern decltype(longtake::linear) linear;
}

namespace cuda {
extern decltype(longtake::linear) linear;
}

}  // namespace longtake
