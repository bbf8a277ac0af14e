#include "command_line.h"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <charconv>
#include <iostream>
#include <limits>

#include "base/error.h"

namespace longtake::cli {
namespace {

constexpr int64_t kMostFrames = 10'000'000;
constexpr double kMostSeconds = 1e6;

// A check for CLI11: empty when fine, else what follows "--flag: ".
template <typename T>
CLI::Validator number_in(T min, T max, const std::string& kind) {
  return CLI::Validator(
      [=](const std::string& text) -> std::string {
        T value{};
        const char* end = text.data() + text.size();
        const auto result = std::from_chars(text.data(), end, value);
        if (result.ec == std::errc() && result.ptr == end && value >= min && value <= max)
          return {};
        return str("expected ", kind, " in ", min, "..", max, ", found \"", text, '"');
      },
      kind, "");
}

CLI::Validator integer_in(int64_t min, int64_t max) {
  return number_in<int64_t>(min, max, "an integer");
}

// A choice of which this version knows some: the others are names that exist and must wait.
CLI::Validator one_of(std::vector<std::string> known, std::vector<std::string> later) {
  return CLI::Validator(
      [=](const std::string& text) -> std::string {
        std::string expected;
        for (const std::string& name : known) {
          if (name == text) return {};
          expected += (expected.empty() ? "" : " or ") + name;
        }
        const bool known_later = std::find(later.begin(), later.end(), text) != later.end();
        return str("expected ", expected, known_later ? " in this version" : "", ", found \"", text,
                   '"');
      },
      "", "");
}

// What every command that plays takes.
template <typename Flags>
void add_device(CLI::App& app, Flags& flags) {
  app.add_option("--device", flags.device, "cpu | cuda[:N]");
  app.add_option("--threads", flags.threads, "CPU threads (default: all)")
      ->check(integer_in(1, 1024));
  app.add_option("--dtype", flags.dtype, "f32 | bf16 (default: bf16 where the CPU multiplies it)")
      ->check(one_of({"f32", "bf16"}, {"fp8", "int8"}));
}

void add_calibration(CLI::App& app, std::string& flag) {
  app.add_option("--calibration", flag,
                 "file of longtake calibrate (default: calibration.json beside the model, if there "
                 "is one)");
}

void add_generate(CLI::App& app, GenerateFlags& flags) {
  app.add_option("--model", flags.model,
                 "folder of a world model or of one of the Wan family, or a transformer's file of "
                 "the latter (default: the embedded world model)");
  auto* prompt = app.add_option("--prompt", flags.prompt, "what the world looks like, in words");
  app.add_option("--prompt-file", flags.prompt_file, "read the prompt from a file")
      ->excludes(prompt);
  app.add_option("--prompt-at", flags.prompt_at,
                 "FRAME:TEXT: another prompt from that frame on, in a Wan model from the first "
                 "chunk that begins there or later; may be given several times")
      ->allow_extra_args(false);
  auto* actions = app.add_option(
      "--actions", flags.actions,
      "where to go: w a s d (north, west, south, east), two for a diagonal, capitals fast, . to "
      "stay,"
      " *N to repeat: \"w*20 WD*40 .*5\" (default: a gentle tour; a short list starts again). "
      "Matrix-Game 2: w a s d to walk, i j k l to look, together as in wl");
  app.add_option("--actions-file", flags.actions_file, "read the actions from a file")
      ->excludes(actions);
  app.add_option(
      "--init", flags.init,
      "video or picture to start from; in the embedded model its frames follow the first actions, "
      "Matrix-Game 2 takes one picture and must have it");
  auto* frames =
      app.add_option("--frames", flags.frames, "frames to make (default: as many as the actions)")
          ->check(integer_in(1, kMostFrames));
  app.add_option("--seconds", flags.seconds, "length of the video instead of --frames")
      ->excludes(frames)
      ->check(number_in<double>(0.01, kMostSeconds, "a number"));
  app.add_option("--size", flags.size,
                 "WxH, multiples of 16 (default: 832x480, Matrix-Game 2 640x352); the embedded "
                 "model has one size");
  app.add_option("--seed", flags.seed, "noise seed (default 0)")
      ->check(number_in<uint64_t>(0, std::numeric_limits<uint64_t>::max(), "an integer"));
  app.add_option("--out", flags.out, "FILE.mp4, or a folder of PNG frames; must be given");

  app.add_option("--base-model", flags.base_model,
                 "Wan: folder with the text encoder, tokenizer and VAE that are not beside the "
                 "transformer");
  app.add_option("--rollout", flags.rollout,
                 "Wan: self-forcing | causal-forcing | causal-forcing-framewise | longlive | "
                 "longlive-infinite | rolling-forcing | matrix-game-2 | matrix-game-2-drive | "
                 "matrix-game-2-run (default: by the transformer's file)");
  app.add_option("--decoder", flags.decoder, "Wan: vae | taehv (default: vae if it is there)")
      ->check(one_of({"vae", "taehv"}, {}));
  app.add_option("--decoder-tile", flags.decoder_tile,
                 "Wan: decode pictures in overlapping squares of so many pixels, which takes less "
                 "memory (default: whole)");
  app.add_option("--save-prompt", flags.save_prompt, "Wan: file to save the encoded prompt in");
  app.add_option("--load-prompt", flags.load_prompt,
                 "Wan: such a file instead of a prompt; no text encoder is needed");

  app.add_option("--preset", flags.preset, "where the options below start: " + method_names());
  for (const MethodOption& option : method_options())
    app.add_option_function<std::string>(
        std::string("--") + option.key,
        [&flags, key = option.key](const std::string& value) {
          flags.method.emplace_back(key, value);
        },
        str(option.values, ": ", option.help));
  add_calibration(app, flags.calibration);
  add_device(app, flags);
  app.add_option("--save-state", flags.save_state, "file to save the session in at the end");
  app.add_option("--load-state", flags.load_state, "continue a saved session");
  app.add_option("--stats", flags.stats, "file for what every frame cost, as JSON");
  app.add_flag("--quiet", flags.quiet, "no progress, no summary");
}

void add_compare(CLI::App& app, CompareFlags& flags) {
  app.add_option("--model", flags.model, "model folder (default: the embedded world model)");
  app.add_option("--methods", flags.methods,
                 "separated by commas: " + method_names() +
                     ", each with :key=value for options of generate (default: " + flags.methods +
                     "); dense is always there");
  app.add_option("--prompts", flags.prompts,
                 "file of scenarios, \"PROMPT\" or \"ACTIONS | PROMPT\"");
  app.add_option("--maps", flags.maps,
                 "instead: so many maps of the world, whose truth is known (default: 2)")
      ->check(integer_in(1, 10'000));
  app.add_option("--first-map", flags.first_map, "seed of the first map (default: 600000)")
      ->check(number_in<uint64_t>(0, std::numeric_limits<uint64_t>::max() >> 1, "an integer"));
  app.add_option(
         "--route", flags.route,
         "exact | off-phase | steady: how the camera comes back over a map (default: exact)")
      ->check(one_of({"exact", "off-phase", "steady"}, {}));
  app.add_option("--frames", flags.frames, "of every scenario (default: 160)")
      ->check(integer_in(1, kMostFrames));
  add_calibration(app, flags.calibration);
  app.add_option("--mode", flags.mode, "lockstep | free | both (default: both)")
      ->check(one_of({"lockstep", "free", "both"}, {}));
  app.add_option("--probe-every", flags.probe_every,
                 "frames between lock-step probes (default: 16)")
      ->check(integer_in(1, kMostFrames));
  app.add_option("--score-every", flags.score_every,
                 "of so many probes one looks into attention, which takes longer (default: 3)")
      ->check(integer_in(1, kMostFrames));
  app.add_option("--full-frames", flags.full_frames,
                 "frames after which methods that keep the whole history stop, dense too: theirs "
                 "get ever dearer (default: none)")
      ->check(integer_in(1, kMostFrames));
  app.add_option("--jobs", flags.jobs,
                 "plays side by side, each on its share of the threads; times are then those of a "
                 "busy machine (default: 1)")
      ->check(integer_in(1, 1024));
  app.add_flag("--no-videos", flags.no_videos, "no videos of the first scenario");
  app.add_option("--out", flags.out,
                 "folder for report.html, report.json and videos; must be given");
  add_device(app, flags);
  app.add_flag("--quiet", flags.quiet, "the table only");
}

void add_calibrate(CLI::App& app, CalibrateFlags& flags) {
  app.add_option("--model", flags.model, "model folder (default: the embedded world model)");
  app.add_option("--method", flags.method,
                 "what is calibrated, a method with annsa (default: " + flags.method + ")");
  app.add_option("--maps", flags.maps, "maps of the world that are played (default: 2)")
      ->check(integer_in(1, 10'000));
  app.add_option("--first-map", flags.first_map, "seed of the first map (default: 610000)")
      ->check(number_in<uint64_t>(0, std::numeric_limits<uint64_t>::max() >> 1, "an integer"));
  app.add_option("--frames", flags.frames, "of every map (default: 112)")
      ->check(integer_in(1, kMostFrames));
  app.add_option("--probe-every", flags.probe_every, "frames between probes (default: 16)")
      ->check(integer_in(1, kMostFrames));
  app.add_option("--out", flags.out, "FILE.json (default: calibration.json beside the model)");
  add_device(app, flags);
  app.add_flag("--quiet", flags.quiet, "the table only");
}

void add_bench(CLI::App& app, BenchFlags& flags) {
  app.add_option("subject", flags.subject,
                 "attention | merge | index | linear: kernels, on random numbers; rollout: a frame "
                 "behind its history, by several methods; wan: a chunk of a Wan model, likewise")
      ->required()
      ->check(one_of({"attention", "merge", "index", "linear", "rollout", "wan"}, {}));
  app.add_option("--model", flags.model,
                 "of rollout: model folder (default: the embedded world model); of wan: such a "
                 "folder (default: random weights of the sizes of 1.3B, made for the run)");
  app.add_option("--methods", flags.methods,
                 "of rollout and wan, separated by commas: " + method_names() +
                     ", each with :key=value for options of generate (default of rollout: "
                     "dense,window:36,tempcache-lsh,all-lsh; of wan: dense, the model's own window "
                     "(\"own\"), tempcache-lsh and all-lsh with 8 and with 21 frames of keys)");
  app.add_option("--history", flags.histories,
                 "separated by commas; of rollout: frames remembered (default: 16,64); of wan: "
                 "latent frames so far, the chunk's own included (default: 21,60,120,240,750)")
      ->delimiter(',')
      ->check(integer_in(4, kMostFrames));
  app.add_option("--latents", flags.latents,
                 "of rollout: FILE.safetensors for what the first method made, for a peer to go on "
                 "from: latents [F, C, h, w], cameras [F, 2] in tokens");
  app.add_option("--size", flags.size, "of wan: WxH in pixels (default: 832x480)");
  app.add_option("--json", flags.json, "file for the same as JSON");
  add_device(app, flags);
}

// The first word must be a command; CLI11 would only say that one is missing.
void expect_command(const CLI::App& app, int argc, const char* const* argv) {
  const std::string word = argc > 1 ? argv[1] : "";
  const auto commands = app.get_subcommands([](const CLI::App*) { return true; });
  const bool known = std::any_of(commands.begin(), commands.end(), [&](const CLI::App* command) {
    return command->check_name(word);
  });
  if (known || word.rfind('-', 0) == 0) return;
  throw Error(
      ErrorKind::kUsage,
      str("command: expected generate, compare, calibrate, bench or inspect (see longtake --help), "
          "found ",
          word.empty() ? "none" : '"' + word + '"'));
}

// CLI11's own messages, in one line.
std::string one_line(std::string text) {
  std::replace(text.begin(), text.end(), '\n', ' ');
  return text;
}

}  // namespace

CommandLine parse_command_line(int argc, const char* const* argv) {
  CLI::App app(
      "longtake plays autoregressive video world models for hours at constant speed and memory",
      "longtake");
  app.set_version_flag("--version", std::string("longtake ") + LONGTAKE_VERSION);
  app.require_subcommand(1);
  GenerateFlags generate;
  CompareFlags compare;
  CalibrateFlags calibrate;
  BenchFlags bench;
  InspectFlags inspect;
  CLI::App* generate_app = app.add_subcommand("generate", "a prompt and actions become a video");
  add_generate(*generate_app, generate);
  CLI::App* compare_app = app.add_subcommand(
      "compare", "several methods play the same scenarios: speed, memory, and the error of both");
  add_compare(*compare_app, compare);
  CLI::App* calibrate_app = app.add_subcommand(
      "calibrate", "which layers and steps of a model should stay dense under sparse attention");
  add_calibrate(*calibrate_app, calibrate);
  CLI::App* bench_app =
      app.add_subcommand("bench", "how fast the parts are here, each beside its error");
  add_bench(*bench_app, bench);
  CLI::App* inspect_app =
      app.add_subcommand("inspect", "what is inside a model, a checkpoint or a saved state");
  inspect_app->add_option("path", inspect.path, "model folder, .safetensors file or state")
      ->required();
  std::vector<CLI::App*> later;
  for (const char* name : {"serve"})
    later.push_back(app.add_subcommand(name, "in a later version")->allow_extras()->group(""));

  expect_command(app, argc, argv);
  try {
    app.parse(argc, argv);
  } catch (const CLI::CallForHelp&) {
    std::cout << (generate_app->parsed()    ? generate_app
                  : compare_app->parsed()   ? compare_app
                  : calibrate_app->parsed() ? calibrate_app
                  : bench_app->parsed()     ? bench_app
                  : inspect_app->parsed()   ? inspect_app
                                            : &app)
                     ->help();
    return {};
  } catch (const CLI::CallForVersion&) {
    std::cout << app.version() << '\n';
    return {};
  } catch (const CLI::ParseError& error) {
    throw Error(ErrorKind::kUsage, one_line(error.what()));
  }
  for (const CLI::App* command : later) {
    if (command->parsed())
      throw Error(
          ErrorKind::kUsage,
          str("command: expected generate, compare, calibrate, bench or inspect in this version, ",
              "found ", command->get_name()));
  }
  CommandLine line;
  if (generate_app->parsed()) line.generate = std::move(generate);
  if (compare_app->parsed()) line.compare = std::move(compare);
  if (calibrate_app->parsed()) line.calibrate = std::move(calibrate);
  if (bench_app->parsed()) line.bench = std::move(bench);
  if (inspect_app->parsed()) line.inspect = std::move(inspect);
  return line;
}

}  // namespace longtake::cli
