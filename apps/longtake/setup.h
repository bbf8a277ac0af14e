// What every command that plays needs first: a model, a dtype, a device, small files.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "base/dtype.h"
#include "base/error.h"
#include "command_line.h"
#include "device/device.h"
#include "models/world/config.h"
#include "pipeline/calibration.h"
#include "pipeline/comparison.h"
#include "pipeline/method.h"
#include "pipeline/wan_rollout.h"

namespace longtake::cli {

// models/world beside an installed binary, or in a folder above one that was built in its tree.
// Throws Error (kUsage) when there is none.
std::string find_embedded_model();

// "cpu", "cuda" or "cuda:N". Throws Error (kUsage) for anything else, and for a GPU in a build
// without CUDA; whether the GPU is there is seen when a Context is made.
Device choose_device(const std::string& flag);

// "": bf16 where the device multiplies it. Throws Error (kUsage).
DType choose_dtype(const std::string& flag, Device device);

// The bytes of a file; throws Error (kInput) when there are more than max_bytes.
std::string read_small_file(const std::string& path, size_t max_bytes);

// A file to be written at the end is looked at at the start: nobody waits an hour for "permission
// denied". Both throw Error in the flag's name.
void expect_writable(const char* flag, const std::string& path);
void write_file(const char* flag, const std::string& path, const std::string& text);

// A place for a video or a folder of pictures: the nearest folder above it that exists is writable.
void expect_writable_place(const char* flag, const std::string& path);

// The text of --prompt-file, else of --prompt.
std::string choose_prompt(const GenerateFlags& flags);

// A prompt that takes over at a frame.
struct PromptSwitch {
  int64_t frame = 0;
  std::string text;
};

// "FRAME:TEXT" each, by frame. Throws Error (kUsage), also for a frame outside 1..num_frames - 1.
std::vector<PromptSwitch> parse_prompt_switches(const std::vector<std::string>& flags,
                                                int64_t num_frames);

// "WxH" in pixels -> the sides of a latent frame; "": those that the options have already, else
// what most models of the Wan family were trained at. Throws Error (kUsage).
void choose_size(const std::string& flag, WanOptions& options);

// What `make` returns; errors about an option of a method name its flag, where they do not yet.
template <typename Make>
auto named_as_flag(const Make& make) {
  try {
    return make();
  } catch (const Error& error) {
    const std::string what = error.what();
    throw Error(error.kind(), (what.starts_with("--") ? "" : "--") + what);
  }
}

// What the method leaves open is taken from the calibration in the file `flag`, or, if that is
// empty, from the one beside the model if there is one. A method without AnnSA and AnnCA, or one
// that leaves nothing open, needs none. Throws Error (kInput).
void apply_calibration(const std::string& flag, const std::string& model_folder,
                       const world::Config& config, Method& method);

// The names in a list "a,b:key=value,c", as they stand there.
std::vector<std::string> method_names_in(const std::string& list);

// The methods of such a list, calibrated and playable. Dense comes first, asked for or
// not: it is what the others are held against. Throws Error (kUsage).
std::vector<NamedMethod> choose_methods(const std::string& list, const std::string& calibration,
                                        const std::string& model_folder,
                                        const world::Config& config, DType dtype);

// A calibration as a person reads it.
std::string to_text(const Calibration& calibration);

}  // namespace longtake::cli
