// Comparison: the same scenarios played by several methods, every speed beside its error.
//
// Free running: each method plays the scenario on its own from the same noise. Lock step: the
// latents of the dense run are given to every method, so that all have seen the same history; now
// and then each makes the next frame from the same noise as the dense run made it. Autoregressive
// rollouts are chaotic, so lock step says what the method itself costs, and free running what a
// viewer sees.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "device/context.h"
#include "metrics/attention.h"
#include "models/world/model.h"
#include "pipeline/method.h"
#include "pipeline/scenario.h"
#include "pipeline/stats.h"

namespace longtake {

// Mean of what was measured; NaN where nothing was.
class Mean {
 public:
  void add(double value) {
    sum_ += value;
    ++count_;
  }

  void add(const Mean& other) {
    sum_ += other.sum_;
    count_ += other.count_;
  }

  double value() const;

  int64_t count() const { return count_; }

 private:
  double sum_ = 0;
  int64_t count_ = 0;
};

struct NamedMethod {
  std::string name;  // as it was asked for
  Method method;
};

// Means over scenarios of one generated frame; index: frame of the video.
struct FrameSeries {
  std::vector<Mean> ms;           // of the whole chunk, free running
  std::vector<Mean> cache_bytes;  // holding history, all layers
  std::vector<Mean> merged_keys;
  std::vector<Mean> psnr;           // to the dense run, free running
  std::vector<Mean> lockstep_psnr;  // at the probed frames
};

// Means of one scenario, NaN where nothing was measured; as in MethodResult.
struct ScenarioFigures {
  double lockstep_psnr, early_psnr, psnr, seen_psnr, return_psnr, sharpness;
};

struct MethodResult {
  std::string name, options;
  std::vector<ScenarioFigures> scenarios;
  // Lock step, at the probed frames.
  Mean lockstep_psnr, lockstep_ssim, lockstep_l2;  // decoded frame, dB; of the latent
  std::vector<AttentionScore> layers;              // sums over probes; mean() of each
  std::vector<AttentionScore> prompt_layers;  // the same of cross attention, where it is pruned
  // Free running.
  Mean psnr, ssim, early_psnr;  // to the dense run; early: the first 64 generated frames
  Mean seen_psnr, return_psnr;  // to the truth on seen land; between own frames of one pose
  Mean sharpness;               // against the truth
  // Medians over the last quarter of the frames of all scenarios, ms.
  double chunk_ms = 0, denoise_ms = 0, select_ms = 0, clean_ms = 0, commit_ms = 0, decode_ms = 0;
  double early_ms = 0;              // median over the frames around kEarlyTime
  double speed_up = 0;              // dense time over its own, over dense's last quarter of frames
  Mean density;                     // of the last chunk
  Mean cache_bytes, cache_entries;  // at the end; of the largest head
  Mean cache_growth;                // bytes a frame, over the second half of the frames
  int64_t merged_keys = 0, evicted_keys = 0;
  FrameSeries series;
  std::string video;  // of the first scenario; file name, empty without free running
};

// Time per frame should not grow from there on: where, and how many frames are looked at.
inline constexpr int64_t kEarlyTime = 100, kEarlyTimeWidth = 32;

struct ComparisonOptions {
  bool lockstep = true;
  bool free_running = true;
  int64_t probe_every = 16;   // frames between two probes of lock step
  int64_t score_every = 3;    // of so many probes one looks into attention: that is slow
  int64_t score_stride = 32;  // every so manieth query is looked at
  std::string video_folder;   // empty: no videos
  // Methods that keep the whole history, dense among them, stop after so many frames: theirs get
  // ever dearer. The others are held against dense as far as it went. 0: they do not.
  int64_t full_frames = 0;
  // So many plays side by side, each with a context like the one given. On a GPU one: there plays
  // come one after the other, and the threads of the context judge them meanwhile.
  int jobs = 1;
};

struct ComparisonResult {
  std::vector<MethodResult> methods;
  std::vector<std::string> scenarios;  // names
  int64_t num_frames = 0, num_scenarios = 0, num_primed = 0;
  std::string model, dtype, device;
  int threads = 0, jobs = 1;  // threads of each of the plays side by side
  size_t peak_rss_bytes = 0;
  // Seconds that all took, and the sums over the plays and the judgement that are part of it,
  // whatever of them was side by side.
  double seconds = 0, free_s = 0, lockstep_s = 0, judged_s = 0;
};

using ProgressHook = std::function<void(const std::string& what)>;

// The first method must be dense: it is what the others are held against. `stopped` is asked
// between frames; when it says yes, what is finished by then is returned. With several jobs both
// hooks are called from other threads, progress by one at a time. What is measured, times apart,
// does not depend on the number of jobs.
ComparisonResult compare(Context& ctx, const world::Model& model,
                         const std::vector<Scenario>& scenarios,
                         const std::vector<NamedMethod>& methods, const ComparisonOptions& options,
                         const std::function<bool()>& stopped, const ProgressHook& progress);

}  // namespace longtake
