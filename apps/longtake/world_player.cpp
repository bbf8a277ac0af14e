// The embedded world model, and any other of its kind.
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/log.h"
#include "device/context.h"
#include "io/json.h"
#include "media/frame_reader.h"
#include "models/world/model.h"
#include "overworld/actions.h"
#include "pipeline/session.h"
#include "pipeline/walk.h"
#include "player.h"
#include "progress.h"
#include "setup.h"
#include "signals.h"

namespace longtake::cli {
namespace {

constexpr const char* kNoteActions = "actions";
constexpr const char* kNoteNextAction = "next_action";

[[noreturn]] void usage(const std::string& message) {
  throw Error(ErrorKind::kUsage, message);
}

void expect_size(const std::string& flag, const world::TransformerConfig& sizes) {
  const std::string own = str(sizes.frame_width(), "x", sizes.frame_height());
  if (!flag.empty() && flag != own)
    usage(str("--size: expected ", own, ", the model's only size, found \"", flag, '"'));
}

// Flags of the Wan family.
void expect_no_wan_flags(const GenerateFlags& flags) {
  for (const auto& [flag, value] :
       {std::pair("--base-model", &flags.base_model), std::pair("--rollout", &flags.rollout),
        std::pair("--decoder", &flags.decoder), std::pair("--decoder-tile", &flags.decoder_tile),
        std::pair("--save-prompt", &flags.save_prompt),
        std::pair("--load-prompt", &flags.load_prompt)}) {
    if (!value->empty())
      usage(str(flag, ": expected a model of the Wan family, found a world model"));
  }
}

// Flags, files and a saved session together: what will be played.
struct Plan {
  SessionOptions session;
  std::vector<overworld::Action> actions;
  int64_t next_action = 0;
  int64_t frames = 0;
  std::vector<PromptSwitch> switches;
};

std::vector<overworld::Action> choose_actions(const GenerateFlags& flags, const SavedSession* saved,
                                              int64_t& next_action) {
  constexpr size_t kMaxBytes = 64 << 20;
  if (!flags.actions_file.empty())
    return overworld::parse_actions(read_small_file(flags.actions_file, kMaxBytes));
  if (!flags.actions.empty()) return overworld::parse_actions(flags.actions);
  if (saved == nullptr) return gentle_tour();
  const auto note = [&](const char* key) {
    const auto found = saved->notes.find(key);
    return found == saved->notes.end() ? std::string() : found->second;
  };
  const std::string used = note(kNoteNextAction);
  std::from_chars(used.data(), used.data() + used.size(), next_action);
  next_action = std::max<int64_t>(next_action, 0);
  return overworld::parse_actions(note(kNoteActions));
}

int64_t choose_frames(const GenerateFlags& flags, const Plan& plan, bool resumed) {
  constexpr int64_t kDefaultFrames = 240;
  if (flags.frames) return *flags.frames;
  if (flags.seconds)
    return std::max<int64_t>(1, std::llround(*flags.seconds * world::kFramesPerSecond));
  if (flags.actions.empty() && flags.actions_file.empty()) return kDefaultFrames;
  const auto count = static_cast<int64_t>(plan.actions.size());
  return resumed || !flags.init.empty() ? std::max<int64_t>(count, 1) : count + 1;
}

Plan make_plan(const GenerateFlags& flags, const std::string& folder, const world::Config& config,
               DType dtype, const SavedSession* saved) {
  Plan plan;
  if (saved != nullptr) plan.session = saved->options;
  if (!flags.prompt_file.empty() || !flags.prompt.empty() || saved == nullptr)
    plan.session.prompt = choose_prompt(flags);
  if (plan.session.prompt.empty())
    usage(
        "--prompt: expected what the world looks like, such as \"a snowy land with a red tower "
        ".\", found none");
  if (flags.seed) plan.session.seed = *flags.seed;
  if (saved == nullptr || !flags.preset.empty() || !flags.method.empty())
    plan.session.method = named_as_flag([&] { return make_method(flags.preset, flags.method); });
  apply_calibration(flags.calibration, folder, config, plan.session.method);
  expect_playable(plan.session.method, config, dtype);
  plan.actions = choose_actions(flags, saved, plan.next_action);
  plan.frames = choose_frames(flags, plan, saved != nullptr);
  const int64_t before = saved != nullptr ? saved->next_frame : 0;
  if (before + plan.frames > std::numeric_limits<int32_t>::max())
    usage(str("--frames: expected at most ", std::numeric_limits<int32_t>::max() - before,
              " more, found ", plan.frames));
  plan.session.expected_frames = before + plan.frames;
  plan.switches = parse_prompt_switches(flags.prompt_at, plan.frames);
  constexpr int64_t kWatchEvery = 8;  // looking into errors takes about as long as a commit
  if (!flags.stats.empty()) plan.session.watch_every = kWatchEvery;
  return plan;
}

// A full history that cannot fit is refused at the start rather than killed after an hour.
void expect_room(const Plan& plan, const world::Config& config, DType dtype) {
  if (plan.session.method.memory.memory != "full") return;
  const double wanted = cache_bytes_per_frame(config.transformer, dtype) *
                        static_cast<double>(plan.session.expected_frames);
  const double there =
      static_cast<double>(sysconf(_SC_PHYS_PAGES)) * static_cast<double>(sysconf(_SC_PAGESIZE));
  if (wanted > 0.9 * there)
    usage(str("--memory full: expected at most ", bytes_text(0.9 * there), " of history, found ",
              bytes_text(wanted), " for ", plan.session.expected_frames,
              " frames (--memory window has a constant size)"));
}

// The given frames become the session's past, seen along the first actions.
void remember_init(const std::string& path, const world::TransformerConfig& sizes, Session& session,
                   Walk& walk) {
  const auto width = static_cast<int>(sizes.frame_width());
  const auto height = static_cast<int>(sizes.frame_height());
  const auto reader = open_frame_reader(path);
  Frame frame;
  while (stop_signal() == 0 && reader->read(frame)) {
    const bool fits = frame.width == width && frame.height == height;
    Frame scaled = fits ? Frame{} : resized(frame, width, height);
    uint8_t* rgb = fits ? frame.rgb.data() : scaled.rgb.data();
    session.remember(View(rgb, DType::kU8, Device{}, {height, width, 3}), walk.next());
  }
  if (session.next_frame() == 0 && stop_signal() == 0)
    throw Error(ErrorKind::kInput, str(path, ": expected at least one frame, found none"));
}

class WorldPlayer final : public Player {
 public:
  explicit WorldPlayer(const GenerateFlags& flags)
      : flags_(flags),
        folder_(flags.model.empty() ? find_embedded_model() : flags.model),
        config_(world::read_config(folder_)),
        dtype_(choose_dtype(flags.dtype, choose_device(flags.device))) {
    expect_no_wan_flags(flags);
    expect_size(flags.size, config_.transformer);
    if (!flags.load_state.empty()) {
      if (!flags.init.empty()) usage("--init: expected a fresh session, found --load-state");
      saved_ = std::make_unique<SavedSession>(read_saved_session(flags.load_state));
    }
    plan_ = make_plan(flags, folder_, config_, dtype_, saved_.get());
    expect_room(plan_, config_, dtype_);
    if (!flags.save_state.empty()) expect_writable("--save-state", flags.save_state);
  }

