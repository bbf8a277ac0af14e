// Calibration: what AnnSA costs in each layer and at each sampling step of a model, measured on
// maps of the embedded world, and which of them should therefore stay dense; how many groups of
// keys TempCache makes in each layer; and what a change of the noise level's embedding says of that
// of the layers' output (TeaCache).
//
// A dense run is played; at probes its next frame is made again from the same past and noise, with
// AnnSA at one step only, then in one layer only at the steps that will not stay dense. The error
// of the frame's latent is the cost. How sparse each head is says the recall of the keys that AnnSA
// read of it, beside that of an oracle. The frames of the dense run are remembered by a TempCache
// without a budget, too. At the same probes the frame is made in other numbers of steps.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "device/context.h"
#include "models/world/model.h"
#include "pipeline/method.h"
#include "pipeline/scenario.h"

namespace longtake {

inline constexpr const char* kCalibrationFile = "calibration.json";  // beside the model's weights

struct CalibratedHead {
  double recall = 0;  // dense mass on the keys read, mean over steps, probes and queries
  double oracle = 0;  // on as many keys, the best ones of each query
};

// A layer, or a sampling step.
struct CalibratedPart {
  double error = 0;    // relative L2 of the latent, AnnSA in this part alone; rms over probes
  bool dense = false;  // stays dense
};

struct Calibration {
  uint64_t model_fingerprint = 0;
  std::string method;  // what was measured
  int64_t num_probes = 0;
  std::vector<CalibratedPart> steps, layers;
  std::vector<std::vector<CalibratedHead>> heads;  // [layers][heads]
  // What files of earlier versions lack; empty then.
  std::vector<double> tempcache_groups;     // [layers]: of a head, mean at the end of a map
  std::vector<double> teacache_polynomial;  // StepCacheOptions::polynomial

  // JSON; docs/calibration.md has its keys.
  std::string to_json() const;
};

// Which of the steps, or of the layers, with these errors will stay dense, ascending: at most
// dense_count() of them, those that cost most, and only what costs more than twice the median. The
// rest would buy nothing.
std::vector<int64_t> dense_parts(const std::vector<double>& errors);

struct CalibrationOptions {
  Method method;              // its AnnSA and number of steps count, the rest is dense
  int64_t probe_every = 16;   // frames between two probes, behind the given ones
  int64_t query_stride = 16;  // every so manieth query is looked at for the recall
};

// `stopped` is asked between frames; when it says yes, Error (kRuntime) is thrown.
Calibration calibrate(Context& ctx, const world::Model& model,
                      const std::vector<Scenario>& scenarios, const CalibrationOptions& options,
                      const std::function<bool()>& stopped,
                      const std::function<void(const std::string& what)>& progress);

// `what` names the text in errors. Throws Error (kInput) for what is no calibration, or one of
// another model.
Calibration parse_calibration(std::span<const std::byte> text, const std::string& what,
                              const world::TransformerConfig& sizes, uint64_t model_fingerprint);

// The same of a file.
Calibration read_calibration(const std::string& path, const world::TransformerConfig& sizes,
                             uint64_t model_fingerprint);

// What `method` leaves open is taken from the calibration; steps only if it has as many.
// num_steps: of the model.
void apply(const Calibration& calibration, int64_t num_steps, Method& method);

}  // namespace longtake
