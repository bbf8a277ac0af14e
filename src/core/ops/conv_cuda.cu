// conv2d on the GPU, where direct_conv does not do it: the pixels under the kernel become rows of a
// matrix, a part of the image at a time, small enough to stay in the cache between writing and
// reading, and a product does the rest.
#include <algorithm>

#include "device/cuda_runtime.h"
#include "device/dispatch.h"
#include "device/vector.cuh"
#include "ops/conv.h"
#include "ops/direct_conv_cuda.h"
#include "ops/elementwise.h"
#include "ops/image.h"
#include "ops/linear_cuda.h"
#include "ops/widen.h"

namespace longtake::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMatrixBytes = int64_t{32} << 20;
constexpr int64_t kRowBytes = 16;  // rows of the matrix are a multiple

struct Window {
  int height, width, out_width, kernel_w, stride, padding;
  int pixel, used, row;  // words of a pixel, of a row's values and of a row with what fills it
};

// Rows of the matrix from output pixel `first` on: values (ky, kx, channel), then zeros.
template <typename Word>
__global__ void gather(const Word* x, Word* matrix, int first, uint32_t count, Window window) {
  const uint32_t i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= count) return;
  const uint32_t line = i / window.row;
  const int word = static_cast<int>(i - line * window.row);
  const int pixel = first + static_cast<int>(line);
  const int tap = word / window.pixel;
  const int y = pixel / window.out_width * window.stride - window.padding + tap / window.kernel_w;
  const int x_at =
      pixel % window.out_width * window.stride - window.padding + tap % window.kernel_w;
  Word value{};
  if (word < window.used && y >= 0 && y < window.height && x_at >= 0 && x_at < window.width)
    value = x[(int64_t{y} * window.width + x_at) * window.pixel + (word - tap * window.pixel)];
  matrix[i] = value;
}

template <typename Word>
void run_gather(Context& ctx, View x, const ConvWeight::Form& form, int64_t first, View matrix) {
  const auto word = static_cast<int64_t>(sizeof(Word));
  const auto element = static_cast<int64_t>(size_of(x.dtype()));
  Window window{};
  window.height = static_cast<int>(x.dim(0));
  window.width = static_cast<int>(x.dim(1));
  window.out_width = static_cast<int>(form.out_size(x.dim(1), form.kernel_w));
  window.kernel_w = static_cast<int>(form.kernel_w);
  window.stride = static_cast<int>(form.stride);
  window.padding = static_cast<int>(form.padding);
  window.pixel = static_cast<int>(form.in * element / word);
  window.used = static_cast<int>(form.kernel_h * form.kernel_w) * window.pixel;
  window.row = static_cast<int>(matrix.dim(1) * element / word);
  const auto count = static_cast<uint32_t>(matrix.dim(0) * window.row);
  gather<Word><<<blocks_of(count, kThreads), kThreads, 0, stream_of(ctx)>>>(
      reinterpret_cast<const Word*>(x.raw()), reinterpret_cast<Word*>(matrix.raw()),
      static_cast<int>(first), count, window);
  check_launch("conv2d");
}

void gather_rows(Context& ctx, View x, const ConvWeight::Form& form, int64_t first, View matrix) {
  const uint64_t divided =
      static_cast<uint64_t>(form.in) * size_of(x.dtype()) | reinterpret_cast<uintptr_t>(x.raw());
  if (divided % sizeof(uint4) == 0)
    run_gather<uint4>(ctx, x, form, first, matrix);
  else if (divided % sizeof(uint2) == 0)
    run_gather<uint2>(ctx, x, form, first, matrix);
  else if (divided % sizeof(uint32_t) == 0)
    run_gather<uint32_t>(ctx, x, form, first, matrix);
  else
    run_gather<uint16_t>(ctx, x, form, first, matrix);
}

bool is_product(const ConvWeight::Form& form) {
  return form.kernel_h == 1 && form.kernel_w == 1 && form.stride == 1 && form.padding == 0;
}

int64_t row_values(const ConvWeight::Form& form) {
  const int64_t used = form.in * form.kernel_h * form.kernel_w;
  const int64_t unit = kRowBytes / static_cast<int64_t>(size_of(form.compute));
  return is_product(form) ? used : (used + unit - 1) / unit * unit;
}

// [out, in, kh, kw] -> [out, row], a row (ky, kx, channel) with zeros behind it.
Tensor as_rows(View weight, View scale, const ConvWeight::Form& form) {
  const Tensor wide({}, DType::kF32, weight.shape());
  widen(weight, scale, wide);
  Tensor out = Tensor::zeros({}, DType::kF32, {form.out, row_values(form)});
  const int64_t taps = form.kernel_h * form.kernel_w;
  const float* from = wide.data<float>();
  for (int64_t o = 0; o < form.out; ++o) {
    float* row = out.data<float>() + o * out.dim(1);
    for (int64_t c = 0; c < form.in; ++c) {
      for (int64_t tap = 0; tap < taps; ++tap) row[tap * form.in + c] = *from++;
    }
  }
  return out;
}

class Weight : public ConvWeight::Impl {
 public:
  Weight(Context& ctx, View plain, View scale, View bias, const ConvWeight::Form& that)
      : Impl(that), packed(ctx, as_rows(plain, scale, that), bias, that.compute) {}

  size_t bytes() const override { return packed.bytes(); }

  PackedProduct packed;
};

}  // namespace

std::unique_ptr<ConvWeight::Impl> pack_conv(Context& ctx, View weight, View scale, View bias,
                                            const ConvWeight::Form& form) {
  return std::make_unique<Weight>(ctx, weight, scale, bias, form);
}

void conv2d(Context& ctx, std::span<const View> parts, const ConvWeight& weight, View out) {
  if (out.empty()) return;
  const auto& impl = static_cast<const Weight&>(weight.impl());
  if (is_direct_conv(parts, impl.form)) return direct_conv(ctx, parts, impl.packed, out);
  const Workspace::Scope scope(ctx.workspace());
  const View x = side_by_side(ctx, parts);
  const int64_t pixels = out.dim(0) * out.dim(1);
  const View results = out.reshape({pixels, out.dim(2)});
  if (is_product(impl.form))
    return multiply(ctx, x.reshape({pixels, x.dim(2)}), impl.packed, Activation::kNone, results);
  const int64_t row = row_values(impl.form);
  const int64_t most =
      std::max<int64_t>(1, kMatrixBytes / (row * static_cast<int64_t>(size_of(impl.form.compute))));
  const int64_t rounds = (pixels + most - 1) / most;
  const int64_t part = (pixels + rounds - 1) / rounds;
  const View matrix = ctx.workspace().take(impl.form.compute, {part, row});
  for (int64_t begin = 0; begin < pixels; begin += part) {
    const int64_t end = std::min(begin + part, pixels);
    const View rows = matrix.rows(0, end - begin);
    gather_rows(ctx, x, impl.form, begin, rows);
    multiply(ctx, rows, impl.packed, Activation::kNone, results.rows(begin, end));
  }
}

}  // namespace longtake::cuda
