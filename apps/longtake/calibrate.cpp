#include "calibrate.h"

#include <fmt/format.h>

#include <filesystem>
#include <string>
#include <vector>

#include "base/error.h"
#include "device/context.h"
#include "models/world/model.h"
#include "pipeline/calibration.h"
#include "pipeline/scenario.h"
#include "setup.h"
#include "signals.h"

namespace longtake::cli {

void calibrate(const CalibrateFlags& flags) {
  catch_stop_signals();
  const Device device = choose_device(flags.device);
  const DType dtype = choose_dtype(flags.dtype, device);
  const std::string folder = flags.model.empty() ? find_embedded_model() : flags.model;
  const std::string path =
      flags.out.empty() ? (std::filesystem::path(folder) / kCalibrationFile).string() : flags.out;
  CalibrationOptions options;
  options.probe_every = flags.probe_every;
  try {
    options.method = parse_method(flags.method);
  } catch (const Error& error) {
    throw Error(error.kind(), str("--method: ", error.what()));
  }
  if (!options.method.sparse_self)
    throw Error(ErrorKind::kUsage, str("--method: expected one with annsa, found ", flags.method));
  if (flags.frames <= kPrimedFrames + flags.probe_every)
    throw Error(ErrorKind::kUsage,
                str("--frames: expected more than the ", kPrimedFrames, " given ones and the ",
                    flags.probe_every, " up to the first probe, found ", flags.frames));
  if (device.kind != DeviceKind::kCpu)
    throw Error(ErrorKind::kUsage,
                str("--device: expected cpu, where attention can be looked into, found ",
                    device.to_string()));
  expect_writable("--out", path);

  Context ctx(device, static_cast<int>(flags.threads));
  const world::Model model = world::load_model(ctx, folder, dtype);
  const Calibration calibration = longtake::calibrate(
      ctx, model, map_scenarios(flags.first_map, flags.maps, Route::kExact, flags.frames), options,
      [] { return stop_signal() != 0; },
      [&](const std::string& what) {
        if (!flags.quiet) fmt::print(stderr, "{}\n", what);
      });
  write_file("--out", path, calibration.to_json());
  fmt::print("{}", to_text(calibration));
  if (!flags.quiet) fmt::print(stderr, "calibration: {}\n", path);
}

}  // namespace longtake::cli
