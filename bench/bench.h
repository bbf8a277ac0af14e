// What the benchmarks share: medians of alternating runs, the machine's measured ceiling of dot
// products, and random inputs.
#pragma once

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <functional>
#include <vector>

#include "base/dtype.h"
#include "base/philox.h"
#include "device/context.h"
#include "tensor/tensor.h"

namespace longtake::bench {

inline double seconds_of(const std::function<void()>& run) {
  const auto start = std::chrono::steady_clock::now();
  run();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

inline double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + static_cast<int64_t>(values.size() / 2),
                   values.end());
  return values[values.size() / 2];
}

// Median seconds of each function; they take turns, so that a slow spell of the machine hits all.
inline std::vector<double> race(const std::vector<std::function<void()>>& runs, int rounds) {
  std::vector<std::vector<double>> times(runs.size());
  for (int round = -1; round < rounds; ++round) {
    for (size_t i = 0; i < runs.size(); ++i) {
      const double seconds = seconds_of(runs[i]);
      if (round >= 0) times[i].push_back(seconds);  // the first round warms up
    }
  }
  std::vector<double> out;
  for (const auto& list : times) out.push_back(median(list));
  return out;
}

// Standard normals in the wanted dtype.
inline Tensor random_tensor(DType dtype, const Shape& shape, uint32_t stream) {
  Tensor wide({}, DType::kF32, shape);
  fill_normal(7, stream, 0, wide.data<float>(), wide.numel());
  if (dtype == DType::kF32) return wide;
  Tensor out({}, dtype, shape);
  for (int64_t i = 0; i < wide.numel(); ++i) out.data<bf16>()[i] = bf16(wide.data<float>()[i]);
  return out;
}

// Twelve independent chains of the widest dot product, nothing else: flop per second of one thread.
__attribute__((target("avx512f"), noinline)) inline double peak_avx512(bool bf16_pairs) {
  constexpr int kRounds = 1000000;
  const __m512 a = _mm512_setzero_ps();
  __m512 s0 = a, s1 = a, s2 = a, s3 = a, s4 = a, s5 = a;
  __m512 s6 = a, s7 = a, s8 = a, s9 = a, s10 = a, s11 = a;
// One instruction on each accumulator.
#define LONGTAKE_CHAINS(op)                                                                      \
  asm volatile(op " %12, %12, %0\n" op " %12, %12, %1\n" op " %12, %12, %2\n" op                 \
                  " %12, %12, %3\n" op " %12, %12, %4\n" op " %12, %12, %5\n" op                 \
                  " %12, %12, %6\n" op " %12, %12, %7\n" op " %12, %12, %8\n" op                 \
                  " %12, %12, %9\n" op " %12, %12, %10\n" op " %12, %12, %11\n"                  \
               : "+v"(s0), "+v"(s1), "+v"(s2), "+v"(s3), "+v"(s4), "+v"(s5), "+v"(s6), "+v"(s7), \
                 "+v"(s8), "+v"(s9), "+v"(s10), "+v"(s11)                                        \
               : "v"(a))
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < kRounds; ++i) {
    if (bf16_pairs)
      LONGTAKE_CHAINS("vdpbf16ps");
    else
      LONGTAKE_CHAINS("vfmadd231ps");
  }
#undef LONGTAKE_CHAINS
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return (bf16_pairs ? 64.0 : 32.0) * 12 * kRounds / seconds;
}

// Flop per second of `threads` threads; 0 where this machine lacks AVX-512.
inline double dot_ceiling(DType dtype, int threads) {
  const bool pairs = dtype == DType::kBF16 && __builtin_cpu_supports("avx512bf16");
  if (!__builtin_cpu_supports("avx512f")) return 0;
  double best = 0;
  for (int repeat = 0; repeat < 5; ++repeat) {
    double total = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total)
    total += peak_avx512(pairs);
    best = std::max(best, total);
  }
  return best;
}

}  // namespace longtake::bench
