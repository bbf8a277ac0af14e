#include "generate.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <filesystem>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/log.h"
#include "device/context.h"
#include "io/json.h"
#include "io/mapped_file.h"
#include "kv/page.h"
#include "media/frame_reader.h"
#include "media/frame_writer.h"
#include "models/world/model.h"
#include "ops/linear.h"
#include "overworld/actions.h"
#include "pipeline/session.h"
#include "pipeline/walk.h"
#include "progress.h"
#include "setup.h"
#include "signals.h"

namespace longtake::cli {
namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;

constexpr const char* kNoteActions = "actions";
constexpr const char* kNoteNextAction = "next_action";

const Clock::time_point process_start = Clock::now();

double ms_since(Clock::time_point start) {
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

[[noreturn]] void usage(const std::string& message) {
  throw Error(ErrorKind::kUsage, message);
}

void expect_size(const std::string& flag, const world::TransformerConfig& sizes) {
  const std::string own = str(sizes.frame_width(), "x", sizes.frame_height());
  if (!flag.empty() && flag != own)
    usage(str("--size: expected ", own, ", the model's only size, found \"", flag, '"'));
}

// Flags, files and a saved session together: what will be played.
struct Plan {
  SessionOptions session;
  std::vector<overworld::Action> actions;
  int64_t next_action = 0;
  int64_t frames = 0;
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

Method choose_method(const GenerateFlags& flags) {
  try {
    return make_method(flags.preset, flags.method);
  } catch (const Error& error) {
    throw Error(error.kind(), str("--", error.what()));
  }
}

Plan make_plan(const GenerateFlags& flags, const std::string& folder, const world::Config& config,
               DType dtype, const SavedSession* saved) {
  constexpr size_t kMaxPromptBytes = 1 << 20;
  if (flags.out.empty()) usage("--out: expected FILE.mp4 or a folder of PNG frames, found none");
  Plan plan;
  if (saved != nullptr) plan.session = saved->options;
  if (!flags.prompt_file.empty())
    plan.session.prompt = read_small_file(flags.prompt_file, kMaxPromptBytes);
  else if (!flags.prompt.empty() || saved == nullptr)
    plan.session.prompt = flags.prompt;
  if (plan.session.prompt.empty())
    usage(
        "--prompt: expected what the world looks like, such as \"a snowy land with a red tower "
        ".\", found none");
  if (flags.seed) plan.session.seed = *flags.seed;
  if (saved == nullptr || !flags.preset.empty() || !flags.method.empty())
    plan.session.method = choose_method(flags);
  apply_calibration(flags.calibration, folder, config, plan.session.method);
  expect_playable(plan.session.method, config, dtype);
  plan.actions = choose_actions(flags, saved, plan.next_action);
  plan.frames = choose_frames(flags, plan, saved != nullptr);
  const int64_t before = saved != nullptr ? saved->next_frame : 0;
  if (before + plan.frames > std::numeric_limits<int32_t>::max())
    usage(str("--frames: expected at most ", std::numeric_limits<int32_t>::max() - before,
              " more, found ", plan.frames));
  plan.session.expected_frames = before + plan.frames;
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

void warn_of_unknown_words(const Vocabulary& vocabulary, const std::string& prompt) {
  std::string words;
  for (const std::string& word : vocabulary.unknown_words(prompt))
    words += (words.empty() ? "" : ", ") + word;
  if (!words.empty())
    log(LogLevel::kWarning, "prompt: words that the model does not know: " + printable(words));
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

void print_summary(const RunStats& stats, const std::string& out) {
  const ChunkStats& last = stats.chunks.back();
  const auto mib = [](size_t bytes) { return static_cast<double>(bytes) / 0x1p20; };
  const size_t peak = peak_rss_bytes();
  const size_t named = stats.weight_bytes + last.cache_bytes + stats.workspace_bytes;
  fmt::print(stderr, "{}: {} frames, {:.1f} s of video\n", out, stats.chunks.size(),
             static_cast<double>(stats.chunks.size()) / stats.fps);
  fmt::print(stderr,
             "speed: {:.2f} frames/s on {} threads ({}), first frame {:.0f} ms after the start\n",
             stats.frames_per_second(), stats.threads, stats.dtype, stats.first_frame_ms);
  fmt::print(
      stderr,
      "peak memory: {:.0f} MiB = weights {:.0f} + cache {:.0f} + workspace {:.0f} + program, "
      "libraries and video encoder {:.0f}\n",
      mib(peak), mib(stats.weight_bytes), mib(last.cache_bytes), mib(stats.workspace_bytes),
      mib(peak > named ? peak - named : 0));
}

RunStats describe_run(const Context& ctx, const world::Model& model, const Session& session) {
  RunStats stats;
  stats.model = model.folder;
  stats.prompt = session.options().prompt;
  stats.method = session.options().method.to_string();
  stats.dtype = name_of(model.compute);
  stats.device = ctx.device().to_string();
  stats.threads = ctx.threads();
  stats.seed = session.options().seed;
  stats.num_steps = session.options().method.num_steps;
  stats.frame_width = model.config.transformer.frame_width();
  stats.frame_height = model.config.transformer.frame_height();
  stats.fps = world::kFramesPerSecond;
  stats.weight_bytes = model.weight_bytes;
  return stats;
}

// The next frame; an error says how many frames came before it, as the writer's own errors do.
View step(Session& session, CameraPosition camera, int64_t frames_made) {
  try {
    return session.step(camera);
  } catch (const Error& error) {
    throw Error(error.kind(), str(error.what(), "; stopped after ", frames_made, " frames"));
  }
}

// Frame after frame into the writer until all are made or someone asks for a stop.
void play(Session& session, Walk& walk, FrameWriter& writer, const Plan& plan, bool quiet,
          RunStats& stats) {
  Progress progress(plan.frames, quiet);
  const auto start = Clock::now();
  for (int64_t frame = 0; frame < plan.frames && stop_signal() == 0; ++frame) {
    const View rgb = step(session, walk.next(), frame);
    Stopwatch watch;
    writer.write(rgb.data<uint8_t>());
    ChunkStats chunk = session.last_chunk();
    chunk.write_ms = watch.lap_ms();
    stats.chunks.push_back(chunk);
    stats.wall_ms = ms_since(start);
    if (frame == 0) stats.first_frame_ms = ms_since(process_start);
    progress.show(frame + 1, chunk);
  }
  writer.close();
}

}  // namespace

int generate(const GenerateFlags& flags) {
  catch_stop_signals();
  const Device device = choose_device(flags.device);
  const DType dtype = choose_dtype(flags.dtype, device);
  const std::string folder = flags.model.empty() ? find_embedded_model() : flags.model;
  const world::Config config = world::read_config(folder);
  expect_size(flags.size, config.transformer);
  std::unique_ptr<SavedSession> saved;
  if (!flags.load_state.empty()) {
    if (!flags.init.empty()) usage("--init: expected a fresh session, found --load-state");
    saved = std::make_unique<SavedSession>(read_saved_session(flags.load_state));
  }
  const Plan plan = make_plan(flags, folder, config, dtype, saved.get());
  expect_room(plan, config, dtype);
  if (!flags.stats.empty()) expect_writable("--stats", flags.stats);
  if (!flags.save_state.empty()) expect_writable("--save-state", flags.save_state);

  Context ctx(device, static_cast<int>(flags.threads));
  const world::Model model = world::load_model(ctx, folder, dtype);
  if (!flags.quiet) warn_of_unknown_words(model.vocabulary, plan.session.prompt);
  Session session(ctx, model, plan.session);
  Walk walk(plan.actions, start_of(config.transformer), plan.next_action);
  if (saved != nullptr) {
    session.load(flags.load_state);
    if (session.camera()) walk.continue_from(*session.camera());
  }
  if (!flags.init.empty()) remember_init(flags.init, config.transformer, session, walk);

  RunStats stats = describe_run(ctx, model, session);
  const auto writer =
      open_frame_writer(flags.out, static_cast<int>(stats.frame_width),
                        static_cast<int>(stats.frame_height), world::kFramesPerSecond);
  play(session, walk, *writer, plan, flags.quiet, stats);
  stats.interrupted = stop_signal() != 0;
  stats.workspace_bytes = ctx.workspace().bytes_reserved();
  if (!flags.save_state.empty())
    session.save(flags.save_state, {{kNoteActions, overworld::format_actions(walk.actions())},
                                    {kNoteNextAction, std::to_string(walk.next_action())}});
  if (!flags.stats.empty()) write_file("--stats", flags.stats, stats.to_json());
  if (stats.interrupted)
    throw Error(str(stop_signal() == SIGINT ? "SIGINT" : "SIGTERM", ": expected ", plan.frames,
                    " frames, found a request to stop; ", writer->frames_written(), " kept in ",
                    flags.out));
  if (!flags.quiet) print_summary(stats, flags.out);
  return 0;
}

}  // namespace longtake::cli
