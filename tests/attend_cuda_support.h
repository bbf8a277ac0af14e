// What tests of attention on the GPU share: guarded outputs, plain loops, distances.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "core_support.h"
#include "gpu_support.h"

namespace longtake::cuda {

inline constexpr Device kGpu{DeviceKind::kCuda, 0};

// An output on the GPU, full of NaN between two guard zones.
class GuardedOut {
 public:
  GuardedOut(DType dtype, const Shape& shape)
      : guarded_(kGpu, DType::kU8,
                 {static_cast<int64_t>(kGuard) * 2 + shape.numel() * size(dtype)}),
        view_(guarded_.data<uint8_t>() + kGuard, dtype, kGpu, shape) {
    check(cudaMemset(guarded_.data<uint8_t>(), 0xff, guarded_.bytes()), "poison");
    check(cudaDeviceSynchronize(), "poison");
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

inline double at(View x, int64_t i) {
  return x.dtype() == DType::kF32 ? x.data<float>()[i]
                                  : static_cast<double>(float(x.data<bf16>()[i]));
}

// Relative L2 between two tensors on the CPU.
inline double distance(View got, View want) {
  double error = 0, size = 0;
  for (int64_t i = 0; i < want.numel(); ++i) {
    error += std::pow(at(got, i) - at(want, i), 2);
    size += std::pow(at(want, i), 2);
  }
  return std::sqrt(error / size);
}

// Attention of each head to the keys that is_read(head, query, key), by plain loops.
template <typename IsRead>
Tensor plain(View q, View k, View v, double scale, const IsRead& is_read) {
  const int64_t queries = q.dim(0), heads = q.dim(1), dim = q.dim(2), keys = k.dim(0);
  Tensor out({}, DType::kF32, q.shape());
  for (int64_t h = 0; h < heads; ++h) {
    for (int64_t i = 0; i < queries; ++i) {
      std::vector<double> logits(static_cast<size_t>(keys)), sum(static_cast<size_t>(dim));
      double most = -INFINITY, total = 0;
      for (int64_t j = 0; j < keys; ++j) {
        logits[static_cast<size_t>(j)] = -INFINITY;
        if (!is_read(h, i, j)) continue;
        double dot = 0;
        for (int64_t d = 0; d < dim; ++d)
          dot += at(q, (i * heads + h) * dim + d) * at(k, (j * heads + h) * dim + d);
        most = std::max(most, logits[static_cast<size_t>(j)] = dot * scale);
      }
      for (int64_t j = 0; j < keys; ++j) {
        if (logits[static_cast<size_t>(j)] == -INFINITY) continue;
        const double term = std::exp(logits[static_cast<size_t>(j)] - most);
        total += term;
        for (int64_t d = 0; d < dim; ++d)
          sum[static_cast<size_t>(d)] += term * at(v, (j * heads + h) * dim + d);
      }
      for (int64_t d = 0; d < dim; ++d)
        out.data<float>()[(i * heads + h) * dim + d] =
            total > 0 ? static_cast<float>(sum[static_cast<size_t>(d)] / total) : 0.0F;
    }
  }
  return out;
}

}  // namespace longtake::cuda
