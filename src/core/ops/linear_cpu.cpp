// linear on oneDNN's matmul. The weight is packed once, in the layout that the matmul asks for at a
// typical number of rows; every other number of rows uses the same packed weight.
#include <tuple>

#include "ops/elementwise.h"
#include "ops/linear.h"
#include "ops/onednn.h"

namespace longtake {
namespace {

using dnnl::memory;

constexpr int64_t kTypicalRows = 128;

using Key = std::tuple<int64_t /*rows*/, Activation, DType /*out*/>;

dnnl::primitive_attr attributes(Activation activation) {
  dnnl::primitive_attr attr;
  attr.set_scratchpad_mode(dnnl::scratchpad_mode::user);
  dnnl::post_ops ops;
  if (activation == Activation::kSilu)
    ops.append_eltwise(1.0F, dnnl::algorithm::eltwise_swish, 1.0F, 0.0F);
  if (activation == Activation::kGeluTanh)
    ops.append_eltwise(1.0F, dnnl::algorithm::eltwise_gelu_tanh, 0.0F, 0.0F);
  if (activation == Activation::kGelu)
    ops.append_eltwise(1.0F, dnnl::algorithm::eltwise_gelu_erf, 0.0F, 0.0F);
  attr.set_post_ops(ops);
  return attr;
}

class Weight : public LinearWeight::Impl {
 public:
  Weight(View plain, View scale, View plain_bias, DType dtype)
      : Impl(plain.dim(1), plain.dim(0), dtype), bias(onednn::copy_bias(plain_bias)) {
    const memory::dims dims = {in, out};
    const memory::desc any(dims, onednn::type_of(compute), memory::format_tag::any);
    const auto desc = describe({kTypicalRows, Activation::kNone, DType::kF32}, any);
    weight = onednn::pack(plain, scale, dims, memory::format_tag::ba, desc.weights_desc());
  }

  size_t bytes() const override {
    const size_t bias_bytes = bias.get(true) == nullptr ? 0 : bias.get_desc().get_size();
    return weight.get_desc().get_size() + bias_bytes;
  }

  dnnl::matmul::primitive_desc describe(const Key& key, const memory::desc& packed) const {
    const auto [rows, activation, out_dtype] = key;
    const memory::desc src({rows, in}, onednn::type_of(compute), memory::format_tag::ab);
    const memory::desc dst({rows, out}, onednn::type_of(out_dtype), memory::format_tag::ab);
    memory::desc bias_desc;
    if (bias.get(true) != nullptr)
      bias_desc = {{1, out}, memory::data_type::f32, memory::format_tag::ab};
    return {{src, packed, bias_desc, dst}, attributes(activation), onednn::engine()};
  }

  dnnl::memory weight, bias;
  onednn::PrimitiveCache<Key> primitives;
};

}  // namespace

bool bf16_products_supported() {
  return dnnl::get_effective_cpu_isa() >= dnnl::cpu_isa::avx512_core;
}

namespace cpu {

std::unique_ptr<LinearWeight::Impl> pack_linear(Context& /*ctx*/, View weight, View scale,
                                                View bias, DType compute) {
  if (compute == DType::kBF16 && !bf16_products_supported())
    throw Error(ErrorKind::kUsage, "dtype bf16: expected a CPU with AVX-512, found one without");
  return std::make_unique<Weight>(weight, scale, bias, compute);
}

void linear(Context& ctx, View x, const LinearWeight& weight, Activation activation, View out) {
  if (weight.compute_dtype() == DType::kF32 && out.dtype() == DType::kBF16) {
    // oneDNN has no f32 product with a bf16 result.
    const Workspace::Scope scope(ctx.workspace());
    const View wide = ctx.workspace().take(DType::kF32, out.shape());
    cpu::linear(ctx, x, weight, activation, wide);
    return cpu::convert(ctx, wide, out);
  }
  auto& impl = static_cast<Weight&>(weight.impl());
  const Key key{x.dim(0), activation, out.dtype()};
  const onednn::Primitive& primitive = impl.primitives.get(key, [&] {
    const auto desc = impl.describe(key, impl.weight.get_desc());
    return onednn::Primitive{dnnl::matmul(desc), desc.src_desc(), desc.dst_desc(),
                             desc.scratchpad_desc()};
  });
  onednn::execute(ctx, primitive, x, impl.weight, impl.bias, out);
}

}  // namespace cpu
}  // namespace longtake
