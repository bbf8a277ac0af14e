// attend against the plain way (oneDNN: scores = q k^T, softmax, out = p v, with all scores in
// memory) in one process. Checks that both agree before it times them. One line a shape:
//   us | GFLOP/s | % of the measured ceiling | peer us | ratio
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "attention/attend.h"
#include "bench.h"
#include "dnnl.hpp"
#include "kv/page.h"

namespace longtake {
namespace {

using dnnl::memory;

struct Case {
  DType dtype;
  int threads;
  int64_t queries, keys, heads, dim;
};

// The peer: batched over heads by strides, so that it reads the same tensors without copies.
class PlainAttention {
 public:
  PlainAttention(const Case& c, View q, View k, View v, View out)
      : engine_(dnnl::engine::kind::cpu, 0), stream_(engine_) {
    const auto type = c.dtype == DType::kF32 ? memory::data_type::f32 : memory::data_type::bf16;
    const int64_t row = c.heads * c.dim;
    const memory::desc q_desc({c.heads, c.queries, c.dim}, type, memory::dims{c.dim, row, 1});
    const memory::desc k_desc({c.heads, c.dim, c.keys}, type, memory::dims{c.dim, 1, row});
    const memory::desc v_desc({c.heads, c.keys, c.dim}, type, memory::dims{c.dim, row, 1});
    const memory::desc o_desc({c.heads, c.queries, c.dim}, memory::data_type::f32,
                              memory::dims{c.dim, row, 1});
    const memory::desc s_desc({c.heads, c.queries, c.keys}, type, memory::format_tag::abc);
    dnnl::primitive_attr attr;
    attr.set_output_scales(0, {1.0F / std::sqrt(static_cast<float>(c.dim))});
    scores_ = dnnl::matmul({{q_desc, k_desc, s_desc}, attr, engine_});
    softmax_ = dnnl::softmax_forward({{dnnl::prop_kind::forward_inference, s_desc, 2}, engine_});
    mix_ = dnnl::matmul({{s_desc, v_desc, o_desc}, engine_});
    q_ = memory(q_desc, engine_, q.raw());
    k_ = memory(k_desc, engine_, k.raw());
    v_ = memory(v_desc, engine_, v.raw());
    out_ = memory(o_desc, engine_, out.raw());
    s_ = memory(s_desc, engine_);
  }

  void run() {
    scores_.execute(stream_, {{DNNL_ARG_SRC, q_}, {DNNL_ARG_WEIGHTS, k_}, {DNNL_ARG_DST, s_}});
    softmax_.execute(stream_, {{DNNL_ARG_SRC, s_}, {DNNL_ARG_DST, s_}});
    mix_.execute(stream_, {{DNNL_ARG_SRC, s_}, {DNNL_ARG_WEIGHTS, v_}, {DNNL_ARG_DST, out_}});
  }

 private:
  dnnl::engine engine_;
  dnnl::stream stream_;
  dnnl::primitive scores_, softmax_, mix_;
  memory q_, k_, v_, out_, s_;
};

double relative_distance(View a, View b) {
  double difference = 0;
  double norm = 0;
  for (int64_t i = 0; i < a.numel(); ++i) {
    const double x = a.data<float>()[i];
    const double y = b.data<float>()[i];
    difference += (x - y) * (x - y);
    norm += y * y;
  }
  return std::sqrt(difference / norm);
}

// Returns false when the two disagree.
bool run(const Case& c) {
  Context ctx({}, c.threads);
  const Tensor q = bench::random_tensor(c.dtype, {c.queries, c.heads, c.dim}, 0);
  const Tensor k = bench::random_tensor(c.dtype, {c.keys, c.heads, c.dim}, 1);
  const Tensor v = bench::random_tensor(c.dtype, {c.keys, c.heads, c.dim}, 2);
  Tensor ours({}, DType::kF32, q.shape());
  Tensor theirs({}, DType::kF32, q.shape());
  const KvPages pages(ctx, k, v);
  const float scale = 1.0F / std::sqrt(static_cast<float>(c.dim));
  PlainAttention plain(c, q, k, v, theirs);

  attend(ctx, q, pages.view(), scale, ours);
  plain.run();
  const double distance = relative_distance(ours, theirs);
  const bool good = distance < (c.dtype == DType::kF32 ? 1e-5 : 2e-2);
  const auto times =
      bench::race({[&] { attend(ctx, q, pages.view(), scale, ours); }, [&] { plain.run(); }}, 9);
  const double flop = 4.0 * static_cast<double>(c.queries * c.keys * c.heads * c.dim);
  const double rate = flop / times[0];
  std::printf(
      "%-4s %d %5ld x %5ld x %2ld x %3ld | %8.0f us | %6.1f GFLOP/s | %3.0f %% | %8.0f us | "
      "%5.2f%s\n",
      name_of(c.dtype), c.threads, c.queries, c.keys, c.heads, c.dim, times[0] * 1e6, rate * 1e-9,
      100 * rate / bench::dot_ceiling(c.dtype, c.threads), times[1] * 1e6, times[1] / times[0],
      good ? "" : "  WRONG");
  if (!good) std::printf("     relative distance %g\n", distance);
  return good;
}

}  // namespace
}  // namespace longtake

int main() {
  using longtake::DType;
  for (const int threads : {1, 2}) {
    for (const DType dtype : {DType::kF32, DType::kBF16})
      std::printf("ceiling %s, %d threads: %.0f GFLOP/s\n", longtake::name_of(dtype), threads,
                  longtake::bench::dot_ceiling(dtype, threads) * 1e-9);
  }
  std::printf(
      "type threads queries x keys x heads x dim | us | GFLOP/s | of ceiling | plain oneDNN | "
      "ratio\n");
  bool good = true;
  for (const int threads : {1, 2}) {
    for (const DType dtype : {DType::kBF16, DType::kF32}) {
      good &= longtake::run({dtype, threads, 128, 128, 6, 64});
      good &= longtake::run({dtype, threads, 128, 4864, 6, 64});  // window: 37 frames and its own
      good &= longtake::run({dtype, threads, 128, 8192, 6, 64});  // 64 frames
      good &= longtake::run({dtype, threads, 128, 8192, 6, 128});
    }
  }
  return good ? EXIT_SUCCESS : EXIT_FAILURE;
}
