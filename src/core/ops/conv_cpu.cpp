// conv2d on oneDNN, channels-last. The weight is packed for a typical image; for an image that
// wants another layout it is packed again on the first call. (Keeping the first layout there would
// fall to oneDNN's reference kernel, a hundred times slower.)
#include <tuple>

#include "ops/conv.h"
#include "ops/elementwise.h"
#include "ops/image.h"
#include "ops/linear.h"
#include "ops/onednn.h"

namespace longtake {
namespace {

using dnnl::memory;

constexpr int64_t kTypicalSize = 64;

using Key = std::tuple<int64_t /*height*/, int64_t /*width*/, DType /*out*/>;

class Weight : public ConvWeight::Impl {
 public:
  Weight(View plain, View scale, View plain_bias, const ConvWeight::Form& that)
      : Impl(that), bias(onednn::copy_bias(plain_bias)) {
    const memory::dims dims = {form.out, form.in, form.kernel_h, form.kernel_w};
    const memory::desc any(dims, onednn::type_of(form.compute), memory::format_tag::any);
    const auto desc = describe({kTypicalSize, kTypicalSize, DType::kF32}, any);
    weight = onednn::pack(plain, scale, dims, memory::format_tag::oihw, desc.weights_desc());
  }

  size_t bytes() const override {
    const size_t bias_bytes = bias.get(true) == nullptr ? 0 : bias.get_desc().get_size();
    return weight.get_desc().get_size() + bias_bytes;
  }

  dnnl::convolution_forward::primitive_desc describe(const Key& key,
                                                     const memory::desc& packed) const {
    const auto [height, width, out_dtype] = key;
    const auto nhwc = memory::format_tag::nhwc;
    const memory::desc src({1, form.in, height, width}, onednn::type_of(form.compute), nhwc);
    const memory::desc dst(
        {1, form.out, form.out_size(height, form.kernel_h), form.out_size(width, form.kernel_w)},
        onednn::type_of(out_dtype), nhwc);
    memory::desc bias_desc;
    if (bias.get(true) != nullptr) bias_desc = bias.get_desc();
    dnnl::primitive_attr attr;
    attr.set_scratchpad_mode(dnnl::scratchpad_mode::user);
    const memory::dims strides = {form.stride, form.stride};
    const memory::dims pad = {form.padding, form.padding};
    return {{dnnl::prop_kind::forward_inference, dnnl::algorithm::convolution_direct, src, packed,
             bias_desc, dst, strides, pad, pad},
            attr,
            onednn::engine()};
  }

  dnnl::memory weight, bias;
  onednn::PrimitiveCache<Key> primitives;
};

}  // namespace

namespace cpu {

std::unique_ptr<ConvWeight::Impl> pack_conv(Context& /*ctx*/, View weight, View scale, View bias,
                                            const ConvWeight::Form& form) {
  if (form.compute == DType::kBF16 && !bf16_products_supported())
    throw Error(ErrorKind::kUsage, "dtype bf16: expected a CPU with AVX-512, found one without");
  return std::make_unique<Weight>(weight, scale, bias, form);
}

void conv2d(Context& ctx, std::span<const View> parts, const ConvWeight& weight, View out) {
  const Workspace::Scope scope(ctx.workspace());
  const View x = side_by_side(ctx, parts);
  if (weight.compute_dtype() == DType::kF32 && out.dtype() == DType::kBF16) {
    // oneDNN has no f32 convolution with a bf16 result.
    const View wide = ctx.workspace().take(DType::kF32, out.shape());
    cpu::conv2d(ctx, std::span(&x, 1), weight, wide);
    return cpu::convert(ctx, wide, out);
  }
  auto& impl = static_cast<Weight&>(weight.impl());
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
