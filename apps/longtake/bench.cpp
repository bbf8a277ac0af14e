#include "bench.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "base/philox.h"
#include "device/graph.h"
#include "device/stage_clock.h"
#include "ops/elementwise.h"
#include "ops/linear.h"
#include "setup.h"

namespace longtake::cli {

double Bench::time_ms(const std::function<void()>& call, int rounds, int repeat) {
  const bool on_cpu = ctx_.device().kind == DeviceKind::kCpu;
  const int calls = on_cpu ? 1 : repeat;
  Graph graph;
  StageClock clock(ctx_, 2);
  std::vector<double> times;
  for (int round = -2; round < rounds; ++round) {
    ctx_.synchronize();
    clock.mark(0);
    for (int i = 0; i < calls; ++i) graph.run(ctx_, call);
    clock.mark(1);
    ctx_.synchronize();
    if (round >= 0) times.push_back(clock.ms(0, 1) / calls);
  }
  std::nth_element(times.begin(), times.begin() + rounds / 2, times.end());
  return times[static_cast<size_t>(rounds / 2)];
}

double Bench::ceiling(DType dtype) {
  double& known = ceilings_[dtype == DType::kBF16];
  if (known > 0) return known;
  const int64_t size = ctx_.device().kind == DeviceKind::kCpu ? 1024 : 8192;
  const Tensor x = random(dtype, {size, size}, 1);
  const Tensor w = Tensor(Device{}, DType::kF32, {size, size});
  fill_normal(1, 2, 0, w.data<float>(), w.numel());
  const LinearWeight weight(ctx_, w, View(), View(), dtype);
  const Tensor out(ctx_.device(), dtype, {size, size});
  const double ms = time_ms([&] { linear(ctx_, x, weight, Activation::kNone, out); }, 9, 3);
  known = 2 * std::pow(static_cast<double>(size), 3) / ms * 1e3;
  fmt::print("ceiling: {} product of {}^3: {:.1f} TFLOP/s\n", name_of(dtype), size, known * 1e-12);
  return known;
}

Tensor Bench::random(DType dtype, const Shape& shape, uint32_t stream) {
  const Tensor host({}, DType::kF32, shape);
  fill_normal(1, stream, 0, host.data<float>(), host.numel());
  Tensor wide = host.to(ctx_.device());
  if (dtype == DType::kF32) return wide;
  Tensor out(ctx_.device(), dtype, shape);
  convert(ctx_, wide, out);
  ctx_.synchronize();
  return out;
}

void Bench::row(const std::string& line, nlohmann::json values) {
  fmt::print("{}\n", line);
  rows_.push_back(std::move(values));
}

void expect_right(const std::string& what, double distance, double bound) {
  if (distance <= bound) return;
  throw Error(str(what, ": expected a relative error of at most ", bound, ", found ", distance));
}

int bench(const BenchFlags& flags) {
  const Device device = choose_device(flags.device);
  static_cast<void>(choose_dtype(flags.dtype, device));
  if (!flags.json.empty()) expect_writable("--json", flags.json);
  if (!flags.latents.empty()) expect_writable("--latents", flags.latents);
  Context ctx(device, static_cast<int>(flags.threads));
  Bench all(ctx, flags);
  const std::pair<const char*, void (*)(Bench&)> subjects[] = {
      {"linear", bench_linear}, {"attention", bench_attention}, {"merge", bench_merge},
      {"index", bench_index},   {"rollout", bench_rollout},     {"wan", bench_wan}};
  for (const auto& [name, run] : subjects) {
    if (flags.subject == name) run(all);
  }
  if (!flags.json.empty()) {
    const nlohmann::json report{{"subject", flags.subject},
                                {"device", device.to_string()},
                                {"threads", ctx.threads()},
                                {"rows", all.rows()}};
    write_file("--json", flags.json, report.dump(2) + "\n");
  }
  return 0;
}

}  // namespace longtake::cli
