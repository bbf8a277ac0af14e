#include "ops/onednn.h"

#include <omp.h>

#include <cstring>

#include "base/error.h"
#include "ops/widen.h"

namespace longtake::onednn {
namespace {

// A CPU stream runs each primitive at once in the calling thread's OpenMP pool; it has no state.
const dnnl::stream& stream() {
  static const dnnl::stream instance(engine());
  return instance;
}

}  // namespace

const dnnl::engine& engine() {
  static const dnnl::engine instance(dnnl::engine::kind::cpu, 0);
  return instance;
}

dnnl::memory::data_type type_of(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return dnnl::memory::data_type::f32;
    case DType::kBF16:
      return dnnl::memory::data_type::bf16;
    case DType::kI8:
      return dnnl::memory::data_type::s8;
    case DType::kU8:
      return dnnl::memory::data_type::u8;
    case DType::kI32:
      return dnnl::memory::data_type::s32;
    default:
      return dnnl::memory::data_type::undef;
  }
}

dnnl::memory memory_of(const dnnl::memory::desc& desc, View view) {
  return dnnl::memory(desc, engine(), view.raw());
}

dnnl::memory pack(View weight, View scale, const dnnl::memory::dims& dims,
                  dnnl::memory::format_tag plain, const dnnl::memory::desc& packed) {
  Tensor wide;
  if (weight.dtype() == DType::kI8) {
    wide = Tensor({}, DType::kF32, weight.shape());
    widen(weight, scale, wide);
    weight = wide;
  }
  dnnl::memory from = memory_of({dims, type_of(weight.dtype()), plain}, weight);
  dnnl::memory to(packed, engine());
  dnnl::reorder(from, to).execute(stream(), from, to);
  return to;
}

dnnl::memory repacked(const dnnl::memory& weight, const dnnl::memory::desc& packed) {
  if (weight.get_desc() == packed) return weight;
  dnnl::memory from = weight;
  dnnl::memory to(packed, engine());
  dnnl::reorder(from, to).execute(stream(), from, to);
  return to;
}

dnnl::memory copy_bias(View bias) {
  if (bias.empty()) return {};
  dnnl::memory out({{bias.numel()}, dnnl::memory::data_type::f32, dnnl::memory::format_tag::a},
                   engine());
  std::memcpy(out.get_data_handle(), bias.raw(), bias.bytes());
  return out;
}

void execute(Context& ctx, const Primitive& primitive, View src, const dnnl::memory& weight,
             const dnnl::memory& bias, View dst) {
  // Not every calling thread has seen the Context's constructor set this.
  omp_set_num_threads(ctx.threads());
  const Workspace::Scope scope(ctx.workspace());
  const auto scratch_bytes = static_cast<int64_t>(primitive.scratchpad.get_size());
  const View scratch = ctx.workspace().take(DType::kU8, {scratch_bytes});
  const dnnl::memory src_memory = memory_of(primitive.src, src);
  const dnnl::memory dst_memory = memory_of(primitive.dst, dst);
  const dnnl::memory scratch_memory = memory_of(primitive.scratchpad, scratch);
  const dnnl_exec_arg_t args[] = {{DNNL_ARG_SRC, src_memory.get()},
                                  {DNNL_ARG_WEIGHTS, weight.get()},
                                  {DNNL_ARG_DST, dst_memory.get()},
                                  {DNNL_ARG_SCRATCHPAD, scratch_memory.get()},
                                  {DNNL_ARG_BIAS, bias.get(true)}};
  const int count = bias.get(true) == nullptr ? 4 : 5;
  dnnl::error::wrap_c_api(
      dnnl_primitive_execute(primitive.primitive.get(), stream().get(), count, args),
      "oneDNN could not run a primitive");
}

}  // namespace longtake::onednn
