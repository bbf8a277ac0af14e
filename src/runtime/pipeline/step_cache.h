// StepCache: sampling steps that change little are not computed; what the layers added to the
// stream at the last computed step is added again. The baselines TeaCache (arXiv 2411.19108) and
// the reuse part of FlowCache (arXiv 2602.10825):
//
//   teacache   how much a step changes is read off the noise level's embedding, which is the same
//              for every chunk, through a polynomial that `longtake calibrate` fits
//   flowcache  off the chunk's own tokens as they enter the layers
//
// The relative L1 changes of the steps since the last computed one add up; below the threshold the
// step is skipped. A chunk's first and last steps are always computed, and nothing is carried from
// one chunk to another. FlowCache's warm-up of five steps is left out: few-step models have no
// more.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "device/context.h"
#include "models/world/transformer.h"

namespace longtake {

enum class StepReuse : uint8_t { kNone, kTeaCache, kFlowCache };

struct StepCacheOptions {
  StepReuse reuse = StepReuse::kNone;
  double threshold = 0.3;  // of the summed relative change; 0: every step is computed
  // TeaCache: what a change of the embedding says of that of the layers' output, a polynomial's
  // coefficients from the constant on. Empty: the change as it is; nullopt: what was calibrated, or
  // the change as it is.
  std::optional<std::vector<double>> polynomial;
};

class StepCache final : public world::LayerReuse {
 public:
  // stream: shape [S, dim] of the residual stream.
  StepCache(Context& ctx, const StepCacheOptions& options, const Shape& stream);

  // A chunk of num_steps sampling steps comes next.
  void begin_chunk(int64_t num_steps);

  bool must_run(Context& ctx, View time, View x) override;

  View residual() override { return residual_; }

  // Whether the latest step was computed.
  bool ran() const { return ran_; }

 private:
  StepCacheOptions options_;
  Tensor residual_;              // [S, dim] f32
  Tensor now_;                   // what a change is read off, on the CPU
  std::vector<float> previous_;  // what the last step's change was read off
  double change_ = 0;            // summed since the last computed step
  int64_t step_ = 0, num_steps_ = 0;
  bool ran_ = true;
};

// mean |now - before| / mean |before|.
double relative_change(const float* now, const float* before, int64_t count);

// coefficients[0] + coefficients[1] x + ...; not below 0.
double change_at(std::span<const double> coefficients, double x);

// The coefficients, of at most this degree, that come nearest to y at x by least squares; fewer
// where there are too few different x. x, y [points].
std::vector<double> fit_polynomial(std::span<const double> x, std::span<const double> y,
                                   int64_t degree);

}  // namespace longtake
