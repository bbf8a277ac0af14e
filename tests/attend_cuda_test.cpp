// attend on the GPU against plain loops and against its twin on the CPU.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "attention/attend.h"
#include "core_support.h"
#include "device/graph.h"
#include "gpu_support.h"
#include "kv/device_pages.h"
#include "ops/copy.h"

namespace longtake::cuda {
namespace {

constexpr Device kGpu{DeviceKind::kCuda, 0};

struct AttendCudaTest : testing::Test {
  void SetUp() override { skip_without_gpu(); }
};

// An output on the GPU, full of NaN between two guard zones.
class GuardedOut {
 public:
  GuardedOut(DType dtype, const Shape& shape)
      : guarded_(kGpu, DType::kU8,
                 {static_cast<int64_t>(kGuard) * 2 + shape.numel() * size(dtype)}),
        view_(guarded_.data<uint8_t>() + kGuard, dtype, kGpu, shape) {
    check(cudaMemset(guarded_.data<uint8_t>(), 0xff, guarded_.bytes()), "poison");
  }

  View view() const { return view_; }

  Tensor on_cpu() const {
    check(cudaDeviceSynchronize(), "attend");
    const Tensor all = guarded_.to({});
    Tensor out({}, view_.dtype(), view_.shape());
    std::memcpy(out.view().raw(), all.data<uint8_t>() + kGuard, out.bytes());
    for (size_t i = 0; i < kGuard; ++i) {
      EXPECT_EQ(all.data<uint8_t>()[i], 0xff) << "before the output";
      EXPECT_EQ(all.data<uint8_t>()[all.bytes() - 1 - i], 0xff) << "behind the output";
    }
    return out;
  }

 private:
  static constexpr size_t kGuard = 4096;

  static int64_t size(DType dtype) { return static_cast<int64_t>(size_of(dtype)); }

  Tensor guarded_;
  View view_;
};

double at(View x, int64_t i) {
  return x.dtype() == DType::kF32 ? x.data<float>()[i]
                                  : static_cast<double>(float(x.data<bf16>()[i]));
}

// Relative L2 between two tensors on the CPU.
double distance(View got, View want) {
  double error = 0, size = 0;
  for (int64_t i = 0; i < want.numel(); ++i) {
    error += std::pow(at(got, i) - at(want, i), 2);
    size += std::pow(at(want, i), 2);
  }
  return std::sqrt(error / size);
}

// The first `lengths[head]` keys of each head, by plain loops.
Tensor plain(View q, View k, View v, const std::vector<int64_t>& lengths, double scale) {
  const int64_t queries = q.dim(0), heads = q.dim(1), dim = q.dim(2);
  Tensor out({}, DType::kF32, q.shape());
  for (int64_t h = 0; h < heads; ++h) {
    const int64_t keys = lengths[static_cast<size_t>(h)];
    for (int64_t i = 0; i < queries; ++i) {
      std::vector<double> logits(static_cast<size_t>(keys)), sum(static_cast<size_t>(dim));
      double most = -INFINITY, total = 0;
      for (int64_t j = 0; j < keys; ++j) {
        double dot = 0;
        for (int64_t d = 0; d < dim; ++d)
          dot += at(q, (i * heads + h) * dim + d) * at(k, (j * heads + h) * dim + d);
        most = std::max(most, logits[static_cast<size_t>(j)] = dot * scale);
      }
      for (int64_t j = 0; j < keys; ++j) {
        const double term = std::exp(logits[static_cast<size_t>(j)] - most);
        total += term;
        for (int64_t d = 0; d < dim; ++d)
          sum[static_cast<size_t>(d)] += term * at(v, (j * heads + h) * dim + d);
      }
      for (int64_t d = 0; d < dim; ++d)
        out.data<float>()[(i * heads + h) * dim + d] =
            keys > 0 ? static_cast<float>(sum[static_cast<size_t>(d)] / total) : 0.0F;
    }
  }
  return out;
}

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
    const Problem p(s);
    Problem& ctx = const_cast<Problem&>(p);
    const Tensor cpu({}, s.dtype, p.q.shape());
    attend(ctx.cpu, p.q, p.pages.view(), p.scale, cpu);
    const GuardedOut out(s.dtype, p.q.shape());
    attend(ctx.gpu, p.device_q, p.device_pages.view(), p.scale, out.view());
    const Tensor got = out.on_cpu();
    const auto what =
        str(name_of(s.dtype), " ", s.queries, " x ", s.keys, " x ", s.heads, " x ", s.dim);
    const std::vector<int64_t> lengths(static_cast<size_t>(s.heads), s.keys);
    const double most = s.dtype == DType::kF32 ? 2e-6 : 5e-3;
    EXPECT_LE(distance(got, plain(p.q, p.k, p.v, lengths, p.scale)), most) << what;
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
        check(cudaMemcpy(dbegin.data(), begin.data(), 20, cudaMemcpyHostToDevice), "copy");
        check(
            cudaMemcpy(dnumbers.data(), numbers.data(), numbers.size() * 4, cudaMemcpyHostToDevice),
            "copy");
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
          std::vector<int64_t> keys;
          for (const int64_t pages : own) keys.push_back(pages * kPageKeys);
          EXPECT_LE(distance(out.on_cpu(), plain(p.q, p.k, p.v, keys, p.scale)),
                    dtype == DType::kF32 ? 2e-6 : 5e-3)
              << name_of(dtype) << ", " << queries << " queries, round " << round;
        }
        EXPECT_TRUE(graph.is_recorded());
      }
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
