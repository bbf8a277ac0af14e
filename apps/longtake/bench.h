// `longtake bench`: how fast the parts are on this machine, each beside its error.
#pragma once

#include <fmt/format.h>

#include <cstdint>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "command_line.h"
#include "device/context.h"
#include "tensor/tensor.h"

namespace longtake::cli {

// Throws Error for everything that goes wrong, a wrong answer included: it is checked before it is
// timed. 0: done.
int bench(const BenchFlags& flags);

// What the subjects share.
class Bench {
 public:
  Bench(Context& ctx, const BenchFlags& flags) : ctx_(ctx), flags_(flags) {}

  Context& ctx() { return ctx_; }

  const BenchFlags& flags() const { return flags_; }

  // Median milliseconds of one call: of `rounds` calls after two that warm up, each waited for. On
  // CUDA a call is replayed as a graph `repeat` times between two looks at the clock, since one
  // alone would show the launch.
  double time_ms(const std::function<void()>& call, int rounds = 15, int repeat = 10);

  // Rate of a large product of matrices in `dtype`, flop/s: what the percentages refer to.
  double ceiling(DType dtype);

  // Standard normals on the context's device.
  Tensor random(DType dtype, const Shape& shape, uint32_t stream);

  void heading(const std::string& line) { fmt::print("{}\n", line); }

  // A line of the table; the same as an object of the JSON.
  void row(const std::string& line, nlohmann::json values);

  const nlohmann::json& rows() const { return rows_; }

 private:
  Context& ctx_;
  const BenchFlags& flags_;
  nlohmann::json rows_ = nlohmann::json::array();
  double ceilings_[2] = {0, 0};  // f32, bf16; 0: not measured yet
};

// Throws Error when the distance is above the bound, or not a number.
void expect_right(const std::string& what, double distance, double bound);

void bench_linear(Bench& bench);
void bench_attention(Bench& bench);
void bench_merge(Bench& bench);
void bench_index(Bench& bench);
void bench_rollout(Bench& bench);
void bench_wan(Bench& bench);

}  // namespace longtake::cli
