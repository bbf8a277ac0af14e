// Models of the Wan family: Self-Forcing, Rolling-Forcing, LongLive, Causal-Forcing, Matrix-Game 2.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "device/context.h"
#include "io/json.h"
#include "media/frame_reader.h"
#include "models/wan/decoder.h"
#include "models/wan/model.h"
#include "models/wan/prompt.h"
#include "ops/copy.h"
#include "ops/linear.h"
#include "pipeline/wan_memory.h"
#include "pipeline/wan_session.h"
#include "player.h"
#include "progress.h"
#include "setup.h"
#include "signals.h"
#include "wan_game.h"

namespace longtake::cli {
namespace {

constexpr int64_t kDefaultFrames = 81;  // 21 latents, as long as the official videos

[[noreturn]] void usage(const std::string& message) {
  throw Error(ErrorKind::kUsage, message);
}

void expect_no_world_flags(const GenerateFlags& flags, bool has_actions) {
  for (const auto& [flag, is_given] :
       {std::pair("--actions", !has_actions && !flags.actions.empty()),
        std::pair("--actions-file", !has_actions && !flags.actions_file.empty()),
        std::pair("--save-state", !flags.save_state.empty()),
        std::pair("--load-state", !flags.load_state.empty()),
        std::pair("--calibration", !flags.calibration.empty())}) {
    if (is_given) usage(str(flag, ": expected a world model, found one of the Wan family"));
  }
}

// How the transformer is played: what the flag says, else what the weights show, else the files'
// names.
std::string choose_family(const std::string& flag, const wan::ModelFiles& files,
                          const wan::TransformerConfig& config) {
  const bool has_actions = config.actions.num_layers > 0;
  const std::string own = has_actions ? family_of(action_kind(config.actions)) : files.family;
  const std::string& family = flag.empty() ? own : flag;
  if (has_actions && family != own)
    usage(str("--rollout: expected ", own, ", as the weights are, found ", printable(family)));
  if (!has_actions && family.starts_with("matrix-game-2"))
    throw Error(flag.empty() ? ErrorKind::kInput : ErrorKind::kUsage,
                str(flag.empty() ? files.transformer : "--rollout: " + flag,
                    ": expected a transformer with action modules, found one without"));
  return family;
}

wan::DecoderKind choose_decoder(const std::string& flag, const wan::ModelFiles& files) {
  const bool is_vae = flag == "vae" || (flag.empty() && !files.vae.empty());
  if ((is_vae ? files.vae : files.taehv).empty())
    throw Error(ErrorKind::kInput, str(files.transformer, ": expected ",
                                       flag == "vae"     ? "Wan2.1_VAE.pth"
                                       : flag == "taehv" ? "taew2_1.pth"
                                                         : "Wan2.1_VAE.pth or taew2_1.pth",
                                       " beside it or in --base-model, found none"));
  return is_vae ? wan::DecoderKind::kVae : wan::DecoderKind::kTaehv;
}

// Of decoding, in latents; 0: whole pictures.
int64_t choose_tile(const std::string& flag) {
  if (flag.empty()) return 0;
  constexpr int64_t kLeast = 64;
  int64_t pixels = 0;
  char end = 0;
  if (std::sscanf(flag.c_str(), "%5ld%c", &pixels, &end) != 1 || pixels < kLeast ||
      pixels > kMaxFrameSide || pixels % wan::kLatentPixels != 0)
    usage(str("--decoder-tile: expected a multiple of ", wan::kLatentPixels, " from ", kLeast,
              " to ", kMaxFrameSide, ", found \"", printable(flag), '"'));
  return pixels / wan::kLatentPixels;
}

// num_actions: that the flags give.
int64_t choose_frames(const GenerateFlags& flags, double per_second, int64_t num_actions) {
  if (flags.seconds) return std::max<int64_t>(1, std::llround(*flags.seconds * per_second));
  return flags.frames.value_or(num_actions > 0 ? num_actions + 1 : kDefaultFrames);
}

// What it is made of, and which flag lowers the largest part.
std::string memory_text(const WanMemory& memory, const WanOptions& options) {
  const std::string& policy = options.method->memory.memory;
  const std::pair<double, const char*> parts[] = {
      {memory.weights, options.dtype == DType::kF32 ? "--dtype bf16" : "a smaller model"},
      {memory.cache, policy == "full"     ? "--memory window or fewer --frames"
                     : policy == "window" ? "--window-frames or --size"
                                          : "--memory-budget or --size"},
      {memory.work + memory.stream, "--size, --decoder-tile or --decoder taehv"}};
  return str("(weights ", bytes_text(memory.weights), ", cache ", bytes_text(memory.cache),
             ", temporaries ", bytes_text(memory.work), ", decoder's past ",
             bytes_text(memory.stream), "; ",
             std::max_element(std::begin(parts), std::end(parts))->second, " lowers it)");
}

// Stops between two layers: a pass over a large model takes too long to wait for.
class StopWatcher final : public PassObserver {
 public:
  void on_layer(int64_t /*layer*/, View /*x*/) override {
    if (stop_signal() != 0) throw Stopped();
  }
};

class WanPlayer final : public Player {
 public:
  explicit WanPlayer(const GenerateFlags& flags)
      : flags_(flags),
        files_(wan::find_model_files(flags.model, flags.base_model)),
        dtype_(choose_dtype(flags.dtype, choose_device(flags.device))),
        ctx_(std::make_unique<Context>(choose_device(flags.device),
                                       static_cast<int>(flags.threads))) {
    config_ = wan::read_config(files_);
    const bool is_game = config_.actions.num_layers > 0;
    expect_no_world_flags(flags, is_game);
    const std::string family = choose_family(flags.rollout, files_, config_);
    WanOptions& rollout = options_.rollout;
    rollout = named_as_flag([&] { return options_of_family(family); });
    rollout.dtype = dtype_;
    choose_size(flags.size, rollout);
    decoder_kind_ = choose_decoder(flags.decoder, files_);
    decoder_tile_ = choose_tile(flags.decoder_tile);
    if (is_game) game_.emplace(flags, files_, config_);
    num_frames_ = choose_frames(flags, frames_per_second(), game_ ? game_->num_actions() : 0);
    switches_ = parse_prompt_switches(flags.prompt_at, num_frames_);
    if (!game_) choose_prompts();
    rollout.method = named_as_flag(
        [&] { return choose_method(*ctx_, rollout, config_, flags.preset, flags.method); });
    if (flags.seed) options_.seed = *flags.seed;
    if (!flags.init.empty()) open_frame_reader(flags.init);
    // A video that is continued has the frame that is a latent of its own.
    const int64_t latents = flags.init.empty() || game_
                                ? wan::latents_of_frames(num_frames_)
                                : wan::latents_of_frames(num_frames_ + 1) - 1;
    options_.num_chunks = (latents + rollout.chunk_frames - 1) / rollout.chunk_frames;
    rollout.expected_frames = options_.num_chunks * rollout.chunk_frames;
    if (!flags.save_prompt.empty()) expect_writable("--save-prompt", flags.save_prompt);
    expect_memory();
  }