  int64_t num_frames() const override { return plan_.frames; }

  void load() override {
    ctx_ =
        std::make_unique<Context>(choose_device(flags_.device), static_cast<int>(flags_.threads));
    model_ = std::make_unique<world::Model>(world::load_model(*ctx_, folder_, dtype_));
    for (const PromptSwitch& later : plan_.switches) Session::check_prompt(*model_, later.text);
    warn_of_unknown_words(plan_.session.prompt);
    session_ = std::make_unique<Session>(*ctx_, *model_, plan_.session);
    walk_ = std::make_unique<Walk>(plan_.actions, start_of(config_.transformer), plan_.next_action);
    if (saved_ != nullptr) {
      session_->load(flags_.load_state);
      if (session_->camera()) walk_->continue_from(*session_->camera());
    }
    if (!flags_.init.empty()) remember_init(flags_.init, config_.transformer, *session_, *walk_);
  }

  RunStats describe() const override {
    RunStats stats;
    stats.model = model_->folder;
    stats.prompt = session_->options().prompt;
    stats.method = session_->options().method.to_string();
    stats.dtype = name_of(model_->compute);
    stats.device = ctx_->device().to_string();
    stats.threads = ctx_->threads();
    stats.seed = session_->options().seed;
    stats.num_steps = session_->options().method.num_steps;
    stats.frame_width = config_.transformer.frame_width();
    stats.frame_height = config_.transformer.frame_height();
    stats.fps = world::kFramesPerSecond;
    stats.weight_bytes = model_->weight_bytes;
    return stats;
  }

  void next_chunk(const FrameSink& rgb) override {
    if (next_switch_ < plan_.switches.size() &&
        plan_.switches[next_switch_].frame == frames_made_) {
      const std::string& prompt = plan_.switches[next_switch_++].text;
      warn_of_unknown_words(prompt);
      session_->set_prompt(prompt);
    }
    ++frames_made_;
    rgb(session_->step(walk_->next()));
  }

  const ChunkStats& last_chunk() const override { return session_->last_chunk(); }

  size_t workspace_bytes() const override { return ctx_->workspace().bytes_reserved(); }

  void save() override {
    if (flags_.save_state.empty()) return;
    session_->save(flags_.save_state, {{kNoteActions, overworld::format_actions(walk_->actions())},
                                       {kNoteNextAction, std::to_string(walk_->next_action())}});
  }

 private:
  void warn_of_unknown_words(const std::string& prompt) const {
    std::string words;
    for (const std::string& word : model_->vocabulary.unknown_words(prompt))
      words += (words.empty() ? "" : ", ") + word;
    if (!words.empty() && !flags_.quiet)
      log(LogLevel::kWarning, "prompt: words that the model does not know: " + printable(words));
  }

  GenerateFlags flags_;
  std::string folder_;
  world::Config config_;
  DType dtype_;
  std::unique_ptr<SavedSession> saved_;
  Plan plan_;
  std::unique_ptr<Context> ctx_;
  std::unique_ptr<world::Model> model_;
  std::unique_ptr<Session> session_;
  std::unique_ptr<Walk> walk_;
  int64_t frames_made_ = 0;
  size_t next_switch_ = 0;
};

}  // namespace

std::unique_ptr<Player> make_world_player(const GenerateFlags& flags) {
  return std::make_unique<WorldPlayer>(flags);
}

}  // namespace longtake::cli
