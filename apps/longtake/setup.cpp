#include "setup.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <filesystem>
#include <fstream>
#include <string_view>
#include <system_error>
#include <vector>

#include "base/error.h"
#include "build_config.h"
#include "io/json.h"
#include "io/mapped_file.h"
#include "media/frame_reader.h"
#include "models/wan/decoder.h"
#include "models/world/model.h"
#include "ops/linear.h"

namespace longtake::cli {

namespace fs = std::filesystem;

std::string read_small_file(const std::string& path, size_t max_bytes) {
  const MappedFile file(path);
  if (file.bytes().size() > max_bytes)
    throw Error(ErrorKind::kInput,
                str(path, ": expected at most ", max_bytes, " bytes, found ", file.bytes().size()));
  return {reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size()};
}

std::string find_embedded_model() {
  std::error_code error;
  const fs::path binary = fs::read_symlink("/proc/self/exe", error);
  std::vector<fs::path> places = {binary.parent_path() / "../share/longtake/models/world"};
  for (fs::path folder = binary.parent_path(); folder.has_relative_path();
       folder = folder.parent_path())
    places.push_back(folder / "models/world");
  places.emplace_back("models/world");
  for (const fs::path& place : places) {
    if (fs::exists(place / world::kConfigFile, error)) return place.lexically_normal().string();
  }
  throw Error(
      ErrorKind::kUsage,
      "--model: expected a model folder (the embedded one is not beside this binary), found none");
}

Device choose_device(const std::string& flag) {
  if (flag == "cpu") return {};
  constexpr std::string_view kCuda = "cuda";
  const std::string_view text = flag;
  Device device{DeviceKind::kCuda, 0};
  bool valid = text == kCuda;
  if (!valid && text.starts_with("cuda:")) {
    const std::string_view index = text.substr(kCuda.size() + 1);
    const auto [end, error] =
        std::from_chars(index.data(), index.data() + index.size(), device.index);
    valid = error == std::errc() && end == index.data() + index.size() && device.index >= 0;
  }
  if (!valid)
    throw Error(ErrorKind::kUsage,
                str("--device: expected cpu, cuda or cuda:N, found \"", printable(flag), '"'));
  if (!kHasCuda)
    throw Error(ErrorKind::kUsage,
                str("--device: expected cpu (this build has no CUDA), found ", flag));
  return device;
}

DType choose_dtype(const std::string& flag, Device device) {
  const bool has_bf16 = device.kind == DeviceKind::kCuda || bf16_products_supported();
  if (flag == "f32") return DType::kF32;
  if (flag == "bf16" && !has_bf16)
    throw Error(ErrorKind::kUsage,
                "--dtype: expected f32 (this CPU has no bf16 products), found bf16");
  return has_bf16 ? DType::kBF16 : DType::kF32;
}

void expect_writable(const char* flag, const std::string& path) {
  const fs::path folder = fs::path(path).parent_path();
  const std::string parent = folder.empty() ? "." : folder.string();
  std::error_code error;
  if (fs::is_directory(path, error) || ::access(parent.c_str(), W_OK) != 0 ||
      (fs::exists(path, error) && ::access(path.c_str(), W_OK) != 0))
    throw Error(ErrorKind::kUsage, str(flag, ": expected a writable file, found ", path));
}

void expect_writable_place(const char* flag, const std::string& path) {
  std::error_code error;
  fs::path place = fs::absolute(path);
  while (!fs::exists(place, error) && place.has_relative_path()) place = place.parent_path();
  if (::access(place.c_str(), W_OK) != 0)
    throw Error(ErrorKind::kUsage, str(flag, ": expected a writable place, found ", path));
}

std::string choose_prompt(const GenerateFlags& flags) {
  constexpr size_t kMaxPromptBytes = 1 << 20;
  return flags.prompt_file.empty() ? flags.prompt
                                   : read_small_file(flags.prompt_file, kMaxPromptBytes);
}

std::vector<PromptSwitch> parse_prompt_switches(const std::vector<std::string>& flags,
                                                int64_t num_frames) {
  std::vector<PromptSwitch> out;
  for (const std::string& flag : flags) {
    PromptSwitch next;
    const char* end = flag.data() + flag.size();
    const auto [after, bad] = std::from_chars(flag.data(), end, next.frame);
    if (bad == std::errc() && after != end && *after == ':') next.text.assign(after + 1, end);
    if (next.text.find_first_not_of(" \t\r\n") == std::string::npos || next.frame < 1 ||
        next.frame >= num_frames)
      throw Error(ErrorKind::kUsage, str("--prompt-at: expected FRAME:TEXT with a frame in 1..",
                                         num_frames - 1, ", found \"", printable(flag), '"'));
    out.push_back(next);
  }
  const auto earlier = [](const auto& a, const auto& b) { return a.frame < b.frame; };
  std::stable_sort(out.begin(), out.end(), earlier);
  const auto twice = std::adjacent_find(
      out.begin(), out.end(), [](const auto& a, const auto& b) { return a.frame == b.frame; });
  if (twice != out.end())
    throw Error(ErrorKind::kUsage,
                str("--prompt-at: expected one prompt for frame ", twice->frame, ", found two"));
  return out;
}

void choose_size(const std::string& flag, WanOptions& options) {
  constexpr int64_t kDefaultWidth = 832, kDefaultHeight = 480;
  constexpr int64_t kPixelStep = wan::kLatentPixels * wan::kPatch;
  int64_t width = options.width > 0 ? options.width * wan::kLatentPixels : kDefaultWidth;
  int64_t height = options.height > 0 ? options.height * wan::kLatentPixels : kDefaultHeight;
  const std::string usual = str(width, 'x', height);
  if (!flag.empty()) {
    char end = 0;
    const bool is_size = std::sscanf(flag.c_str(), "%5ldx%5ld%c", &width, &height, &end) == 2;
    if (!is_size || width < kPixelStep || height < kPixelStep || width > kMaxFrameSide ||
        height > kMaxFrameSide || width % kPixelStep != 0 || height % kPixelStep != 0)
      throw Error(ErrorKind::kUsage,
                  str("--size: expected WxH in multiples of ", kPixelStep, " up to ", kMaxFrameSide,
                      ", such as ", usual, ", found \"", printable(flag), '"'));
  }
  options.width = width / wan::kLatentPixels;
  options.height = height / wan::kLatentPixels;
}

void write_file(const char* flag, const std::string& path, const std::string& text) {
  std::ofstream out(path, std::ios::trunc | std::ios::binary);
  out << text;
  out.close();
  if (!out) throw Error(str(flag, ": expected to write ", path, ", found a failing file"));
}

void apply_calibration(const std::string& flag, const std::string& model_folder,
                       const world::Config& config, Method& method) {
  const bool sparse = method.sparse_self || method.sparse_prompt;
  const bool wants_steps = sparse && !method.dense_steps;
  const bool wants_layers = method.sparse_self && !method.dense_layers;
  const bool wants_shares = method.memory.memory == "tempcache" && !method.layer_shares;
  const bool wants_polynomial =
      method.step_cache.reuse == StepReuse::kTeaCache && !method.step_cache.polynomial;
  if (!wants_steps && !wants_layers && !wants_shares && !wants_polynomial) return;
  std::string path = flag;
  if (flag.empty()) {
    path = (fs::path(model_folder) / kCalibrationFile).string();
    std::error_code error;
    if (!fs::exists(path, error)) return;
  }
  longtake::apply(
      read_calibration(path, config.transformer, world::model_fingerprint(model_folder)),
      config.sampler.num_steps, method);
}

std::vector<std::string> method_names_in(const std::string& list) {
  std::vector<std::string> names;
  for (size_t begin = 0; begin <= list.size();) {
    const size_t end = std::min(list.find(',', begin), list.size());
    names.push_back(list.substr(begin, end - begin));
    begin = end + 1;
  }
  return names;
}

std::vector<NamedMethod> choose_methods(const std::string& list, const std::string& calibration,
                                        const std::string& model_folder,
                                        const world::Config& config, DType dtype) {
  std::vector<NamedMethod> methods = {{"dense", parse_method("dense")}};
  for (const std::string& name : method_names_in(list)) {
    const bool known = std::any_of(methods.begin(), methods.end(),
                                   [&](const NamedMethod& other) { return other.name == name; });
    if (known) continue;
    try {
      methods.push_back({name, parse_method(name)});
    } catch (const Error& error) {
      throw Error(ErrorKind::kUsage, str("--methods: \"", name, "\": ", error.what()));
    }
  }
  for (NamedMethod& named : methods) {
    apply_calibration(calibration, model_folder, config, named.method);
    expect_playable(named.method, config, dtype);
  }
  return methods;
}

std::string to_text(const Calibration& calibration) {
  std::string text = fmt::format(
      "calibrated with {} at {} probes; error: relative L2 of the latent with AnnSA there alone\n",
      calibration.method, calibration.num_probes);
  const auto state = [](const CalibratedPart& part) { return part.dense ? "dense " : "sparse"; };
  for (size_t i = 0; i < calibration.steps.size(); ++i) {
    const CalibratedPart& step = calibration.steps[i];
    text += fmt::format("  step {:>3} {} error {:.4f}\n", i, state(step), step.error);
  }
  for (size_t i = 0; i < calibration.layers.size(); ++i) {
    const CalibratedPart& layer = calibration.layers[i];
    text += fmt::format("  layer {:>2} {} error {:.4f}, heads' recall % (oracle)", i, state(layer),
                        layer.error);
    for (const CalibratedHead& head : calibration.heads[i])
      text += fmt::format(" {:.0f} ({:.0f})", 100 * head.recall, 100 * head.oracle);
    text += '\n';
  }
  const auto add_list = [&](const char* what, const std::vector<double>& numbers) {
    if (numbers.empty()) return;
    text += fmt::format("  {}: {:.4g}\n", what, fmt::join(numbers, " "));
  };
  add_list("tempcache: groups of a head, layer by layer", calibration.tempcache_groups);
  add_list("teacache: polynomial, from the constant on", calibration.teacache_polynomial);
  return text;
}

}  // namespace longtake::cli
