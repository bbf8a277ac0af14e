#include "inspect.h"

#include <fmt/format.h>

#include <algorithm>
#include <cctype>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "base/error.h"
#include "io/checkpoint.h"
#include "io/json.h"
#include "models/wan/checkpoint.h"
#include "models/wan/model_files.h"
#include "models/wan/transformer.h"
#include "models/world/model.h"
#include "pipeline/session.h"
#include "pipeline/wan_actions.h"
#include "progress.h"
#include "setup.h"

namespace longtake::cli {
namespace {

namespace fs = std::filesystem;

// Tensors whose names differ in layer numbers only, and agree in dtype and shape.
struct Group {
  size_t count = 0;
  size_t bytes = 0;
};

// "blocks.3.ffn.0.weight" -> "blocks.*.ffn.0.weight": numbers that follow the name of a list.
std::string pattern_of(const std::string& name) {
  std::string out;
  for (size_t i = 0; i < name.size();) {
    const size_t end = std::min(name.find('.', i), name.size());
    const std::string part = name.substr(i, end - i);
    const bool is_number = !part.empty() && std::isdigit(static_cast<unsigned char>(part[0])) != 0;
    const bool in_list = out.size() >= 1 && (out.ends_with("blocks.") || out.ends_with("layers."));
    out += is_number && in_list ? "*" : part;
    if (end < name.size()) out += '.';
    i = end + 1;
  }
  return out;
}

void print_tensors(const std::vector<StoredTensor>& tensors) {
  std::map<std::string, Group> groups;
  std::map<std::string, Group> dtypes;
  size_t total = 0;
  for (const StoredTensor& tensor : tensors) {
    total += tensor.bytes();
    const std::string name = (tensor.group.empty() ? "" : tensor.group + ": ") + tensor.name;
    Group& group = groups[fmt::format("{:<52} {:<5} {}", printable(pattern_of(name)),
                                      name_of(tensor.dtype), tensor.shape.to_string())];
    Group& dtype = dtypes[name_of(tensor.dtype)];
    for (Group* g : {&group, &dtype}) {
      ++g->count;
      g->bytes += tensor.bytes();
    }
  }
  for (const auto& [text, group] : groups)
    fmt::print("  {:<80} x{:<4} {}\n", text, group.count,
               bytes_text(static_cast<double>(group.bytes)));
  fmt::print("total: {} tensors, {}", tensors.size(), bytes_text(static_cast<double>(total)));
  for (const auto& [name, group] : dtypes)
    fmt::print("; {} {}: {}", group.count, name, bytes_text(static_cast<double>(group.bytes)));
  fmt::print("\n");
}

void print_state(const Checkpoint& file) {
  const auto saved = SavedSession::from_metadata(file.metadata(), file.path());
  fmt::print("{}: a saved session\n", file.path());
  fmt::print("  next frame {}, seed {}, {}", saved.next_frame, saved.options.seed,
             printable(saved.dtype));
  if (saved.camera) fmt::print(", camera at ({}, {})", saved.camera->x, saved.camera->y);
  fmt::print("\n  method {}", saved.options.method.to_string());
  fmt::print("\n  model fingerprint {:016x}\n  prompt: {}\n", saved.model_fingerprint,
             printable(saved.options.prompt));
  for (const auto& [key, value] : saved.notes)
    fmt::print("  {}: {}\n", printable(key), printable(value));
  print_tensors(file.tensors());
}

// Prints at most a screenful of them.
void print_problems(const std::vector<std::string>& problems) {
  constexpr size_t kMost = 20;
  for (size_t i = 0; i < std::min(problems.size(), kMost); ++i)
    fmt::print("  differs: {}\n", problems[i]);
  if (problems.size() > kMost) fmt::print("  and {} more\n", problems.size() - kMost);
  fmt::print("{}\n", problems.empty() ? "complete: every tensor is there and none is surplus"
                                      : str("incomplete: ", problems.size(), " tensors differ"));
}

void print_model(const std::string& folder) {
  const world::Config config = world::read_config(folder);
  const Checkpoint file(folder + "/" + world::kWeightsFile);
  const auto& t = config.transformer;
  const auto& e = config.text_encoder;
  fmt::print("{}: {}\n", folder, world::kModelType);
  fmt::print("  frames {} x {}, {} tokens each; world of {} x {} tokens\n", t.frame_width(),
             t.frame_height(), t.frame_tokens(), t.torus_tokens, t.torus_tokens);
  fmt::print("  transformer: dim {}, {} layers, {} heads x {}, ffn {}\n", t.dim, t.num_layers,
             t.num_heads, t.head_dim, t.ffn_dim);
  fmt::print("  text encoder: dim {}, {} layers, {} heads, ffn {}, {} words, at most {} tokens\n",
             e.dim, e.num_layers, e.num_heads, e.ffn_dim, e.vocab_size, e.text_len);
  fmt::print("  autoencoder: {} latent channels, widths {} {} {}\n",
             config.autoencoder.latent_channels, config.autoencoder.widths[0],
             config.autoencoder.widths[1], config.autoencoder.widths[2]);
  fmt::print("  sampler: {} in {} steps, shift {}\n",
             config.sampler.type == world::SamplerType::kOde ? "ode" : "renoise",
             config.sampler.num_steps, config.sampler.shift);
  if (config.sampler.first_steps > 0)
    fmt::print("  a frame without history: at least {} steps, shift {}\n",
               config.sampler.first_steps, config.sampler.first_shift);
  print_tensors(file.tensors());
  print_problems(world::check_weights(config, file));
  const std::string calibration = folder + "/" + kCalibrationFile;
  std::error_code error;
  if (fs::exists(calibration, error))
    fmt::print("{}: {}", calibration,
               to_text(read_calibration(calibration, t, world::model_fingerprint(folder))));
}

// What a file is to a Wan model, and what it lacks of it.
void print_wan(const Checkpoint& file, wan::Part part) {
  fmt::print("{}\n", wan::name_of(part));
  if (part == wan::Part::kTransformer || part == wan::Part::kGame) {
    std::string groups;
    for (const std::string& group : file.groups())
      groups += (groups.empty() ? "" : ", ") + (group.empty() ? "the file itself" : group);
    fmt::print("  weights under: {}\n", printable(groups));
    const wan::TransformerConfig c = wan::transformer_config(wan::open_generator(file.path()));
    fmt::print("  dim {}, {} layers, {} heads x {}, ffn {}, {} -> {} channels, {} {}\n", c.dim,
               c.num_layers, c.num_heads, c.head_dim(), c.ffn_dim, c.in_channels, c.out_channels,
               c.reads_image ? "image" : "text", c.text_dim);
    if (part == wan::Part::kGame)
      fmt::print("  actions: {} keys{}, {} heads x {} in the first {} layers, played as {}\n",
                 c.actions.keyboard_keys, c.actions.has_mouse ? " and the mouse" : "",
                 c.actions.num_heads, wan::kActionHeadDim, c.actions.num_layers,
                 family_of(action_kind(c.actions)));
  }
  if (part != wan::Part::kLora) print_problems(wan::check_part(file, part));
}

// A folder with a Wan model: its parts, and which are not there.
void print_wan_folder(const std::string& folder) {
  const wan::ModelFiles files = wan::find_model_files(folder);
  const bool is_game = files.family.starts_with("matrix-game-2");
  fmt::print("{}: a {} model\n", folder, is_game ? "Matrix-Game 2" : "Wan 2.1");
  for (const auto& [what, path] : {std::pair("transformer", files.transformer),
                                   is_game ? std::pair("image encoder", files.image_encoder)
                                           : std::pair("text encoder", files.text_encoder),
                                   std::pair("VAE", files.vae), std::pair("TAEHV", files.taehv)}) {
    if (path.empty()) {
      fmt::print("{}: missing\n", what);
      continue;
    }
    const Checkpoint file(path);
    fmt::print("{}: {}, {}, ", path, file.format(), wan::name_of(wan::part_of(file)));
    print_problems(wan::check_part(file, wan::part_of(file)));
  }
  if (!is_game)
    fmt::print("tokenizer: {}\n", files.tokenizer.empty() ? "missing" : files.tokenizer);
}

}  // namespace

void inspect(const InspectFlags& flags) {
  std::error_code error;
  if (fs::is_directory(flags.path, error)) {
    wan::is_model(flags.path) ? print_wan_folder(flags.path) : print_model(flags.path);
    return;
  }
  const Checkpoint file(flags.path);
  if (is_saved_session(file.metadata())) {
    print_state(file);
    return;
  }
  fmt::print("{}: {}\n", file.path(), file.format());
  for (const auto& [key, value] : file.metadata())
    fmt::print("  {}: {}\n", printable(key), printable(value));
  print_tensors(file.tensors());
  const wan::Part part = wan::part_of(file);
  if (part != wan::Part::kNone) print_wan(file, part);
}

}  // namespace longtake::cli
