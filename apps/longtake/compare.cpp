#include "compare.h"

#include <fmt/format.h>

#include <algorithm>
#include <csignal>
#include <filesystem>
#include <vector>

#include "base/error.h"
#include "device/context.h"
#include "models/world/model.h"
#include "pipeline/comparison.h"
#include "pipeline/method.h"
#include "pipeline/scenario.h"
#include "report.h"
#include "setup.h"
#include "signals.h"

namespace longtake::cli {
namespace {

namespace fs = std::filesystem;

[[noreturn]] void usage(const std::string& message) {
  throw Error(ErrorKind::kUsage, message);
}

std::vector<Scenario> choose_scenarios(const CompareFlags& flags, const world::Config& config) {
  if (!flags.prompts.empty()) {
    if (flags.maps) usage("--maps: expected no --prompts beside it, found both");
    return read_scenarios(flags.prompts, config.transformer, flags.frames);
  }
  const Route route = flags.route == "exact"       ? Route::kExact
                      : flags.route == "off-phase" ? Route::kOffPhase
                                                   : Route::kSteady;
  if (flags.frames <= kPrimedFrames)
    usage(str("--frames: expected more than the ", kPrimedFrames, " given ones, found ",
              flags.frames));
  return map_scenarios(flags.first_map, flags.maps.value_or(kDefaultMaps), route, flags.frames);
}

int threads_of_a_play(const CompareFlags& flags, Device device) {
  if (device.kind != DeviceKind::kCpu && flags.jobs > 1)
    usage(str("--jobs: expected 1 on a GPU, where plays come one after the other, found ",
              flags.jobs));
  const int64_t threads = flags.threads > 0 ? flags.threads : int64_t{Context(device).threads()};
  if (flags.jobs > threads)
    usage(str("--jobs: expected at most as many as there are threads, ", threads, ", found ",
              flags.jobs));
  return static_cast<int>(threads / flags.jobs);
}

}  // namespace

int compare(const CompareFlags& flags) {
  catch_stop_signals();
  const Device device = choose_device(flags.device);
  const DType dtype = choose_dtype(flags.dtype, device);
  const std::string folder = flags.model.empty() ? find_embedded_model() : flags.model;
  const world::Config config = world::read_config(folder);
  if (flags.out.empty()) usage("--out: expected a folder for the report, found none");
  const std::vector<NamedMethod> methods =
      choose_methods(flags.methods, flags.calibration, folder, config, dtype);
  const std::vector<Scenario> scenarios = choose_scenarios(flags, config);
  std::error_code error;
  fs::create_directories(flags.out, error);
  if (error) usage(str("--out: expected a folder to write, found ", flags.out));

  if (flags.full_frames > 0 && flags.prompts.empty() && flags.full_frames <= kPrimedFrames)
    usage(str("--full-frames: expected more than the ", kPrimedFrames, " given ones, found ",
              flags.full_frames));
  // The model is loaded by as many threads as a play has: its figures then do not depend on --jobs.
  Context ctx(device, threads_of_a_play(flags, device));
  const world::Model model = world::load_model(ctx, folder, dtype);
  ComparisonOptions options;
  options.lockstep = flags.mode != "free";
  options.free_running = flags.mode != "lockstep";
  if (!flags.no_videos) options.video_folder = flags.out;
  options.full_frames = flags.full_frames;
  options.jobs = static_cast<int>(flags.jobs);
  options.probe_every = flags.probe_every;
  options.score_every = flags.score_every;
  const auto progress = [&](const std::string& what) {
    if (!flags.quiet) fmt::print(stderr, "{}\n", what);
  };
  const ComparisonResult result = longtake::compare(
      ctx, model, scenarios, methods, options, [] { return stop_signal() != 0; }, progress);
  const fs::path out = flags.out;
  write_file("--out", (out / "report.json").string(), to_json(result));
  write_file("--out", (out / "report.html").string(), to_html(result, flags.out));
  fmt::print("{}", to_table(result));
  if (!flags.quiet) fmt::print(stderr, "report: {}\n", (out / "report.html").string());
  if (stop_signal() != 0)
    throw Error(str(stop_signal() == SIGINT ? "SIGINT" : "SIGTERM", ": expected ", scenarios.size(),
                    " scenarios, found a request to stop; what was finished is in ", flags.out));
  return 0;
}

}  // namespace longtake::cli
