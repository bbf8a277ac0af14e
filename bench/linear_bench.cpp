// The model's other kernels: linear layers and convolutions (oneDNN, GFLOP/s against the measured
// ceiling) and the memory-bound ones (microseconds, GB/s of what they must read and write). Checks
// linear and conv2d against sums in double before it times them.
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "bench.h"
#include "kv/cache.h"
#include "ops/conv.h"
#include "ops/elementwise.h"
#include "ops/linear.h"
#include "ops/norm.h"
#include "ops/rope.h"

namespace longtake {
namespace {

double at(View view, int64_t i) {
  return view.dtype() == DType::kF32
             ? static_cast<double>(view.data<float>()[i])
             : static_cast<double>(static_cast<float>(view.data<bf16>()[i]));
}

bool close(double found, double expected, double magnitude) {
  return std::fabs(found - expected) <= 1e-4 * magnitude;
}

void print(const char* name, DType dtype, int threads, const std::string& shape, double seconds,
           double flop) {
  const double rate = flop / seconds;
  std::printf("%-7s %-4s %d %-28s | %8.1f us | %6.1f GFLOP/s | %3.0f %%\n", name, name_of(dtype),
              threads, shape.c_str(), seconds * 1e6, rate * 1e-9,
              100 * rate / bench::dot_ceiling(dtype, threads));
}

bool run_linear(DType dtype, int threads, int64_t rows, int64_t in, int64_t out) {
  Context ctx({}, threads);
  const Tensor x = bench::random_tensor(dtype, {rows, in}, 0);
  const Tensor w = bench::random_tensor(dtype, {out, in}, 1);
  Tensor y({}, DType::kF32, {rows, out});
  const LinearWeight weight(ctx, w, {}, {}, dtype);
  const auto run = [&] { linear(ctx, x, weight, Activation::kNone, y); };
  run();
  double sum = 0;
  for (int64_t i = 0; i < in; ++i) sum += at(x, (rows - 1) * in + i) * at(w, (out - 1) * in + i);
  const bool good = close(at(y, rows * out - 1), sum, std::sqrt(static_cast<double>(in)));
  print("linear", dtype, threads, str(rows, " x ", in, " -> ", out), bench::race({run}, 51)[0],
        2.0 * static_cast<double>(rows * in * out));
  return good;
}

bool run_conv(DType dtype, int threads, int64_t height, int64_t width, int64_t in, int64_t out) {
  Context ctx({}, threads);
  const Tensor x = bench::random_tensor(dtype, {height, width, in}, 0);
  const Tensor w = bench::random_tensor(dtype, {out, in, 3, 3}, 1);
  Tensor y({}, DType::kF32, {height, width, out});
  const ConvWeight weight(ctx, w, {}, {}, 1, 1, dtype);
  const auto run = [&] { conv2d(ctx, x, weight, y); };
  run();
  double sum = 0;  // channel 0 of pixel (1, 1)
  for (int64_t c = 0; c < in; ++c) {
    for (int64_t ky = 0; ky < 3; ++ky) {
      for (int64_t kx = 0; kx < 3; ++kx)
        sum += at(x, (ky * width + kx) * in + c) * at(w, (c * 3 + ky) * 3 + kx);
    }
  }
  const bool good = close(at(y, (width + 1) * out), sum, 3 * std::sqrt(static_cast<double>(in)));
  print("conv3x3", dtype, threads, str(height, " x ", width, " x ", in, " -> ", out),
        bench::race({run}, 21)[0], 18.0 * static_cast<double>(height * width * in * out));
  return good;
}

// The small kernels of one layer at the embedded model's size.
void run_small(int threads) {
  Context ctx({}, threads);
  constexpr int64_t kTokens = 128;
  constexpr int64_t kDim = 384;
  constexpr int64_t kHeads = 6;
  const Tensor x = bench::random_tensor(DType::kF32, {kTokens, kDim}, 0);
  const Tensor half = bench::random_tensor(DType::kBF16, {kTokens, kDim}, 0);
  const Tensor vector = bench::random_tensor(DType::kF32, {kDim}, 1);
  const Tensor angles = bench::random_tensor(DType::kF32, {kTokens, 32}, 2);
  const View heads = half.view().reshape({kTokens, kHeads, 64});
  const Tensor out({}, DType::kBF16, {kTokens, kDim});
  const Tensor image = bench::random_tensor(DType::kF32, {64, 128, 64}, 3);
  const Tensor channels = bench::random_tensor(DType::kF32, {64}, 4);
  const Tensor pixels({}, DType::kBF16, image.shape());
  CacheOptions options;
  options.memory = "window";
  options.num_heads = kHeads;
  options.head_dim = 64;
  options.tokens_per_frame = kTokens;
  const auto cache = make_cache(ctx, options);

  const auto report = [&](const char* name, size_t bytes, const std::function<void()>& run) {
    const double seconds = bench::race({run}, 201)[0];
    std::printf("%-26s %d | %8.1f us | %6.1f GB/s\n", name, threads, seconds * 1e6,
                static_cast<double>(bytes) / seconds * 1e-9);
  };
  report("layer_norm", x.bytes() + out.bytes(),
         [&] { layer_norm(ctx, x, vector, vector, 1e-6F, true, out); });
  report("rms_norm", x.bytes() + out.bytes(), [&] { rms_norm(ctx, x, vector, 1e-6F, out); });
  report("rms_norm_silu 64x128x64", image.bytes() + pixels.bytes(),
         [&] { rms_norm_silu(ctx, image, channels, 1e-4F, pixels); });
  report("add_gated", 2 * x.bytes() + half.bytes(), [&] { add_gated(ctx, x, half, vector); });
  report("rope", 2 * half.bytes(),
         [&] { rope(ctx, heads, angles, angles, out.view().reshape(heads.shape())); });
  report("set_current", 4 * half.bytes(), [&] { cache->set_current(ctx, heads, heads); });
}

}  // namespace
}  // namespace longtake

int main() {
  using longtake::DType;
  bool good = true;
  for (const int threads : {1, 2}) {
    for (const DType dtype : {DType::kBF16, DType::kF32}) {
      good &= longtake::run_linear(dtype, threads, 128, 384, 384);
      good &= longtake::run_linear(dtype, threads, 128, 384, 1536);
      good &= longtake::run_linear(dtype, threads, 128, 1536, 384);
      good &= longtake::run_linear(dtype, threads, 1, 384, 2304);
      good &= longtake::run_conv(dtype, threads, 16, 32, 192, 192);
      good &= longtake::run_conv(dtype, threads, 32, 64, 128, 128);
      good &= longtake::run_conv(dtype, threads, 64, 128, 64, 64);
    }
    longtake::run_small(threads);
  }
  if (!good) std::printf("WRONG\n");
  return good ? EXIT_SUCCESS : EXIT_FAILURE;
}
