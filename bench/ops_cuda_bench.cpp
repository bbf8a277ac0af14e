// The ops on an NVIDIA GPU, at the sizes of the embedded world (128 tokens of 384) and of Wan 1.3B
// at 480 x 832 (three frames of 1560 tokens of 1536). Every op is checked against its CPU twin at
// the world's size, then timed as 20 launches in one graph. Peers of the same run: a copy on the
// device (GB/s that are read and written) and a product of 8192^3 in bf16. An argument: only the
// ops whose names begin so.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "attention/layer_tail.h"
#include "attention/norm_linear_attend.h"
#include "bench.h"
#include "device/graph.h"
#include "ops/conv.h"
#include "ops/copy.h"
#include "ops/elementwise.h"
#include "ops/heads.h"
#include "ops/image.h"
#include "ops/linear.h"
#include "ops/noise.h"
#include "ops/norm.h"
#include "ops/patchify.h"
#include "ops/pixel_shuffle.h"
#include "ops/residual.h"
#include "ops/rope.h"
#include "ops/stream_linear.h"

namespace longtake {
namespace {

constexpr DType kF32 = DType::kF32;
constexpr DType kBF16 = DType::kBF16;
constexpr int kLaunches = 20;

// Random numbers, repeated where there are many: drawing them takes longer than any op.
Tensor repeated_random(DType dtype, const Shape& shape, uint32_t stream) {
  constexpr int64_t kDrawn = int64_t{1} << 18;
  const int64_t count = std::min(shape.numel(), kDrawn);
  const Tensor drawn = bench::random_tensor(dtype, {count}, stream);
  Tensor out({}, dtype, shape);
  const auto size = static_cast<int64_t>(size_of(dtype));
  for (int64_t begin = 0; begin < shape.numel(); begin += count)
    std::memcpy(out.view().raw() + begin * size, drawn.view().raw(),
                static_cast<size_t>(std::min(count, shape.numel() - begin) * size));
  return out;
}

// Tensors that a case reads and writes, and what it does with them.
class Case {
 public:
  explicit Case(Context& ctx) : ctx_(ctx) {}

  View in(DType dtype, const Shape& shape) {
    const auto stream = static_cast<uint32_t>(tensors_.size());
    tensors_.push_back(repeated_random(dtype, shape, stream).to(ctx_.device()));
    return tensors_.back();
  }

  View out(DType dtype, const Shape& shape) {
    tensors_.push_back(Tensor::zeros(ctx_.device(), dtype, shape));
    return result_ = tensors_.back();
  }

  // Weights keep their place while the case lives.
  const LinearWeight& linear_weight(DType dtype, int64_t out, int64_t in) {
    const Tensor weight = repeated_random(dtype, {out, in}, 90);
    const Tensor bias = bench::random_tensor(kF32, {out}, 91);
    linear_.push_back(std::make_unique<LinearWeight>(ctx_, weight, View(), bias, dtype));
    return *linear_.back();
  }

  const ConvWeight& conv_weight(DType dtype, int64_t out, int64_t in, int64_t kernel) {
    const Tensor weight = repeated_random(dtype, {out, in, kernel, kernel}, 90);
    const Tensor bias = bench::random_tensor(kF32, {out}, 91);
    conv_ = std::make_unique<ConvWeight>(ctx_, weight, View(), bias, 1,
                                         static_cast<int>(kernel / 2), dtype);
    return *conv_;
  }

  Context& ctx() { return ctx_; }

  std::function<void()> run;
  size_t bytes = 0;  // that must be read and written
  double flop = 0;

  Tensor result() const {
    Tensor host({}, result_.dtype(), result_.shape());
    copy(ctx_, result_, host);
    return host;
  }

