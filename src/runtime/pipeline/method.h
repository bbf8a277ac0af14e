// Method: everything that makes a rollout differ from dense attention over the whole history, as
// one value with one spelling. Flags, saved sessions and comparisons all read the same table.
//
//   NAME[:N][:key=value]...     dense   window:37   tempcache-quant:merge-threshold=1
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "attention/prompt_select.h"
#include "attention/select.h"
#include "kv/cache.h"
#include "models/world/config.h"
#include "pipeline/step_cache.h"

namespace longtake {

// "4736" keys per head and layer, or "64MiB" in all; 0: none given.
struct MemoryBudget {
  double amount = 0;
  bool is_bytes = false;
};

struct Method {
  CacheOptions memory;         // the policy and its options; cache_options() fills in the rest
  MemoryBudget budget;         // of a policy that has one
  int64_t window_frames = 0;   // of `window`, the sink's included; 0: by the budget, or the default
  bool sparse_self = false;    // AnnSA
  SelectOptions select;        // of AnnSA
  bool sparse_prompt = false;  // AnnCA
  PromptSelectOptions prompt_select;  // of AnnCA
  // Sampling steps without AnnSA and AnnCA, and layers without AnnSA, by index, ascending; nullopt:
  // what was calibrated, or the last dense_count() steps and the first dense_count() layers.
  std::optional<std::vector<int64_t>> dense_steps, dense_layers;
  // Shares of the layers in a budget, any numbers above 0; empty: alike; nullopt: what was
  // calibrated, or alike.
  std::optional<std::vector<double>> layer_shares = std::vector<double>();
  StepCacheOptions step_cache;
  int64_t num_steps = 0;  // sampling steps a chunk; 0: the model's own

  // One option by its key, such as "merge-threshold". Both throw Error (kUsage).
  void set(const std::string& key, const std::string& value);
  std::string get(const std::string& key) const;

  // The options that matter, as key=value separated by ':'; parse_method reads it back.
  std::string to_string() const;
};

// A row of the table of options.
struct MethodOption {
  const char* key;
  const char* values;  // "lsh | quant"
  const char* help;
  const char* needs;  // "memory=tempcache | ...": without one of these it means nothing; or ""
};

std::span<const MethodOption> method_options();

// All spellings of presets, for messages: "dense | window[:N] | ...".
std::string method_names();

using MethodSettings = std::vector<std::pair<std::string, std::string>>;  // key, value

// A preset by name ("": none) on top of `base`, and settings on top of that. A budget among them
// takes the place of the base's window. Throws Error (kUsage) for an unknown name, key or value,
// and for a setting that means nothing with the others.
Method make_method(const std::string& preset, const MethodSettings& settings,
                   const Method& base = {});

// The spelling at the top of this file, and what it names as make_method takes it.
Method parse_method(const std::string& text);
std::pair<std::string, MethodSettings> split_method(const std::string& text);

// What a method must know of a model.
struct ModelSizes {
  ModelSizes() = default;
  ModelSizes(const world::TransformerConfig& config);  // NOLINT(google-explicit-constructor)

  int64_t num_layers = 0;
  int64_t num_heads = 0;
  int64_t head_dim = 0;
  int64_t frame_tokens = 0;     // of a latent frame
  int64_t rope_time_pairs = 0;  // rotary pairs of a head that turn with the frame
  double rope_time_theta = 0;
};

// What a layer's cache is made from: the method's policy, its budget in keys or frames, the model's
// sizes. The full history reserves memory for expected_frames. Throws Error (kUsage) for a budget
// that is too small.
CacheOptions cache_options(const Method& method, const ModelSizes& sizes, DType dtype,
                           int64_t expected_frames);

// How many of so many steps or layers stay dense: 30 %, the share that the paper gives. It takes
// the first steps; but what a step gets wrong later ones put right, and nobody puts right the last.
int64_t dense_count(int64_t count);

// The method with those steps and layers named that stay dense where others are sparse; num_steps
// must be set. Throws Error (kUsage) for a step or layer that is not there.
Method name_dense_parts(const Method& method, int64_t num_layers);

// Contradictions between the method and the model show here: throws Error (kUsage).
void expect_playable(const Method& method, const world::Config& config, DType dtype);

// Bytes that one frame's keys and values take in all layers.
double cache_bytes_per_frame(const ModelSizes& sizes, DType dtype);

}  // namespace longtake
