// 2-D convolution over channels-last images, zero padding, square stride and padding.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "device/context.h"
#include "tensor/tensor.h"

namespace longtake {

class ConvWeight {
 public:
  // weight [out, in, kh, kw] f32 | bf16 | i8; scale [out] f32 for i8, else empty; bias [out] f32 or
  // empty; all on the CPU, packed for ctx's device. compute f32 | bf16.
  ConvWeight(Context& ctx, View weight, View scale, View bias, int stride, int padding,
             DType compute);

  int64_t in_channels() const { return impl_->form.in; }

  int64_t out_channels() const { return impl_->form.out; }

  DType compute_dtype() const { return impl_->form.compute; }

  size_t bytes() const { return impl_->bytes(); }  // packed weight and bias

  // The size of the output along one axis for an input of `size` pixels.
  int64_t out_height(int64_t size) const {
    return impl_->form.out_size(size, impl_->form.kernel_h);
  }

  int64_t out_width(int64_t size) const { return impl_->form.out_size(size, impl_->form.kernel_w); }

  struct Form {
    int64_t in, out, kernel_h, kernel_w, stride, padding;
    DType compute;

    int64_t out_size(int64_t size, int64_t kernel) const {
      return std::max<int64_t>(0, (size + 2 * padding - kernel) / stride + 1);
    }
  };

  // As one device holds it; its twin of conv2d() knows which.
  class Impl {
   public:
    explicit Impl(const Form& that) : form(that) {}

    virtual ~Impl() = default;
    Impl(const Impl&) = delete;
    Impl& operator=(const Impl&) = delete;

    virtual size_t bytes() const = 0;

    const Form form;
  };

  Impl& impl() const { return *impl_; }

 private:
  std::unique_ptr<Impl> impl_;
};

// x [H, W, in] in the weight's compute dtype, out [H', W', out] f32 | bf16. Sums in f32.
void conv2d(Context& ctx, View x, const ConvWeight& weight, View out);

// The same of 1 to kMaxImageParts images [H, W, C_i], whose channels stand side by side in x.
void conv2d(Context& ctx, std::span<const View> parts, const ConvWeight& weight, View out);

namespace cpu {
void conv2d(Context& ctx, std::span<const View> parts, const ConvWeight& weight, View out);
std::unique_ptr<ConvWeight::Impl> pack_conv(Context& ctx, View weight, View scale, View bias,
                                            const ConvWeight::Form& form);
}  // namespace cpu

namespace cuda {
void conv2d(Context& ctx, std::span<const View> parts, const ConvWeight& weight, View out);
extern decltype(cpu::pack_conv) pack_conv;
}  // namespace cuda

}  // namespace longtake
