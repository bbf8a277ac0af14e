// Flags as a person typed them. Checked one by one here; together in the commands.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "pipeline/method.h"

namespace longtake::cli {

struct GenerateFlags {
  std::string model;                         // empty: the embedded model
  std::string base_model, rollout, decoder;  // of the Wan family; empty: by the files
  std::string decoder_tile;                  // of the Wan family, pixels; empty: whole pictures
  std::string prompt, prompt_file;
  std::vector<std::string> prompt_at;  // "FRAME:TEXT"
  std::string save_prompt, load_prompt;
  std::string actions, actions_file;
  std::string init;
  std::optional<int64_t> frames;
  std::optional<double> seconds;
  std::string size;
  std::optional<uint64_t> seed;
  std::string out;
  std::string preset;
  MethodSettings method;    // on top of the preset
  std::string calibration;  // empty: the one beside the model, if there is one
  std::string device = "cpu";
  int64_t threads = 0;
  std::string dtype;
  std::string save_state, load_state, stats;
  bool quiet = false;
};

inline constexpr int64_t kDefaultMaps = 2;

struct CompareFlags {
  std::string model;  // empty: the embedded model
  std::string prompts;
  std::optional<int64_t> maps;
  uint64_t first_map = 600'000;  // training and evaluation use others
  std::string route = "exact";
  int64_t frames = 160;
  std::string methods = "dense,window:14,tempcache-lsh,tempcache-quant";
  std::string calibration;
  std::string mode = "both";
  int64_t probe_every = 16;
  int64_t score_every = 3;
  int64_t full_frames = 0;
  int64_t jobs = 1;
  bool no_videos = false;
  std::string out;
  std::string device = "cpu";
  int64_t threads = 0;
  std::string dtype;
  bool quiet = false;
};

struct CalibrateFlags {
  std::string model;  // empty: the embedded model
  std::string method = "annsa-quant";
  int64_t maps = kDefaultMaps;
  uint64_t first_map = 610'000;  // training, evaluation and reports use others
  int64_t frames = 112;
  int64_t probe_every = 16;
  std::string out;  // empty: beside the model
  std::string device = "cpu";
  int64_t threads = 0;
  std::string dtype;
  bool quiet = false;
};

struct BenchFlags {
  std::string subject;             // attention | merge | index | linear | rollout | wan
  std::string model;               // of rollout and wan; empty: the embedded model, random weights
  std::string methods;             // empty: the subject's own
  std::vector<int64_t> histories;  // the same
  std::string size;                // of wan, "WxH"; empty: as the models were trained
  std::string latents;             // of rollout: file for what dense attention made
  std::string json;
  std::string device = "cpu";
  int64_t threads = 0;
  std::string dtype;
};

struct InspectFlags {
  std::string path;
};

// Exactly one command is set; none when the text asked for (--help, --version) is printed already.
struct CommandLine {
  std::optional<GenerateFlags> generate;
  std::optional<CompareFlags> compare;
  std::optional<CalibrateFlags> calibrate;
  std::optional<BenchFlags> bench;
  std::optional<InspectFlags> inspect;
};

// Throws Error (kUsage), one line.
CommandLine parse_command_line(int argc, const char* const* argv);

}  // namespace longtake::cli
