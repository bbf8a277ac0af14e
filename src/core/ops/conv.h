// 2-D convolution over channels-last images, zero padding, square stride and padding.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "device/context.h"
#include "tensor/tensor.h"

namespace longtake {

class ConvWeight {
 public:
  // weight [out, in, kh, kw] f32 | bf16 | i8; scale [out] f32 for i8, else empty; bias [out] f32 or
  // empty. compute f32 | bf16.
  ConvWeight(Context& ctx, View weight, View scale, View bias, int stride, int padding,
             DType compute);
  ~ConvWeight();
  ConvWeight(ConvWeight&&) noexcept;
  ConvWeight& operator=(ConvWeight&&) noexcept;

  int64_t in_channels() const;
  int64_t out_channels() const;
  DType compute_dtype() const;
  size_t bytes() const;  // packed weight and bias

  // The size of the output along one axis for an input of `size` pixels.
  int64_t out_height(int64_t size) const;
  int64_t out_width(int64_t size) const;

  struct Impl;

  Impl& impl() const { return *impl_; }

 private:
  std::unique_ptr<Impl> impl_;
};

// x [H, W, in] in the weight's compute dtype, out [H', W', out] f32 | bf16. Sums in f32.
void conv2d(Context& ctx, View x, const ConvWeight& weight, View out);

namespace cpu {
extern decltype(longtake::conv2d) conv2d;
}

namespace cuda {
extern decltype(longtake::conv2d) conv2d;
}

}  // namespace longtake
