// The binary as a person or a script meets it: good runs, bad input in one line with the right exit
// code, and interruptions that leave a playable video.
#include <sys/resource.h>

#include <nlohmann/json.hpp>

#include "base/error.h"
#include "cli_support.h"

namespace longtake {
namespace {

using namespace testing_support;

class Cli : public CliTest {
 protected:
  // generate on the tiny model with the scratch folder's v.mp4 as output, plus `extra`.
  Args generate(const Args& extra, const std::string& model = kTinyModel) const {
    Args args = {"generate",  "--model", model,   "--prompt",        "a winter land",
                 "--threads", "1",       "--out", scratch_ / "v.mp4"};
    args.insert(args.end(), extra.begin(), extra.end());
    return args;
  }

  static int count_frames(const std::string& path) { return CliTest::count_frames(path, 256, 128); }
};

TEST_F(Cli, MakesAVideoAndItsStatistics) {
  const Result result = run(generate({"--actions", "d*3 W*2", "--stats", scratch_ / "s.json"}));
  ASSERT_EQ(result.code, 0) << result.err;
  EXPECT_EQ(count_frames(scratch_ / "v.mp4"), 6);
  const auto stats = nlohmann::json::parse(read_text(scratch_ / "s.json"));
  EXPECT_EQ(stats["chunks"].size(), 6U);
  EXPECT_EQ(stats["threads"], 1);
  EXPECT_GT(stats["chunks"][5]["denoise_ms"], 0);
  EXPECT_NE(result.err.find("peak memory"), std::string::npos) << result.err;
  EXPECT_TRUE(result.out.empty());
}

TEST_F(Cli, MakesAFolderOfPicturesQuietly) {
  Args args =
      generate({"--seconds", "0.25", "--quiet", "--memory", "window", "--memory-budget", "256"});
  args[8] = scratch_ / "frames";
  const Result result = run(args);
  ASSERT_EQ(result.code, 0) << result.err;
  EXPECT_EQ(result.err, "");
  EXPECT_EQ(count_frames(scratch_ / "frames"), 4);
}

TEST_F(Cli, ResumesWhereItStopped) {
  const auto frames_of = [&](const Args& extra, const std::string& folder) {
    Args args = generate(extra);
    args[8] = scratch_ / folder;
    const Result result = run(args);
    EXPECT_EQ(result.code, 0) << result.err;
  };
  const std::string state = scratch_ / "state";
  frames_of({"--actions", "d*2 W*3", "--frames", "8"}, "whole");
  frames_of({"--actions", "d*2 W*3", "--frames", "5", "--save-state", state}, "first");
  const Result resumed = run({"generate", "--model", kTinyModel, "--threads", "1", "--frames", "3",
                              "--load-state", state, "--out", scratch_ / "rest"});
  ASSERT_EQ(resumed.code, 0) << resumed.err;
  for (int i = 0; i < 3; ++i)
    EXPECT_EQ(read_text(scratch_ / ("whole/frame_00000" + std::to_string(5 + i) + ".png")),
              read_text(scratch_ / ("rest/frame_00000" + std::to_string(i) + ".png")));
  const Result inspected = run({"inspect", state});
  EXPECT_EQ(inspected.code, 0);
  EXPECT_NE(inspected.out.find("next frame 5"), std::string::npos) << inspected.out;
}

TEST_F(Cli, StartsFromAVideo) {
  ASSERT_EQ(run(generate({"--frames", "3"})).code, 0);
  Args args = generate({"--frames", "2", "--init", scratch_ / "v.mp4"});
  args[8] = scratch_ / "w.mp4";
  const Result result = run(args);
  ASSERT_EQ(result.code, 0) << result.err;
  EXPECT_EQ(count_frames(scratch_ / "w.mp4"), 2);
}

TEST_F(Cli, Inspects) {
  const Result model = run({"inspect", kTinyModel});
  EXPECT_EQ(model.code, 0) << model.err;
  for (const char* part :
       {"complete", "256 x 128", "transformer.blocks.*.self_attn.q.weight", "total: "})
    EXPECT_NE(model.out.find(part), std::string::npos) << part;
  const Result weights = run({"inspect", std::string(kTinyModel) + "/model.safetensors"});
  EXPECT_NE(weights.out.find("model.safetensors: safetensors"), std::string::npos) << weights.out;
  const Result torch = run({"inspect", "fuzz/corpus/torch_file/training"});
  EXPECT_NE(torch.out.find("training: PyTorch checkpoint"), std::string::npos) << torch.out;
  EXPECT_NE(torch.out.find("generator_ema: model._fsdp_wrapped_module.w"), std::string::npos)
      << torch.out;
  expect_failure({"inspect", scratch_ / "nothing"}, 3, "No such file");
}

TEST_F(Cli, WrongUsageIsOneLineAndExitCode2) {
  expect_failure({}, 2, "command: expected generate, compare, calibrate, bench or inspect");
  expect_failure({"direct"}, 2, "found \"direct\"");
  expect_failure({"serve", "--port", "1"}, 2, "found serve");
  expect_failure({"generate"}, 2, "--out");
  expect_failure(generate({"--colour", "red"}), 2, "--colour");
  expect_failure({"generate", "--model", kTinyModel, "--out", scratch_ / "v.mp4"}, 2,
                 "--prompt: expected");
  expect_failure({"generate", "--model", kTinyModel, "--prompt", " ", "--out", scratch_ / "v.mp4"},
                 2, "prompt: expected");
  std::string long_prompt;
  for (int i = 0; i < 400; ++i) long_prompt += "land ";
  expect_failure(
      {"generate", "--model", kTinyModel, "--prompt", long_prompt, "--out", scratch_ / "v.mp4"}, 2,
      "at most 384");
  expect_failure(generate({"--actions", "d*3 q"}), 2, "q");
  expect_failure(generate({"--frames", "0"}), 2, "--frames: expected an integer in 1..");
  expect_failure(generate({"--frames", "3x"}), 2, "found \"3x\"");
  expect_failure(generate({"--frames", "3", "--seconds", "2"}), 2, "excludes");
  expect_failure(generate({"--size", "-4x9"}), 2, "--size: expected 256x128");
  expect_failure(generate({"--size", "512x256"}), 2, "--size: expected 256x128");
  expect_failure(generate({"--threads", "0"}), 2, "--threads");
  expect_failure(generate({"--memory", "flowcache", "--memory-budget", "7"}), 2,
                 "memory-budget: expected at least");
  expect_failure(generate({"--memory", "elephant"}), 2,
                 "expected full or window or tempcache or flowcache, found \"elephant\"");
  expect_failure(generate({"--preset", "fast"}), 2, "--method: expected dense | window");
  expect_failure(generate({"--self-attention", "sparse"}), 2,
                 "--self-attention: expected dense or annsa");
  expect_failure(generate({"--cross-attention", "sparse"}), 2,
                 "--cross-attention: expected dense or annca");
  expect_failure(generate({"--prompt-density", "0.2"}), 2,
                 "--prompt-density: expected cross-attention=annca beside it");
  expect_failure(generate({"--step-cache", "tea"}), 2,
                 "--step-cache: expected none or teacache or flowcache");
  expect_failure(generate({"--step-threshold", "1"}), 2,
                 "--step-threshold: expected step-cache=teacache");
  expect_failure(
      generate({"--ann", "lsh"}), 2,
      "--ann: expected memory=tempcache | self-attention=annsa | cross-attention=annca beside it");
  expect_failure(generate({"--ann", "tree"}), 2, "expected lsh or quant");
  expect_failure(generate({"--memory", "tempcache", "--merge-threshold", "-1"}), 2,
                 "--merge-threshold");
  expect_failure(
      generate({"--memory", "tempcache", "--merge-rule", "paper", "--merge-threshold", "2"}), 2,
      "--merge-threshold: expected a number in 0..1, found \"2\"");
  expect_failure(generate({"--memory", "tempcache", "--memory-budget", "767"}), 2,
                 "at least 768 keys per head");
  expect_failure(generate({"--density", "0.2"}), 2,
                 "--density: expected self-attention=annsa beside it");
  expect_failure(generate({"--preset", "annsa", "--density", "1.5"}), 2, "--density: expected");
  expect_failure(generate({"--dtype", "fp8"}), 2, "in this version");
  expect_failure(generate({"--decoder", "taehv"}), 2,
                 "--decoder: expected a model of the Wan family, found a world model");
  expect_failure(generate({"--frames", "3", "--prompt-at", "3:an autumn land"}), 2,
                 "--prompt-at: expected FRAME:TEXT with a frame in 1..2");
  expect_failure(generate({"--prompt-at", "3:a", "--prompt-at", "3:b"}), 2, "found two");
  expect_failure(generate({"--prompt-at", "3:" + long_prompt}), 2, "at most 384");
  expect_failure(generate({"--device", "tpu"}), 2, "--device: expected cpu, cuda or cuda:N");
  expect_failure(generate({"--device", "cuda:x"}), 2, "--device: expected cpu, cuda or cuda:N");
  // A build without CUDA and a machine without that GPU both say what they lack.
  expect_failure(generate({"--device", "cuda:99"}), 2, ": expected ");
  expect_failure(
      generate({"--memory-budget", "256"}), 2,
      "--memory-budget: expected memory=window | memory=tempcache | memory=flowcache beside it");
  expect_failure(generate({"--memory", "window", "--memory-budget", "255"}), 2,
                 "room for 2 frames");
  expect_failure(generate({"--memory", "window", "--memory-budget", "lots"}), 2, "64MiB");
  expect_failure(generate({"--memory", "window", "--memory-budget", "640", "--window-frames", "4"}),
                 2, "--memory-budget: expected no window-frames beside it, found 4");
  expect_failure(generate({"--frames", "10000000"}), 2, "--memory full");
  EXPECT_FALSE(std::filesystem::exists(scratch_ / "v.mp4")) << "a refused run leaves nothing";
}

TEST_F(Cli, CompareWritesATableAndReports) {
  const std::string out = scratch_ / "report";
  write_text(scratch_ / "prompts.txt",
             "# two scenarios\nD*2 A*2 | a winter land .\nan autumn land .\n");
  const Result result = run({"compare",
                             "--model",
                             kTinyModel,
                             "--prompts",
                             scratch_ / "prompts.txt",
                             "--frames",
                             "6",
                             "--probe-every",
                             "2",
                             "--score-every",
                             "1",
                             "--methods",
                             "window:2,all-lsh:exact-frames=1",
                             "--out",
                             out,
                             "--threads",
                             "2",
                             "--jobs",
                             "2",
                             "--full-frames",
                             "5",
                             "--quiet"});
  ASSERT_EQ(result.code, 0) << result.err;
  for (const char* name : {"dense", "window:2", "all-lsh:exact-frames=1"})
    EXPECT_NE(result.out.find(name), std::string::npos) << result.out;
  const auto report = nlohmann::json::parse(read_text(out + "/report.json"));
  EXPECT_EQ(report["scenarios"], 2);
  ASSERT_EQ(report["methods"].size(), 3U);
  EXPECT_TRUE(report["methods"][0]["free"]["psnr"].is_null()) << "dense against itself";
  EXPECT_TRUE(report["methods"][1]["free"]["psnr"].is_number());
  EXPECT_TRUE(report["methods"][1]["lockstep"]["psnr"].is_number());
  EXPECT_EQ(report["methods"][1]["series"]["ms"].size(), 6U);
  EXPECT_TRUE(report["methods"][0]["series"]["ms"][5].is_null()) << "dense stopped";
  EXPECT_TRUE(report["methods"][1]["series"]["ms"][5].is_number());
  EXPECT_TRUE(report["methods"][1]["lockstep"]["attention"]["recall"].is_number());
  EXPECT_EQ(report["methods"][1]["by_scenario"]["psnr"].size(), 2U);
  EXPECT_EQ(report["scenario_names"][0], "line 2");
  EXPECT_EQ(report["threads"], 1);
  EXPECT_EQ(report["jobs"], 2);
  EXPECT_NE(result.out.find("2 plays side by side"), std::string::npos) << result.out;
  const std::string page = read_text(out + "/report.html");
  EXPECT_NE(page.find("data:video/mp4;base64,"), std::string::npos);
  EXPECT_EQ(page.find("http"), std::string::npos) << "the page needs no network";
}

TEST_F(Cli, CompareRefusesBadInput) {
  const auto compare = [&](const Args& more) {
    Args args = {"compare", "--model", kTinyModel, "--out", scratch_ / "report"};
    args.insert(args.end(), more.begin(), more.end());
    return args;
  };
  expect_failure({"compare", "--model", kTinyModel}, 2, "--out: expected a folder");
  expect_failure(compare({"--methods", "dense,windows"}), 2,
                 "--methods: \"windows\": method: expected dense | window");
  expect_failure(compare({"--methods", "window:1:sink-frames=1"}), 2, "room for 2 frames");
  expect_failure(compare({"--frames", "20"}), 2, "--frames: expected more than the 32 given ones");
  expect_failure(compare({"--full-frames", "32"}), 2, "--full-frames: expected more than the 32");
  expect_failure(compare({"--threads", "2", "--jobs", "3"}), 2,
                 "--jobs: expected at most as many as there are threads, 2, found 3");
  write_text(scratch_ / "prompts.txt", "a winter land .\nd*3 q | a land .\n");
  expect_failure(compare({"--prompts", scratch_ / "prompts.txt"}), 3, "line 2");
  write_text(scratch_ / "prompts.txt", "# nothing\n");
  expect_failure(compare({"--prompts", scratch_ / "prompts.txt"}), 3, "at least one prompt");
  expect_failure(compare({"--prompts", scratch_ / "prompts.txt", "--maps", "3"}), 2, "--maps");
}

TEST_F(Cli, CalibratesAndPlaysCalibrated) {
  const std::string folder = copy_tiny_model(scratch_);
  const Result result = run({"calibrate", "--model", folder, "--maps", "1", "--frames", "37",
                             "--probe-every", "4", "--method", "annsa-quant:density=0", "--quiet"});
  ASSERT_EQ(result.code, 0) << result.err;
  EXPECT_EQ(result.err, "");
  EXPECT_NE(result.out.find("at 1 probes"), std::string::npos) << result.out;
  const auto file = nlohmann::json::parse(read_text(folder + "/calibration.json"));
  EXPECT_EQ(file["layers"].size(), 2U);
  const Result inspected = run({"inspect", folder});
  EXPECT_NE(inspected.out.find(result.out), std::string::npos) << inspected.out;

  const auto dense_layers = [&](const Args& extra) {
    Args args = {"--frames", "1", "--stats", scratch_ / "s.json"};
    args.insert(args.end(), extra.begin(), extra.end());
    const Result played = run(generate(args, folder));
    EXPECT_EQ(played.code, 0) << played.err;
    const std::string method = nlohmann::json::parse(read_text(scratch_ / "s.json"))["method"];
    const std::string key = "dense-layers=";
    const size_t at = method.find(key) + key.size();
    return method.substr(at, method.find(':', at) - at);
  };
  // A file named by a flag counts before the one beside the model.
  auto other = file;
  for (const bool first : {false, true}) {
    other["layers"][0]["dense"] = first;
    other["layers"][1]["dense"] = !first;
    write_text(first ? folder + "/calibration.json" : scratch_ / "other.json", other.dump(2));
  }
  EXPECT_EQ(dense_layers({"--preset", "annsa"}), "0");
  EXPECT_EQ(dense_layers({"--preset", "annsa", "--calibration", scratch_ / "other.json"}), "1");
  EXPECT_EQ(dense_layers({"--preset", "annsa", "--dense-layers", "none"}), "none");

  replace_in_file(folder + "/calibration.json", "\"model_fingerprint\": \"",
                  "\"model_fingerprint\": \"0");
  expect_failure(generate({"--preset", "annsa"}, folder), 3,
                 "calibration.json: expected a calibration of these weights");
  EXPECT_EQ(run(generate({"--frames", "1", "--quiet"}, folder)).code, 0) << "dense needs none";
  expect_failure(generate({"--preset", "annsa", "--calibration", scratch_ / "none.json"}), 3,
                 "none.json");
  expect_failure(generate({"--preset", "annsa", "--dense-layers", "2"}), 2,
                 "dense-layers: expected indices in 0..1, found 2");
  expect_failure({"calibrate", "--model", kTinyModel, "--frames", "36", "--probe-every", "4"}, 2,
                 "--frames: expected more than the 32 given ones and the 4 up to the first probe");
  expect_failure({"calibrate", "--model", kTinyModel, "--method", "window"}, 2,
                 "--method: expected one with annsa, found window");
  expect_failure({"calibrate", "--model", kTinyModel, "--out", scratch_ / "no/c.json"}, 2,
                 "--out: expected a writable file");
}

TEST_F(Cli, UnwritablePlacesAreFoundAtTheStart) {
  const std::string nowhere = scratch_ / "no/such/folder/v.mp4";
  Args args = generate({"--frames", "2"});
  args[8] = nowhere;
  const Result result = run(args);
  EXPECT_TRUE(result.code == 1 || result.code == 2) << result.err;
  EXPECT_NE(result.err.find("v.mp4"), std::string::npos) << result.err;
  expect_failure(generate({"--stats", scratch_ / "no/s.json"}), 2,
                 "--stats: expected a writable file");
  expect_failure(generate({"--save-state", scratch_ / "no/state"}), 2, "--save-state");
}

TEST_F(Cli, BadInputFilesAreExitCode3) {
  expect_failure(generate({}, scratch_ / "none"), 3, "expected a world model's config.json or");
  expect_failure({"generate", "--prompt-file", scratch_ / "none", "--out", scratch_ / "v.mp4",
                  "--model", kTinyModel},
                 3, "none");
  expect_failure(generate({"--init", scratch_ / "none.mp4"}), 3, "none.mp4");
  expect_failure(generate({"--load-state", std::string(kTinyModel) + "/model.safetensors"}), 3,
                 "kind");

  const std::string folder = copy_tiny_model(scratch_);
  const std::string weights = folder + "/model.safetensors";
  const std::string whole = read_text(weights);
  const auto expect_bad_weights = [&](const std::string& text, const std::string& part) {
    write_text(weights, text);
    expect_failure(generate({"--frames", "1"}, folder), 3, part);
  };
  expect_bad_weights(whole.substr(0, whole.size() - 1000), "truncated");
  expect_bad_weights(whole.substr(0, 5), "at least 8 bytes");
  std::string huge = whole;
  huge[7] = 0x10;  // a header of 2^60 bytes
  expect_bad_weights(huge, "header within the file");
  expect_bad_weights("", "at least 8 bytes");
  std::string renamed = whole;
  renamed.replace(renamed.find("patch_embedding.bias"), 5, "Patch");
  expect_bad_weights(renamed,
                     "transformer.patch_embedding.bias: expected [64], found no such tensor");
  std::string retyped = whole;
  const size_t dtype = retyped.find("\"F32\"", retyped.find("latent_mean"));
  retyped.replace(dtype, 5, "\"I32\"");
  expect_bad_weights(retyped, "expected floating point [16], found i32 [16]");
  write_text(weights, whole);
  replace_in_file(folder + "/config.json", "\"dim\": 64", "\"dim\": \"x\"");
  expect_failure(generate({"--frames", "1"}, folder), 3, "dim: expected an integer");
}

TEST_F(Cli, ASignalLeavesAPlayableVideoStatisticsAndState) {
  for (const int signal : {SIGTERM, SIGINT}) {
    const std::string err = scratch_ / "stderr";
    const Process process(
        generate({"--frames", "100000", "--memory", "window", "--memory-budget", "256", "--stats",
                  scratch_ / "s.json", "--save-state", scratch_ / "state"}),
        scratch_ / "stdout", err);
    wait_for_bytes(scratch_ / "v.mp4", 10000);
    process.send(signal);
    EXPECT_EQ(process.wait(), 1);
    const std::string text = read_text(err);
    EXPECT_NE(text.find(signal == SIGINT ? "SIGINT: expected" : "SIGTERM: expected"),
              std::string::npos)
        << text;
    const auto stats = nlohmann::json::parse(read_text(scratch_ / "s.json"));
    EXPECT_TRUE(stats["interrupted"]);
    EXPECT_EQ(static_cast<size_t>(count_frames(scratch_ / "v.mp4")), stats["chunks"].size());
    EXPECT_EQ(run({"inspect", scratch_ / "state"}).code, 0);
    std::filesystem::remove(scratch_ / "v.mp4");
  }
}

TEST_F(Cli, AKilledRunLeavesAPlayableVideo) {
  const Process process(
      generate({"--frames", "100000", "--memory", "window", "--memory-budget", "256"}),
      scratch_ / "stdout", scratch_ / "stderr");
  wait_for_bytes(scratch_ / "v.mp4", 100000);
  process.send(SIGKILL);
  EXPECT_EQ(process.wait(), -SIGKILL);
  // The kill may cut the write of the newest frames; those before it play.
  const auto reader = open_frame_reader(scratch_ / "v.mp4");
  Frame frame;
  int count = 0;
  try {
    while (reader->read(frame)) ++count;
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("truncated?"), std::string::npos) << error.what();
  }
  EXPECT_GT(count, 0);
}

TEST_F(Cli, AFullDiskIsOneLineAndLeavesAPlayableVideo) {
  const auto limit = [] {  // no file may grow beyond this: writes fail as on a full disk
    const rlimit size{200000, 200000};
    setrlimit(RLIMIT_FSIZE, &size);
  };
  const Result result = run(
      generate({"--frames", "100000", "--quiet", "--memory", "window", "--memory-budget", "256"}),
      limit);
  EXPECT_EQ(result.code, 1) << result.err;
  EXPECT_EQ(std::count(result.err.begin(), result.err.end(), '\n'), 1) << result.err;
  EXPECT_NE(result.err.find("v.mp4"), std::string::npos) << result.err;
  EXPECT_NE(result.err.find("frames are kept\n"), std::string::npos) << "said once: " << result.err;
  EXPECT_GT(count_frames(scratch_ / "v.mp4"), 0);
}

}  // namespace
}  // namespace longtake
