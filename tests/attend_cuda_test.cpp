// attend on the GPU against plain loops and against its twin on the CPU.
#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "attend_cuda_support.h"
#include "attention/attend.h"
#include "attention/layer_tail.h"
#include "attention/norm_linear_attend.h"
#include "device/graph.h"
#include "kv/device_pages.h"
#include "ops/copy.h"

namespace longtake::cuda {
namespace {

struct AttendCudaTest : testing::Test {
  void SetUp() override { skip_without_gpu(); }
};

struct Sizes {
  DType dtype;
  int64_t queries, keys, heads, dim;
};

// The same inputs on both devices.
struct Problem {
  Tensor q, k, v, device_q;
  float scale;
  Context cpu;
  Context gpu{kGpu};
  KvPages pages, device_pages;

  explicit Problem(const Sizes& s)
      : q(test::random_tensor(s.dtype, {s.queries, s.heads, s.dim}, 1)),
        k(test::random_tensor(s.dtype, {s.keys, s.heads, s.dim}, 2)),
        v(test::random_tensor(s.dtype, {s.keys, s.heads, s.dim}, 3)),
        device_q(q.to(kGpu)),
        scale(1 / std::sqrt(static_cast<float>(s.dim))),
        pages(cpu, k, v),
        device_pages(gpu, k.to(kGpu), v.to(kGpu)) {}
};

TEST_F(AttendCudaTest, EqualsPlainLoopsAndTheCpu) {
  std::vector<Sizes> all;
  for (const int64_t queries : {1, 127, 128, 129, 300}) {
    for (const int64_t dim : {64, 128}) all.push_back({DType::kBF16, queries, 700, 3, dim});
    for (const int64_t dim : {16, 48, 64, 128, 256})
      all.push_back({DType::kF32, queries, 300, 2, dim});
  }
  all.push_back({DType::kBF16, 128, 4000, 6, 64});
  all.push_back({DType::kBF16, 130, 1, 5, 128});
  all.push_back({DType::kF32, 5, 129, 6, 64});
  for (const Sizes& s : all) {
    Problem p(s);
    const Tensor cpu({}, s.dtype, p.q.shape());
    attend(p.cpu, p.q, p.pages.view(), p.scale, cpu);
    const GuardedOut out(s.dtype, p.q.shape());
    attend(p.gpu, p.device_q, p.device_pages.view(), p.scale, out.view());
    const Tensor got = out.on_cpu();
    const auto what =
        str(name_of(s.dtype), " ", s.queries, " x ", s.keys, " x ", s.heads, " x ", s.dim);
    const auto all_keys = [](int64_t, int64_t, int64_t) { return true; };
    const double most = s.dtype == DType::kF32 ? 2e-6 : 5e-3;
    EXPECT_LE(distance(got, plain(p.q, p.k, p.v, p.scale, all_keys)), most) << what;
    EXPECT_LE(distance(got, cpu), 2 * most) << what << ", the CPU";
  }
}

// Heads of different lengths, one of them empty; a recorded call follows them as they grow.
TEST_F(AttendCudaTest, AGraphFollowsPagesThatGrow) {
  for (const DType dtype : {DType::kBF16, DType::kF32}) {
    for (const int64_t queries : {128, 300}) {
      Problem p({dtype, queries, 12 * kPageKeys, 4, 64});
      DevicePages ragged = *p.device_pages.view().device;
      // Whole pages only, so that lengths in keys follow.
      const std::vector<std::vector<int64_t>> lengths = {
          {1, 0, 3, 12}, {2, 1, 0, 12}, {12, 5, 1, 2}};
      std::vector<int32_t> begin(5), numbers(4 * 12);
      DeviceArray<int32_t> dbegin(begin.size()), dnumbers(numbers.size());
      const auto set = [&](const std::vector<int64_t>& pages) {
        int32_t at = 0;
        for (int32_t h = 0; h < 4; ++h) {
          begin[static_cast<size_t>(h)] = at;
          for (int32_t i = 0; i < pages[static_cast<size_t>(h)]; ++i)
            numbers[static_cast<size_t>(at++)] = h * 12 + i;
        }
        begin[4] = at;
        copy_to_device(begin.data(), begin.size(), dbegin.data());
        copy_to_device(numbers.data(), numbers.size(), dnumbers.data());
      };
      ragged.heads = {4, dbegin.data(), dnumbers.data()};
      const KvView view{dtype, 64, {}, &ragged};
      for (const int bound : {12, 100'000}) {
        ragged.max_pages_per_head = bound;
        Graph graph;
        const GuardedOut out(dtype, p.q.shape());
        for (int round = 0; round < 4; ++round) {
          const auto& own = lengths[static_cast<size_t>(round % 3)];
          set(own);
          check(cudaMemset(out.view().raw(), 0xff, out.view().bytes()), "poison");
          check(cudaDeviceSynchronize(), "poison");
          graph.run(p.gpu, [&] { attend(p.gpu, p.device_q, view, p.scale, out.view()); });
          const auto is_read = [&](int64_t head, int64_t, int64_t key) {
            return key < own[static_cast<size_t>(head)] * kPageKeys;
          };
          EXPECT_LE(distance(out.on_cpu(), plain(p.q, p.k, p.v, p.scale, is_read)),
                    dtype == DType::kF32 ? 2e-6 : 5e-3)
              << name_of(dtype) << ", " << queries << " queries, round " << round;
        }
        EXPECT_TRUE(graph.is_recorded());
      }
    }
  }
}

// Queries made on the way: those that norm_linear_heads makes.
TEST_F(AttendCudaTest, FromTheStreamToAPrompt) {
  struct Case {
    int64_t rows, in, heads, dim, keys;
    bool normed;
  };

  for (const Case& c : {Case{1, 384, 6, 64, 9, true}, Case{128, 384, 6, 64, 128, true},
                        Case{129, 384, 6, 64, 200, true}, Case{256, 512, 8, 64, 256, true},
                        Case{7, 288, 1, 64, 1, false}, Case{33, 64, 6, 64, 77, true},
                        Case{128, 384, 6, 64, 300, true}, Case{300, 384, 6, 64, 77, true},
                        Case{40, 384, 3, 128, 77, true}}) {
    Context gpu{kGpu};
    const int64_t dim = c.heads * c.dim;
    const Tensor x = test::random_tensor(DType::kF32, {c.rows, c.in}, 1, 3).to(kGpu);
    const Tensor vectors = test::random_tensor(DType::kF32, {2, c.in}, 2).to(kGpu);
    const View matrix = vectors;
    const StreamNorm norm{{{&matrix, 1}, 0}, {{&matrix, 1}, 1}, 1e-6F, false};
    const LinearWeight weight(gpu, test::random_tensor(DType::kBF16, {dim, c.in}, 3), {},
                              test::random_tensor(DType::kF32, {dim}, 4), DType::kBF16);
    const Tensor head_norm = test::random_tensor(DType::kF32, {dim}, 5).to(kGpu);
    const View by = c.normed ? head_norm.view() : View();
    const float scale = c.normed ? 0.125F : 0.005F;
    const Tensor k = test::random_tensor(DType::kBF16, {c.keys, c.heads, c.dim}, 6);
    const Tensor v = test::random_tensor(DType::kBF16, {c.keys, c.heads, c.dim}, 7);
    const KvPages pages(gpu, k.to(kGpu), v.to(kGpu));

    const Tensor q(kGpu, DType::kBF16, {c.rows, c.heads, c.dim});
    const HeadPart part{by, false, q};
    longtake::norm_linear_heads(gpu, x, norm, weight, {&part, 1}, View(), View(), 1e-6F);
    const GuardedOut out(DType::kBF16, q.shape());
    longtake::norm_linear_attend(gpu, x, norm, weight, by, 1e-6F, pages.view(), scale, out.view());
    const auto all_keys = [](int64_t, int64_t, int64_t) { return true; };
    EXPECT_LE(distance(out.on_cpu(), plain(test::on_host(q), k, v, scale, all_keys)), 5e-3)
        << c.rows << " x " << c.in << " x " << c.heads << " x " << c.dim << ", " << c.keys;
  }
}

// In one launch and, at sizes that do not suit, by the ops that it is composed of.
TEST_F(AttendCudaTest, TheTailOfALayer) {
  struct Case {
    int64_t rows, dim, hidden, keys;
    bool normed, has_next, has_queries;
  };

  for (const Case& c :
       {Case{128, 384, 1536, 9, true, true, true}, Case{128, 384, 1536, 128, true, true, false},
        Case{16, 384, 1536, 1, true, true, true}, Case{1, 384, 1536, 40, false, true, true},
        Case{37, 384, 1536, 77, true, true, true}, Case{256, 384, 1536, 100, true, false, true},
        Case{129, 384, 1536, 64, false, false, true}, Case{128, 384, 1536, 200, true, true, true},
        Case{300, 384, 1536, 20, true, true, true}, Case{33, 128, 512, 20, true, true, true}}) {
    Context gpu{kGpu}, cpu;
    const int64_t heads = c.dim / 64;

    // One side, of which `vectors` and weights are the same on both.
    struct Side {
      Tensor x, mixed, vectors, cos, sin, q, k, v;
      std::vector<LinearWeight> weights;
      KvPages pages;
    };

    const auto make = [&](Context& ctx) {
      const Device on = ctx.device();
      Side side;
      side.x = test::random_tensor(DType::kF32, {c.rows, c.dim}, 1, 3).to(on);
      side.mixed = test::random_tensor(DType::kBF16, {c.rows, c.dim}, 2).to(on);
      side.vectors = test::random_tensor(DType::kF32, {8, c.dim}, 3).to(on);
      side.cos = test::random_tensor(DType::kF32, {c.rows, 32}, 4).to(on);
      side.sin = test::random_tensor(DType::kF32, {c.rows, 32}, 5).to(on);
      const Tensor k = test::random_tensor(DType::kBF16, {c.keys, heads, 64}, 6).to(on);
      const Tensor v = test::random_tensor(DType::kBF16, {c.keys, heads, 64}, 7).to(on);
      side.pages = KvPages(ctx, k, v);
      uint64_t seed = 10;
      for (const auto& [out, in] : {std::pair{c.dim, c.dim},
                                    {c.dim, c.dim},
                                    {c.dim, c.dim},
                                    {c.hidden, c.dim},
                                    {c.dim, c.hidden},
                                    {3 * c.dim, c.dim}}) {
        const auto scale = 1 / std::sqrt(static_cast<float>(in));
        const Tensor weight = test::random_tensor(DType::kBF16, {out, in}, ++seed, scale);
        side.weights.emplace_back(ctx, weight, View(),
                                  test::random_tensor(DType::kF32, {out}, ++seed), DType::kBF16);
      }
      return side;
    };
    Side on_gpu = make(gpu), on_cpu = make(cpu);
    const auto run = [&](Context& ctx, Side& side, View q, View k, View v, bool in_two) {
      const View vectors = side.vectors;
      const std::span<const View> frames(&vectors, 1);
      const auto vector = [&](int64_t i) { return vectors.rows(i, i + 1).reshape({c.dim}); };
      LayerTail tail;
      tail.self_o = &side.weights[0];
      tail.self_gate = {frames, 0};
      tail.cross_norm = {{frames, 1}, {frames, 2}, 1e-6F, false};
      tail.q = &side.weights[1];
      tail.q_norm = c.normed ? vector(3) : View();
      tail.prompt = side.pages.view();
      tail.scale = c.normed ? 0.125F : 0.02F;
      tail.cross_o = &side.weights[2];
      tail.ffn_norm = {{frames, 4}, {frames, 5}, 1e-6F, true};
      tail.up = &side.weights[3];
      tail.activation = Activation::kGeluTanh;
      tail.down = &side.weights[4];
      tail.ffn_gate = {frames, 6};
      tail.eps = 1e-6F;
      if (c.has_next) {
        tail.next_qkv = &side.weights[5];
        tail.next_norm = {{frames, 2}, {frames, 1}, 1e-6F, true};
        tail.next = {{{vector(3), true, q}, {vector(7), true, k}, {View(), false, v}}};
        tail.cos = side.cos;
        tail.sin = side.sin;
      }
      if (in_two) {
        const Tensor queries(ctx.device(), DType::kBF16, {c.rows, heads, 64});
        longtake::layer_queries(ctx, side.mixed, side.x, tail, queries);
        tail.self_o = nullptr;
        longtake::layer_tail(ctx, View(), side.x, tail);
        return queries.to({});
      }
      longtake::layer_tail(ctx, side.mixed, side.x, tail);
      return Tensor();
    };
    const Shape shape{c.rows, heads, 64};
    const Tensor want_q({}, DType::kBF16, shape), want_k({}, DType::kBF16, shape),
        want_v({}, DType::kBF16, shape);
    const Tensor want_queries =
        run(cpu, on_cpu, c.has_queries ? want_q.view() : View(), want_k, want_v, true);
    const std::string what = str(c.rows, " x ", c.dim, " x ", c.hidden, ", prompt of ", c.keys);
    // Again on what it has made: launches that follow one another.
    const Tensor first = on_gpu.x.to({});
    const GuardedOut q(DType::kBF16, shape), k(DType::kBF16, shape), v(DType::kBF16, shape);
    const GuardedOut x(DType::kF32, {c.rows, c.dim});
    for (int round = 0; round < 4; ++round) {
      copy(gpu, first, on_gpu.x);
      const bool in_two = round % 2 == 1;
      const Tensor queries =
          run(gpu, on_gpu, c.has_queries ? q.view() : View(), k.view(), v.view(), in_two);
      if (in_two) {
        EXPECT_LE(distance(queries, want_queries), 1e-2) << what << ", in two";
      }
      EXPECT_LE(distance(test::on_host(on_gpu.x), on_cpu.x), 4e-3) << what;
      if (!c.has_next) continue;
      if (c.has_queries) {
        EXPECT_LE(distance(q.on_cpu(), want_q), 1e-2) << what;
      }
      EXPECT_LE(distance(k.on_cpu(), want_k), 1e-2) << what;
      EXPECT_LE(distance(v.on_cpu(), want_v), 1e-2) << what;
    }
  }
}

TEST_F(AttendCudaTest, WhatNoKernelReadsIsRefused) {
  Context gpu{kGpu};
  const auto tokens = [](DType dtype, int64_t dim) {
    return test::random_tensor(dtype, {3, 1, dim}, 1).to(kGpu);
  };
  const Tensor narrow = tokens(DType::kBF16, 32), wide = tokens(DType::kF32, 272);
  EXPECT_THROW(KvPages(gpu, narrow, narrow), Error);
  EXPECT_THROW(KvPages(gpu, wide, wide), Error);
  const Tensor q = tokens(DType::kBF16, 64);
  const KvPages pages(gpu, q, q);
  const Tensor out(kGpu, DType::kF32, q.shape());
  EXPECT_THROW(attend(gpu, q, pages.view(), 1, out), Error);
}

}  // namespace
}  // namespace longtake::cuda