 private:
  Context& ctx_;
  std::vector<Tensor> tensors_;
  std::vector<std::unique_ptr<LinearWeight>> linear_;
  std::unique_ptr<ConvWeight> conv_;
  View result_;
};

struct Named {
  std::string name, shape;
  bool is_checked;
  std::function<void(Case&)> make;
};

double at(View view, int64_t i) {
  return view.dtype() == kF32 ? static_cast<double>(view.data<float>()[i])
                              : static_cast<double>(static_cast<float>(view.data<bf16>()[i]));
}

// Relative L2 distance of the GPU's result from the CPU's.
double error_of(View found, View expected) {
  double difference = 0, norm = 0;
  for (int64_t i = 0; i < found.numel(); ++i) {
    difference += std::pow(at(found, i) - at(expected, i), 2);
    norm += std::pow(at(expected, i), 2);
  }
  return norm > 0 ? std::sqrt(difference / norm) : HUGE_VAL;
}

// Median seconds of one launch.
double seconds_on_gpu(Context& ctx, const std::function<void()>& run) {
  Graph graph;
  const auto many = [&] {
    for (int i = 0; i < kLaunches; ++i) run();
  };
  for (int i = 0; i < 3; ++i) graph.run(ctx, many);
  ctx.synchronize();
  std::vector<double> times;
  for (int i = 0; i < 11; ++i)
    times.push_back(bench::seconds_of([&] {
      graph.run(ctx, many);
      ctx.synchronize();
    }));
  return bench::median(times) / kLaunches;
}

std::vector<Named> cases() {
  std::vector<Named> all;
  const auto add_case = [&](const std::string& name, const std::string& shape, bool checked,
                            const std::function<void(Case&)>& make) {
    all.push_back({name, shape, checked, make});
  };

  struct Size {
    const char* name;
    int64_t tokens, frames, dim, heads, hidden;
  };

  for (const Size& s :
       {Size{"world", 128, 1, 384, 6, 1536}, Size{"wan", 4680, 3, 1536, 12, 8960}}) {
    const bool checked = s.tokens < 1000;
    const std::string shape = str(s.name, " ", s.tokens, " x ", s.dim);
    const Shape flat{s.tokens, s.dim};
    const auto product = [&](const char* what, int64_t in, int64_t out, Activation act, DType to) {
      add_case(what, str(s.name, " ", s.tokens, " x ", in, " -> ", out, " ", name_of(to)), checked,
               [=](Case& c) {
                 const View x = c.in(kBF16, {s.tokens, in});
                 const View y = c.out(to, {s.tokens, out});
                 const LinearWeight& w = c.linear_weight(kBF16, out, in);
                 c.run = [&c, &w, x, y, act] { linear(c.ctx(), x, w, act, y); };
                 c.flop = 2.0 * static_cast<double>(s.tokens * in * out);
               });
    };
    product("linear qkv", s.dim, 3 * s.dim, Activation::kNone, kF32);
    product("linear o", s.dim, s.dim, Activation::kNone, kF32);
    product("linear up gelu", s.dim, s.hidden, Activation::kGeluTanh, kBF16);
    product("linear down", s.hidden, s.dim, Activation::kNone, kF32);
    add_case("layer_norm", shape, checked, [=](Case& c) {
      const View x = c.in(kF32, flat), scale = c.in(kF32, {s.dim}), shift = c.in(kF32, {s.dim});
      const View y = c.out(kBF16, flat);
      c.run = [=, &c] { layer_norm(c.ctx(), x, scale, shift, 1e-6F, true, y); };
      c.bytes = x.bytes() + y.bytes();
    });
    add_case("add_layer_norm", shape, checked, [=](Case& c) {
      const View x = c.in(kF32, flat), y = c.in(kF32, flat), frame = c.in(kF32, {6, s.dim});
      const View h = c.out(kBF16, flat);
      const std::vector<View> frames(static_cast<size_t>(s.frames), frame);
      c.run = [=, &c] {
        add_layer_norm(c.ctx(), x, y, {frames, 2}, kF32, {frames, 1}, {frames, 0}, 1e-6F, true, h);
      };
      c.bytes = 2 * x.bytes() + y.bytes() + h.bytes();
    });
    add_case("add_frames", shape, checked, [=](Case& c) {
      const View y = c.in(kF32, flat), frame = c.in(kF32, {6, s.dim}), x = c.out(kF32, flat);
      const std::vector<View> frames(static_cast<size_t>(s.frames), frame);
      c.run = [=, &c] { add_frames(c.ctx(), x, y, {frames, 2}, kF32); };
      c.bytes = 2 * x.bytes() + y.bytes();
    });
    add_case("split_heads q k v", shape, checked, [=](Case& c) {
      const int64_t head_dim = s.dim / s.heads;
      const Shape heads{s.tokens, s.heads, head_dim};
      const View x = c.in(kF32, {s.tokens, 3 * s.dim}), norm = c.in(kF32, {s.dim});
      const View cos = c.in(kF32, {s.tokens, head_dim / 2});
      const View q = c.out(kBF16, heads), k = c.out(kBF16, heads), v = c.out(kBF16, heads);
      c.run = [=, &c] {
        const HeadPart parts[] = {{norm, true, q}, {norm, true, k}, {View(), false, v}};
        split_heads(c.ctx(), x, parts, cos, cos, 1e-6F);
      };
      c.bytes = x.bytes() + 3 * q.bytes() + 2 * cos.bytes();
    });
    add_case("convert", shape, checked, [=](Case& c) {
      const View x = c.in(kF32, flat), y = c.out(kBF16, flat);
      c.run = [=, &c] { convert(c.ctx(), x, y); };
      c.bytes = x.bytes() + y.bytes();
    });
    add_case("axpby", shape, checked, [=](Case& c) {
      const View x = c.in(kF32, flat), y = c.in(kF32, flat), z = c.out(kF32, flat);
      c.run = [=, &c] { axpby(c.ctx(), 0.5F, x, 2, y, z); };
      c.bytes = 3 * x.bytes();
    });
  }
  // A layer's products with what stands before and behind them.
  constexpr int64_t kRows = 128, kDim = 384, kHidden = 1536;
  const Shape stream{kRows, kDim};
  const auto normed = [&](const char* what, const std::string& shape, int64_t out,
                          const auto& run_op) {
    add_case(what, shape, true, [=](Case& c) {
      const View x = c.in(kF32, stream), frame = c.in(kF32, {6, kDim});
      const LinearWeight& w = c.linear_weight(kBF16, out, kDim);
      const View cos = c.in(kF32, {kRows, 32});
      const View y = c.out(kBF16, {kRows, out});
      c.run = [=, &c, &w] {
        run_op(c.ctx(), x, StreamNorm{{{&frame, 1}, 1}, {{&frame, 1}, 0}, 1e-6F, true}, w, cos, y);
      };
      c.flop = 2.0 * static_cast<double>(kRows * kDim * out);
    });
  };
  normed("norm_linear_heads q k v", "world 128 x 384", 3 * kDim,
         [](Context& ctx, View x, const StreamNorm& norm, const LinearWeight& w, View cos, View y) {
           const auto part = [&](int64_t i) {
             return View(y.raw() + i * kRows * kDim * 2, kBF16, y.device(), {kRows, 6, 64});
           };
           const View by = vector_of(norm.scale, 0, kDim);
           const HeadPart parts[] = {
               {by, true, part(0)}, {by, true, part(1)}, {View(), false, part(2)}};
           norm_linear_heads(ctx, x, norm, w, parts, cos, cos, 1e-6F);
         });
  normed("norm_linear up gelu", "world 128 x 384 -> 1536", kHidden,
         [](Context& ctx, View x, const StreamNorm& norm, const LinearWeight& w, View, View y) {
           norm_linear(ctx, x, norm, w, Activation::kGeluTanh, y);
         });
  for (const int64_t tokens : {9, 200}) {
    add_case("norm_linear_attend", str("world 128 x 384, prompt ", tokens), false, [=](Case& c) {
      const View x = c.in(kF32, stream), frame = c.in(kF32, {6, kDim});
      const View k = c.in(kBF16, {tokens, 6, 64}), v = c.in(kBF16, {tokens, 6, 64});
      const LinearWeight& w = c.linear_weight(kBF16, kDim, kDim);
      const View y = c.out(kBF16, {kRows, 6, 64});
      const auto pages = std::make_shared<KvPages>(c.ctx(), k, v);
      c.run = [=, &c, &w] {
        const StreamNorm norm{{{&frame, 1}, 1}, {{&frame, 1}, 0}, 1e-6F, true};
        norm_linear_attend(c.ctx(), x, norm, w, vector_of(norm.scale, 0, kDim), 1e-6F,
                           pages->view(), 0.125F, y);
      };
    });
  }
  add_case("layer_tail", "world 128 x 384, prompt 9", false, [=](Case& c) {
    const View x = c.in(kF32, stream), frame = c.in(kF32, {6, kDim});
    const View mixed = c.in(kBF16, stream), rotation = c.in(kF32, {kRows, 32});
    const View k = c.in(kBF16, {9, 6, 64}), v = c.in(kBF16, {9, 6, 64});
    const View heads[] = {c.out(kBF16, {kRows, 6, 64}), c.out(kBF16, {kRows, 6, 64}),
                          c.out(kBF16, {kRows, 6, 64})};
    LayerTail tail;
    tail.self_o = tail.q = tail.cross_o = &c.linear_weight(kBF16, kDim, kDim);
    tail.up = &c.linear_weight(kBF16, kHidden, kDim);
    tail.down = &c.linear_weight(kBF16, kDim, kHidden);
    tail.next_qkv = &c.linear_weight(kBF16, 3 * kDim, kDim);
    tail.activation = Activation::kGeluTanh;
    tail.eps = 1e-6F;
    tail.scale = 0.125F;
    const auto pages = std::make_shared<KvPages>(c.ctx(), k, v);
    c.run = [=, &c]() mutable {
      const std::span<const View> frames(&frame, 1);
      const StreamNorm norm{{frames, 1}, {frames, 0}, 1e-6F, true};
      const View by = vector_of({frames, 1}, 0, kDim);
      tail.self_gate = tail.ffn_gate = {frames, 2};
      tail.cross_norm = tail.ffn_norm = tail.next_norm = norm;
      tail.q_norm = by;
      tail.prompt = pages->view();
      tail.next = {{{by, true, heads[0]}, {by, true, heads[1]}, {View(), false, heads[2]}}};
      tail.cos = tail.sin = rotation;
      layer_tail(c.ctx(), mixed, x, tail);
    };
  });
  for (const int64_t in : {kDim, kHidden}) {
    add_case("add_linear", str("world 128 x ", in, " -> 384"), true, [=](Case& c) {
      const View y = c.in(kBF16, {kRows, in}), frame = c.in(kF32, {6, kDim});
      const View base = c.in(kF32, stream), x = c.out(kF32, stream);
      const LinearWeight& w = c.linear_weight(kBF16, kDim, in);
      c.run = [=, &c, &w] { add_linear(c.ctx(), y, w, {{&frame, 1}, 2}, kF32, base, x); };
      c.flop = 2.0 * static_cast<double>(kRows * in * kDim);
    });
  }
  add_case("rope", "wan 4680 x 12 x 128", false, [](Case& c) {
    const View x = c.in(kBF16, {4680, 12, 128}), cos = c.in(kF32, {4680, 64});
    const View y = c.out(kBF16, x.shape());
    c.run = [=, &c] { rope(c.ctx(), x, cos, cos, y); };
    c.bytes = 2 * x.bytes() + 2 * cos.bytes();
  });
  for (const bool wan : {false, true}) {
    const Shape latent = wan ? Shape{16, 60, 104} : Shape{16, 16, 32};
    const std::string shape = str(wan ? "wan " : "world ", latent.to_string());
    add_case("fill_normal", shape, !wan, [=](Case& c) {
      const View clock = c.in(kF32, {2});
      const View z = c.out(kF32, latent);
      c.run = [=, &c] {
        fill_normal(c.ctx(), 5, View(clock.raw(), DType::kI64, clock.device(), {1}), 0, z);
      };
      c.bytes = z.bytes();
    });
    add_case("patchify", shape, !wan, [=](Case& c) {
      const View z = c.in(kF32, latent);
      const View y = c.out(kBF16, {latent[1] * latent[2] / 4, latent[0] * 4});
      c.run = [=, &c] { patchify(c.ctx(), z, 2, y); };
      c.bytes = z.bytes() + y.bytes();
    });
  }

  struct Image {
    const char* name;
    int64_t height, width, channels;
  };

  for (const Image& i : {Image{"world", 64, 128, 64}, Image{"wan", 480, 832, 96}}) {
    const bool checked = i.height < 100;
    const Shape size{i.height, i.width, i.channels};
    const std::string shape = str(i.name, " ", size.to_string());
    add_case("rms_norm_silu", shape, checked, [=](Case& c) {
      const View x = c.in(kF32, size), weight = c.in(kF32, {i.channels}), y = c.out(kBF16, size);
      c.run = [=, &c] { rms_norm_silu(c.ctx(), x, weight, 1e-4F, y); };
      c.bytes = x.bytes() + y.bytes();
    });
    add_case("upsample_nearest", shape, checked, [=](Case& c) {
      const View x = c.in(kBF16, {i.height / 2, i.width / 2, i.channels}), y = c.out(kBF16, size);
      c.run = [=, &c] { upsample_nearest(c.ctx(), x, y); };
      c.bytes = x.bytes() + y.bytes();
    });
    add_case("concat_channels", shape, checked, [=](Case& c) {
      const View a = c.in(kBF16, size), b = c.in(kBF16, size);
      const View y = c.out(kBF16, {i.height, i.width, 2 * i.channels});
      c.run = [=, &c] {
        const View parts[] = {a, b};
        concat_channels(c.ctx(), parts, y);
      };
      c.bytes = 2 * y.bytes();
    });
    add_case("pixel_shuffle", shape, checked, [=](Case& c) {
      const View x = c.in(kF32, size), y = c.out(kF32, {2 * i.height, 2 * i.width, i.channels / 4});
      c.run = [=, &c] { pixel_shuffle(c.ctx(), x, y); };
      c.bytes = 2 * x.bytes();
    });
    add_case("to_rgb", str(i.name, " ", i.height, " x ", i.width), false, [=](Case& c) {
      const View x = c.in(kF32, {i.height, i.width, 3});
      const View y = c.out(DType::kU8, x.shape());
      c.run = [=, &c] { to_rgb(c.ctx(), x, y); };
      c.bytes = x.bytes() + y.bytes();
    });
  }

  struct Conv {
    const char* name;
    int64_t height, width, in, out, kernel;
  };

  for (const Conv& v :
       {Conv{"world", 16, 32, 192, 192, 3}, Conv{"world", 32, 64, 128, 128, 3},
        Conv{"world", 64, 128, 64, 64, 3}, Conv{"wan vae", 60, 104, 1152, 384, 3},
        Conv{"wan vae", 240, 416, 576, 192, 3}, Conv{"wan vae", 480, 832, 288, 96, 3},
        Conv{"wan vae", 480, 832, 288, 3, 3}, Conv{"wan taehv", 480, 832, 64, 64, 3}}) {
    const bool checked = v.height < 60;
    add_case(str("conv ", v.kernel, "x", v.kernel),
             str(v.name, " ", v.height, " x ", v.width, " x ", v.in, " -> ", v.out), checked,
             [=](Case& c) {
               const View x = c.in(kBF16, {v.height, v.width, v.in});
               const View y = c.out(kF32, {v.height, v.width, v.out});
               const ConvWeight& w = c.conv_weight(kBF16, v.out, v.in, v.kernel);
               c.run = [&c, &w, x, y] { conv2d(c.ctx(), x, w, y); };
               c.flop = 2.0 * static_cast<double>(v.height * v.width * v.in * v.out) *
                        static_cast<double>(v.kernel * v.kernel);
             });
  }
  return all;
}

// GB/s read and written by a copy of 512 MiB; flop per second of the large product.
double copy_rate(Context& ctx) {
  const Tensor from(ctx.device(), kF32, {int64_t{1} << 27}), to(ctx.device(), kF32, from.shape());
  const double seconds = seconds_on_gpu(ctx, [&] { copy(ctx, from, to); });
  return 2 * static_cast<double>(from.bytes()) / seconds;
}

double product_rate(Context& ctx) {
  constexpr int64_t kSize = 8192;
  Case c(ctx);
  const View x = c.in(kBF16, {kSize, kSize}), y = c.out(kBF16, {kSize, kSize});
  const LinearWeight& w = c.linear_weight(kBF16, kSize, kSize);
  const double seconds = seconds_on_gpu(ctx, [&] { linear(ctx, x, w, Activation::kNone, y); });
  return 2.0 * kSize * kSize * kSize / seconds;
}

// Only cases whose name begins so.
int run(const std::string& wanted) {
  Context gpu(Device{DeviceKind::kCuda, 0});
  Context cpu;
  const double bandwidth = copy_rate(gpu);
  const double peak = product_rate(gpu);
  std::printf("copy %.0f GB/s, product %.0f TFLOP/s\n", bandwidth * 1e-9, peak * 1e-12);
  bool good = true;
  for (const Named& named : cases()) {
    if (!named.name.starts_with(wanted)) continue;
    Case on_gpu(gpu);
    named.make(on_gpu);
    double error = -1;
    if (named.is_checked && bf16_products_supported()) {
      Case on_cpu(cpu);
      named.make(on_cpu);
      on_cpu.run();
      on_gpu.run();
      error = error_of(on_gpu.result(), on_cpu.result());
      good &= error < 0.01;
    }
    const double seconds = seconds_on_gpu(gpu, on_gpu.run);
    const bool is_product = on_gpu.flop > 0;
    const double rate = (is_product ? on_gpu.flop : static_cast<double>(on_gpu.bytes)) / seconds;
    std::printf("%-18s %-34s | %8.2f us | %7.1f %-7s | %3.0f %% | error %s\n", named.name.c_str(),
                named.shape.c_str(), seconds * 1e6, rate * (is_product ? 1e-12 : 1e-9),
                is_product ? "TFLOP/s" : "GB/s", 100 * rate / (is_product ? peak : bandwidth),
                error < 0 ? "-" : str(error).c_str());
  }
  if (!good) std::printf("WRONG\n");
  return good ? EXIT_SUCCESS : EXIT_FAILURE;
}

}  // namespace
}  // namespace longtake

int main(int argc, char** argv) {
  return longtake::run(argc > 1 ? argv[1] : "");
}