  int64_t num_frames() const override { return num_frames_; }

  void load() override {
    game_ ? encode_picture() : encode_prompts();
    transformer_ = wan::load_transformer(*ctx_, files_, dtype_, DType::kF32, &weight_bytes_);
    size_t decoder_bytes = 0;
    decoder_ = wan::open_decoder(*ctx_, decoder_file(), decoder_kind_, dtype_, &decoder_bytes,
                                 decoder_tile_);
    weight_bytes_ += decoder_bytes;
    options_.before_chunk = [this](int64_t first_frame) { return prepare_chunk(first_frame); };
    session_ =
        std::make_unique<WanSession>(*ctx_, *transformer_, *decoder_, prompt_.embeddings, options_);
    if (ctx_->device().kind == DeviceKind::kCpu) session_->observe(&watcher_);
    if (game_)
      game_->begin(*ctx_, dtype_, *session_->controls());
    else if (!flags_.init.empty())
      remember_init();
  }

  RunStats describe() const override {
    RunStats stats;
    stats.model = files_.transformer;
    stats.prompt = prompt_.text;
    stats.method = session_->rollout().method().to_string();
    stats.dtype = name_of(dtype_);
    stats.device = ctx_->device().to_string();
    stats.threads = ctx_->threads();
    stats.seed = options_.seed;
    stats.num_steps = session_->rollout().method().num_steps;
    stats.frame_width = options_.rollout.width * wan::kLatentPixels;
    stats.frame_height = options_.rollout.height * wan::kLatentPixels;
    stats.fps = frames_per_second();
    stats.weight_bytes = weight_bytes_;
    return stats;
  }

