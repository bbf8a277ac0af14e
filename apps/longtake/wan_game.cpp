#include "wan_game.h"

#include <algorithm>
#include <utility>

#include "base/error.h"
#include "media/frame_reader.h"
#include "models/wan/image_encoder.h"
#include "setup.h"

namespace longtake::cli {
namespace {

// Throws Error (kUsage) for a flag that means nothing to such a model.
void expect_no_prompts(const GenerateFlags& flags) {
  for (const auto& [flag, is_given] : {std::pair("--prompt", !flags.prompt.empty()),
                                       std::pair("--prompt-file", !flags.prompt_file.empty()),
                                       std::pair("--prompt-at", !flags.prompt_at.empty()),
                                       std::pair("--load-prompt", !flags.load_prompt.empty()),
                                       std::pair("--save-prompt", !flags.save_prompt.empty())}) {
    if (is_given)
      throw Error(ErrorKind::kUsage,
                  str(flag,
                      ": expected none, since a Matrix-Game 2 model reads a picture (--init) "
                      "and actions, found one"));
  }
}

// The largest middle part of a picture that has the proportions of width x height.
Frame middle_of(const Frame& frame, int64_t width, int64_t height) {
  const int64_t from_width = frame.width, from_height = frame.height;
  const bool is_tall = from_height * width > from_width * height;
  Frame out;
  out.width =
      static_cast<int>(std::max<int64_t>(1, is_tall ? from_width : from_height * width / height));
  out.height =
      static_cast<int>(std::max<int64_t>(1, is_tall ? from_width * height / width : from_height));
  const int64_t left = (frame.width - out.width) / 2, top = (frame.height - out.height) / 2;
  out.rgb.resize(frame_bytes(out.width, out.height));
  const size_t row = frame_bytes(out.width, 1);
  for (int64_t y = 0; y < out.height; ++y)
    std::copy_n(frame.rgb.begin() + ((top + y) * frame.width + left) * 3, row,
                out.rgb.begin() + y * static_cast<int64_t>(row));
  return out;
}

}  // namespace

Game::Game(const GenerateFlags& flags, const wan::ModelFiles& files,
           const wan::TransformerConfig& config)
    : init_(flags.init), files_(files), config_(config) {
  constexpr size_t kMostBytes = 64 << 20;
  expect_no_prompts(flags);
  if (flags.init.empty())
    throw Error(ErrorKind::kUsage,
                "--init: expected the picture that a Matrix-Game 2 video begins with, found none");
  open_frame_reader(flags.init);
  for (const auto& [what, path] :
       {std::pair("Wan2.1_VAE.pth", &files.vae),
        std::pair("models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
                  &files.image_encoder)}) {
    if (path->empty())
      throw Error(ErrorKind::kInput,
                  str(files.transformer, ": expected ", what,
                      " beside it, in the folder above or in --base-model, found none"));
  }
  const int64_t dim = wan::image_encoder_config(Checkpoint(files.image_encoder)).dim;
  if (dim != config.text_dim)
    throw Error(ErrorKind::kInput,
                str(files.image_encoder, ": expected tokens of ", config.text_dim,
                    " values, as the transformer reads them, found ", dim));
  const ActionKind kind = action_kind(config.actions);
  const std::string text =
      flags.actions_file.empty() ? flags.actions : read_small_file(flags.actions_file, kMostBytes);
  rows_ = parse_actions(text, kind);
  num_actions_ = rows_.count(config.actions.keyboard_keys);
  if (num_actions_ == 0) rows_ = parse_actions(gentle_actions(kind), kind);
}

void Game::read_picture(int64_t width, int64_t height) {
  const auto reader = open_frame_reader(init_);
  Frame frame;
  int64_t count = 0;
  for (Frame next; reader->read(next); ++count) std::swap(frame, next);
  if (count == 0)
    throw Error(ErrorKind::kInput, str(init_, ": expected at least one frame, found none"));
  picture_ =
      resized(middle_of(frame, width, height), static_cast<int>(width), static_cast<int>(height));
}

Tensor Game::encode_picture(DType compute, int threads) const {
  Context cpu({}, threads);
  const Checkpoint file(files_.image_encoder);
  WeightTable table(file, &cpu);
  const wan::ImageEncoder encoder(wan::image_encoder_config(file), compute, table);
  table.finish();
  return encoder.encode(cpu, picture());
}

void Game::begin(Context& ctx, DType compute, const wan::Controls& controls) {
  const Checkpoint file(files_.vae);
  WeightTable table(file, &ctx);
  wan::VaeEncoder encoder(wan::vae_dim(file), compute, table);
  table.finish();
  latents_.emplace(ctx, std::move(encoder), picture(), controls);
  windows_.emplace(ctx, config_, rows_, controls);
}

void Game::fill(Context& ctx, int64_t first_frame, wan::Controls& controls) {
  windows_->fill(ctx, first_frame, controls);
  latents_->fill(ctx, first_frame, controls);
}

}  // namespace longtake::cli
