// make-random-model OUT [--size 1.3b|14b|tiny|matrix-game-2|matrix-game-2-tiny] [--dtype bf16|f32]
// [--seed N] [--transformer-only] Writes a Wan model folder with random weights; see
// src/runtime/models/wan/random_model.h.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <string>

#include "base/error.h"
#include "models/wan/random_model.h"

int main(int argc, char** argv) {
  longtake::wan::RandomModelOptions options;
  std::string folder;
  std::string dtype = "bf16";
  CLI::App app("Writes a Wan model folder of the true layout and sizes with random weights");
  app.add_option("OUT", folder, "folder to write into")->required();
  app.add_option("--size", options.size, "sizes of the model")
      ->check(CLI::IsMember({"1.3b", "14b", "tiny", "matrix-game-2", "matrix-game-2-tiny"}))
      ->capture_default_str();
  app.add_option("--dtype", dtype, "of the files")
      ->check(CLI::IsMember({"bf16", "f32"}))
      ->capture_default_str();
  app.add_option("--seed", options.seed, "of the weights")->capture_default_str();
  app.add_flag("--transformer-only", options.transformer_only, "leave out encoders and decoders");
  app.add_flag("!--no-text-encoder", options.text_encoder,
               "leave out the text encoder: 11 of the 14 GB of 1.3b");
  CLI11_PARSE(app, argc, argv);
  options.dtype = dtype == "f32" ? longtake::DType::kF32 : longtake::DType::kBF16;
  try {
    longtake::Context ctx;
    longtake::wan::write_random_model(ctx, folder, options);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "make-random-model: %s\n", error.what());
    return 1;
  }
  return 0;
}