  void next_chunk(const FrameSink& rgb) override {
    session_->next_chunk([&](View frame) {
      if (stop_signal() != 0) throw Stopped();
      rgb(frame);
    });
  }

  const ChunkStats& last_chunk() const override { return session_->last_chunk(); }

  size_t workspace_bytes() const override { return session_->workspace_bytes(); }

 private:
  // Prompt and actions of the chunk that begins there; false: behind the last frame.
  bool prepare_chunk(int64_t first_frame) {
    if (first_frame >= num_frames_) return false;
    // Of several prompts that are due the last one counts.
    const size_t before = next_switch_;
    while (next_switch_ < switches_.size() && switches_[next_switch_].frame <= first_frame)
      ++next_switch_;
    if (next_switch_ > before) session_->switch_prompt(later_prompts_[next_switch_ - 1]);
    if (game_) game_->fill(*ctx_, session_->rollout().num_frames(), *session_->controls());
    return true;
  }

  Checkpoint decoder_file() const {
    return Checkpoint(decoder_kind_ == wan::DecoderKind::kVae ? files_.vae : files_.taehv);
  }

  double frames_per_second() const {
    return game_ ? Game::kFramesPerSecond : wan::kFramesPerSecond;
  }

  bool needs_encoder() const { return flags_.load_prompt.empty() || !switches_.empty(); }

  void choose_prompts() {
    const bool has_words = !flags_.prompt.empty() || !flags_.prompt_file.empty();
    if (!flags_.load_prompt.empty()) {
      if (has_words) usage("--load-prompt: expected no --prompt beside it, found one");
      prompt_ = wan::load_prompt(flags_.load_prompt, config_.text_dim);
    } else {
      prompt_.text = choose_prompt(flags_);
      if (prompt_.text.find_first_not_of(" \t\r\n") == std::string::npos)
        usage("--prompt: expected what the video shows, or --load-prompt, found none");
    }
    if (!needs_encoder()) return;
    for (const auto& [what, path] :
         {std::pair("models_t5_umt5-xxl-enc-bf16.pth", &files_.text_encoder),
          std::pair("google/umt5-xxl/spiece.model", &files_.tokenizer)}) {
      if (path->empty())
        throw Error(ErrorKind::kInput, str(files_.transformer, ": expected ", what,
                                           " beside it or in --base-model, or --load-prompt, "
                                           "found none"));
    }
  }

  // What does not fit is refused at the start rather than killed after an hour.
  void expect_memory() const {
    const Device device = ctx_->device();
    WanMemory play = memory_to_play(options_.rollout, config_, decoder_file(), decoder_kind_,
                                    device, decoder_tile_);
    if (game_) add_picture_encoder(options_.rollout, Checkpoint(files_.vae), play);
    expect_memory(device, play.total(), memory_text(play, options_.rollout));
    if (game_) {
      const Checkpoint encoder(files_.image_encoder);
      expect_memory({}, memory_to_encode_image(encoder, encoder_dtype()), "for the image encoder");
      return;
    }
    if (!needs_encoder()) return;
    const size_t encode = memory_to_encode(Checkpoint(files_.text_encoder), encoder_dtype());
    expect_memory({}, encode, "for the text encoder (--load-prompt needs none of it)");
  }

  static void expect_memory(Device device, size_t wanted, const std::string& what) {
    const size_t there = free_memory_bytes(device);
    if (wanted <= there) return;
    const std::string of = device.kind == DeviceKind::kCpu ? "" : " of " + device.to_string();
    throw Error(ErrorKind::kUsage,
                str("memory", of, ": expected ", bytes_text(static_cast<double>(wanted)), ' ', what,
                    ", found ", bytes_text(static_cast<double>(there)), " free"));
  }

