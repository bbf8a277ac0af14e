// conv2d on oneDNN, channels-last. The weight is packed for a typical image; for an image that
// wants another layout it is packed again on the first call. (Keeping the first layout there would
// fall to oneDNN's reference kernel, a hundred times slower.)
#include <algorithm>
#include <tuple>

#include "ops/conv.h"
#include "ops/elementwise.h"
#include "ops/expect.h"
#include "ops/linear.h"
#include "ops/onednn.h"

namespace longtake {
namespace {

using dnnl::memory;

constexpr int64_t kTypicalSize = 64;

using Key = std::tuple<int64_t /*height*/, int64_t /*width*/, DType /*out*/>;

}  // namespace

struct ConvWeight::Impl {
  int64_t in = 0, out = 0, kernel_h = 0, kernel_w = 0, stride = 1, padding = 0;
  DType compute = DType::kF32;
  dnnl::memory weight, bias;
  onednn::PrimitiveCache<Key> primitives;

  int64_t out_size(int64_t size, int64_t kernel) const {
    return std::max<int64_t>(0, (size + 2 * padding - kernel) / stride + 1);
  }

  dnnl::convolution_forward::primitive_desc describe(const Key& key,
                                                     const memory::desc& packed) const {
    const auto [height, width, out_dtype] = key;
    const auto nhwc = memory::format_tag::nhwc;
    const memory::desc src({1, in, height, width}, onednn::type_of(compute), nhwc);
    const memory::desc dst({1, out, out_size(height, kernel_h), out_size(width, kernel_w)},
                           onednn::type_of(out_dtype), nhwc);
    memory::desc bias_desc;
    if (bias.get(true) != nullptr) bias_desc = bias.get_desc();
    dnnl::primitive_attr attr;
    attr.set_scratchpad_mode(dnnl::scratchpad_mode::user);
    const memory::dims strides = {stride, stride};
    const memory::dims pad = {padding, padding};
    return {{dnnl::prop_kind::forward_inference, dnnl::algorithm::convolution_direct, src, packed,
             bias_desc, dst, strides, pad, pad},
            attr,
            onednn::engine()};
  }
};

ConvWeight::ConvWeight(Context& ctx, View weight, View scale, View bias, int stride, int padding,
                       DType compute)
    : impl_(std::make_unique<Impl>()) {
  expect_rank("conv2d weight", weight, 4);
  LONGTAKE_CHECK(stride > 0 && padding >= 0, "stride ", stride, ", padding ", padding);
  impl_->out = weight.dim(0);
  impl_->in = weight.dim(1);
  impl_->kernel_h = weight.dim(2);
  impl_->kernel_w = weight.dim(3);
  impl_->stride = stride;
  impl_->padding = padding;
  impl_->compute = compute;
  if (weight.dtype() == DType::kI8) {
    expect_shape("conv2d scale", scale, {impl_->out});
    expect_dtype("conv2d scale", scale, DType::kF32);
  } else {
    expect_float("conv2d weight", weight);
  }
  if (!bias.empty()) {
    expect_shape("conv2d bias", bias, {impl_->out});
    expect_dtype("conv2d bias", bias, DType::kF32);
  }
  if (compute == DType::kBF16 && !bf16_products_supported())
    throw Error(ErrorKind::kUsage, "dtype bf16: expected a CPU with AVX-512, found one without");
  const memory::dims dims = {impl_->out, impl_->in, impl_->kernel_h, impl_->kernel_w};
  const memory::desc any(dims, onednn::type_of(compute), memory::format_tag::any);
  impl_->bias = onednn::copy_bias(bias);
  const auto desc = impl_->describe({kTypicalSize, kTypicalSize, DType::kF32}, any);
  impl_->weight =
      onednn::pack(ctx, weight, scale, dims, memory::format_tag::oihw, desc.weights_desc());
}

ConvWeight::~ConvWeight() = default;
ConvWeight::ConvWeight(ConvWeight&&) noexcept = default;
ConvWeight& ConvWeight::operator=(ConvWeight&&) noexcept = default;

int64_t ConvWeight::in_channels() const {
  return impl_->in;
}

int64_t ConvWeight::out_channels() const {
  return impl_->out;
}

DType ConvWeight::compute_dtype() const {
  return impl_->compute;
}

size_t ConvWeight::bytes() const {
  const size_t bias = impl_->bias.get(true) == nullptr ? 0 : impl_->bias.get_desc().get_size();
  return impl_->weight.get_desc().get_size() + bias;
}

int64_t ConvWeight::out_height(int64_t size) const {
  return impl_->out_size(size, impl_->kernel_h);
}

int64_t ConvWeight::out_width(int64_t size) const {
  return impl_->out_size(size, impl_->kernel_w);
}

namespace cpu {

void conv2d(Context& ctx, View x, const ConvWeight& weight, View out) {
  if (weight.compute_dtype() == DType::kF32 && out.dtype() == DType::kBF16) {
    // oneDNN has no f32 convolution with a bf16 result.
    const Workspace::Scope scope(ctx.workspace());
    const View wide = ctx.workspace().take(DType::kF32, out.shape());
    cpu::conv2d(ctx, x, weight, wide);
    return cpu::convert(ctx, wide, out);
  }
  ConvWeight::Impl& impl = weight.impl();
  const Key key{x.dim(0), x.dim(1), out.dtype()};
  const onednn::Primitive& primitive = impl.primitives.get(key, [&] {
    const memory::desc packed = impl.weight.get_desc();
    const auto desc =
        impl.describe(key, {packed.dims(), packed.data_type(), memory::format_tag::any});
    return onednn::Primitive{dnnl::convolution_forward(desc), desc.src_desc(), desc.dst_desc(),
                             desc.scratchpad_desc(),
                             onednn::repacked(impl.weight, desc.weights_desc())};
  });
  onednn::execute(ctx, primitive, x, primitive.weight, impl.bias, out);
}

}  // namespace cpu
}  // namespace longtake
