// linear on oneDNN's matmul. The weight is packed once, in the layout that the matmul asks for at a
// typical number of rows; every other number of rows uses the same packed weight.
#include <tuple>

#include "ops/elementwise.h"
#include "ops/expect.h"
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
  attr.set_post_ops(ops);
  return attr;
}

}  // namespace

struct LinearWeight::Impl {
  int64_t in = 0, out = 0;
  DType compute = DType::kF32;
  dnnl::memory weight, bias;
  onednn::PrimitiveCache<Key> primitives;

  dnnl::matmul::primitive_desc describe(const Key& key, const memory::desc& packed) const {
    const auto [rows, activation, out_dtype] = key;
    const memory::desc src({rows, in}, onednn::type_of(compute), memory::format_tag::ab);
    const memory::desc dst({rows, out}, onednn::type_of(out_dtype), memory::format_tag::ab);
    memory::desc bias_desc;
    if (bias.get(true) != nullptr)
      bias_desc = {{1, out}, memory::data_type::f32, memory::format_tag::ab};
    return {{src, packed, bias_desc, dst}, attributes(activation), onednn::engine()};
  }
};

LinearWeight::LinearWeight(Context& ctx, View weight, View scale, View bias, DType compute)
    : impl_(std::make_unique<Impl>()) {
  expect_rank("linear weight", weight, 2);
  impl_->out = weight.dim(0);
  impl_->in = weight.dim(1);
  impl_->compute = compute;
  if (weight.dtype() == DType::kI8) {
    expect_shape("linear scale", scale, {impl_->out});
    expect_dtype("linear scale", scale, DType::kF32);
  } else {
    expect_float("linear weight", weight);
  }
  if (!bias.empty()) {
    expect_shape("linear bias", bias, {impl_->out});
    expect_dtype("linear bias", bias, DType::kF32);
  }
  if (compute == DType::kBF16 && !bf16_products_supported())
    throw Error(ErrorKind::kUsage, "dtype bf16: expected a CPU with AVX-512, found one without");
  const memory::dims dims = {impl_->in, impl_->out};
  const memory::desc any(dims, onednn::type_of(compute), memory::format_tag::any);
  impl_->bias = onednn::copy_bias(bias);
  const auto desc = impl_->describe({kTypicalRows, Activation::kNone, DType::kF32}, any);
  impl_->weight =
      onednn::pack(ctx, weight, scale, dims, memory::format_tag::ba, desc.weights_desc());
}

LinearWeight::~LinearWeight() = default;
LinearWeight::LinearWeight(LinearWeight&&) noexcept = default;
LinearWeight& LinearWeight::operator=(LinearWeight&&) noexcept = default;

int64_t LinearWeight::in_features() const {
  return impl_->in;
}

int64_t LinearWeight::out_features() const {
  return impl_->out;
}

DType LinearWeight::compute_dtype() const {
  return impl_->compute;
}

size_t LinearWeight::bytes() const {
  const size_t bias = impl_->bias.get(true) == nullptr ? 0 : impl_->bias.get_desc().get_size();
  return impl_->weight.get_desc().get_size() + bias;
}

bool bf16_products_supported() {
  return dnnl::get_effective_cpu_isa() >= dnnl::cpu_isa::avx512_core;
}

namespace cpu {

void linear(Context& ctx, View x, const LinearWeight& weight, Activation activation, View out) {
  if (weight.compute_dtype() == DType::kF32 && out.dtype() == DType::kBF16) {
    // oneDNN has no f32 product with a bf16 result.
    const Workspace::Scope scope(ctx.workspace());
    const View wide = ctx.workspace().take(DType::kF32, out.shape());
    cpu::linear(ctx, x, weight, activation, wide);
    return cpu::convert(ctx, wide, out);
  }
  LinearWeight::Impl& impl = weight.impl();
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