  // The text encoder, by far the largest part, runs on the CPU, and so does the image encoder.
  DType encoder_dtype() const {
    return ctx_->device().kind == DeviceKind::kCpu ? dtype_ : choose_dtype("", Device{});
  }

  void encode_picture() {
    game_->read_picture(options_.rollout.width * wan::kLatentPixels,
                        options_.rollout.height * wan::kLatentPixels);
    prompt_.embeddings = game_->encode_picture(encoder_dtype(), static_cast<int>(flags_.threads));
  }

  // The given picture or video becomes the past. The encoder goes when it is read.
  void remember_init() {
    const auto encoder = wan::open_encoder(*ctx_, decoder_file(), decoder_kind_, dtype_);
    const auto width = static_cast<int>(options_.rollout.width * wan::kLatentPixels);
    const auto height = static_cast<int>(options_.rollout.height * wan::kLatentPixels);
    std::vector<float> values;
    const auto keep = [&](View z) {
      const size_t count = values.size();
      values.resize(count + static_cast<size_t>(z.numel()));
      copy(*ctx_, z, View(values.data() + count, DType::kF32, Device{}, z.shape()));
    };
    const auto reader = open_frame_reader(flags_.init);
    for (Frame frame; reader->read(frame);) {
      if (stop_signal() != 0) return;
      Frame scaled = resized(frame, width, height);
      encoder->encode(*ctx_, View(scaled.rgb.data(), DType::kU8, Device{}, {height, width, 3}),
                      keep);
    }
    encoder->finish(*ctx_, keep);
    if (values.empty())
      throw Error(ErrorKind::kInput, str(flags_.init, ": expected at least one frame, found none"));
    const Shape frame{config_.out_channels, options_.rollout.height, options_.rollout.width};
    const int64_t count = static_cast<int64_t>(values.size()) / frame.numel();
    const View given(values.data(), DType::kF32, Device{}, {count, frame[0], frame[1], frame[2]});
    const Tensor latents(ctx_->device(), DType::kF32, given.shape());
    copy(*ctx_, given, latents);
    session_->remember(latents);
  }

  void encode_prompts() {
    if (needs_encoder()) {
      std::vector<std::string> texts;
      if (flags_.load_prompt.empty()) texts.push_back(prompt_.text);
      for (const PromptSwitch& later : switches_) texts.push_back(later.text);
      Context cpu({}, static_cast<int>(flags_.threads));
      std::vector<Tensor> encoded = wan::encode_prompts(cpu, files_, texts, encoder_dtype());
      if (encoded[0].dim(1) != config_.text_dim)
        throw Error(ErrorKind::kInput,
                    str(files_.text_encoder, ": expected embeddings of ", config_.text_dim,
                        " values, as the transformer reads them, found ", encoded[0].dim(1)));
      auto next = encoded.begin();
      if (flags_.load_prompt.empty()) prompt_.embeddings = std::move(*next++);
      std::move(next, encoded.end(), std::back_inserter(later_prompts_));
    }
    if (!flags_.save_prompt.empty()) wan::save_prompt(flags_.save_prompt, prompt_);
  }

  GenerateFlags flags_;
  wan::ModelFiles files_;
  DType dtype_;
  std::unique_ptr<Context> ctx_;
  wan::TransformerConfig config_;
  wan::DecoderKind decoder_kind_ = wan::DecoderKind::kVae;
  int64_t decoder_tile_ = 0;
  WanSessionOptions options_;
  std::optional<Game> game_;  // of a model with actions
  int64_t num_frames_ = 0;
  wan::SavedPrompt prompt_;
  std::vector<PromptSwitch> switches_;
  std::vector<Tensor> later_prompts_;  // of the switches
  size_t next_switch_ = 0;
  StopWatcher watcher_;
  size_t weight_bytes_ = 0;
  std::unique_ptr<wan::Transformer> transformer_;
  std::unique_ptr<wan::Decoder> decoder_;
  std::unique_ptr<WanSession> session_;
};

}  // namespace

std::unique_ptr<Player> make_wan_player(const GenerateFlags& flags) {
  return std::make_unique<WanPlayer>(flags);
}

}  // namespace longtake::cli
