// Linear layers: y = act(x W^T + b). Weights are packed once, as the kernels of their device like
// them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "device/context.h"
#include "tensor/tensor.h"

namespace longtake {

enum class Activation { kNone, kSilu, kGeluTanh, kGelu };  // kGelu: x times the normal integral

// True when this machine's CPU has matrix products in bf16 (AVX-512 or better); if not, compute in
// f32 there.
bool bf16_products_supported();

class LinearWeight {
 public:
  // weight [out, in] f32 | bf16 | i8; scale [out] f32 for i8 (value = i8 * scale[row]), else empty;
  // bias [out] f32 or empty; all on the CPU, packed for ctx's device. compute f32 | bf16: what
  // inputs and packed weights are stored as.
  LinearWeight(Context& ctx, View weight, View scale, View bias, DType compute);

  int64_t in_features() const { return impl_->in; }

  int64_t out_features() const { return impl_->out; }

  DType compute_dtype() const { return impl_->compute; }

  size_t bytes() const { return impl_->bytes(); }  // packed weight and bias

  // As one device holds it; its twin of linear() knows which.
  class Impl {
   public:
    Impl(int64_t in_features, int64_t out_features, DType dtype)
        : in(in_features), out(out_features), compute(dtype) {}

    virtual ~Impl() = default;
    Impl(const Impl&) = delete;
    Impl& operator=(const Impl&) = delete;

    virtual size_t bytes() const = 0;

    const int64_t in, out;
    const DType compute;
  };

  Impl& impl() const { return *impl_; }

 private:
  std::unique_ptr<Impl> impl_;
};

// out = act(x W^T + b). x [L, in] in the weight's compute dtype, out [L, out] f32 | bf16. Sums in
// f32. The first call with a new L builds or chooses a kernel (milliseconds) and may allocate;
// later calls find it. Safe to call with one weight from several threads, each with its own ctx.
void linear(Context& ctx, View x, const LinearWeight& weight, Activation activation, View out);

namespace cpu {
extern decltype(longtake::linear) linear;
std::unique_ptr<LinearWeight::Impl> pack_linear(Context& ctx, View weight, View scale, View bias,
                                                DType compute);
}  // namespace cpu

namespace cuda {
extern decltype(longtake::linear) linear;
extern decltype(cpu::pack_linear) pack_linear;
}  // namespace cuda

}  // namespace longtake
