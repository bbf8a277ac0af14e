// The binary with a model of the Wan family: a tiny one with random weights, written once.
#include <utility>

#include "cli_model_support.h"

namespace longtake {
namespace {

using namespace testing_support;

class CliWan : public CliModelTest {
 protected:
  static void SetUpTestSuite() { write_model("tiny"); }
};

TEST_F(CliWan, MakesAVideoAndItsStatistics) {
  const Result result =
      run(generate({"--prompt", "a fox", "--frames", "23", "--stats", scratch_ / "s.json"}));
  ASSERT_EQ(result.code, 0) << result.err;
  EXPECT_EQ(count_frames(scratch_ / "v.mp4", 48, 32), 23);
  EXPECT_NE(result.err.find("23 frames, 1.4 s of video"), std::string::npos) << result.err;
  const auto found = stats();
  ASSERT_EQ(found["chunks"].size(), 3U);
  const int frames[] = {9, 12, 2};  // 1 + 4 + 4, 4 + 4 + 4, what is left
  for (size_t i = 0; i < 3; ++i) EXPECT_EQ(found["chunks"][i]["frames"], frames[i]);
  EXPECT_EQ(found["chunks"][2]["first_frame"], 21);
  EXPECT_EQ(found["steps"], 4);
  EXPECT_GT(found["chunks"][1]["decode_ms"], 0);
  EXPECT_EQ(found["method"],
            "memory=window:sink-frames=0:window-frames=18:memory-budget=0:self-attention=dense:"
            "cross-attention=dense:step-cache=none:steps=4");
}

// Every family with every method that can serve it.
TEST_F(CliWan, PlaysEveryFamilyAndMethod) {
  for (const char* family : {"self-forcing", "causal-forcing-framewise", "longlive",
                             "longlive-infinite", "rolling-forcing"}) {
    const bool moves_sink = family == std::string("longlive-infinite") || family[0] == 'r';
    for (const char* method : {"window", "tempcache-quant", "annsa-lsh", "annca-quant", "all-lsh",
                               "dense", "flowcache"}) {
      const bool keeps_no_sink = method == std::string("dense") || method[0] == 'f';
      Args args = {"--prompt",  "a",
                   "--rollout", family,
                   "--preset",  method,
                   "--decoder", "taehv",
                   "--steps",   "2",
                   "--frames",  "90",
                   "--stats",   scratch_ / "s.json"};
      if (method[0] == 'f') args.insert(args.end(), {"--step-cache", "none"});
      if (keeps_no_sink && moves_sink) {
        expect_failure(generate(args), 2,
                       "--memory: expected window or tempcache, which keep apart the sink");
        continue;
      }
      const Result result = run(generate(args));
      ASSERT_EQ(result.code, 0) << family << ' ' << method << ": " << result.err;
      const auto last = stats()["chunks"].back();
      if (method == std::string("dense")) {
        EXPECT_EQ(last["density"], 1) << family;
      } else if (method != std::string("annca-quant")) {
        EXPECT_LT(last["density"], 1) << family << ' ' << method;
      }
      if (method == std::string("tempcache-quant")) {
        EXPECT_GT(last["merged_keys"].get<int>() + last["evicted_keys"].get<int>(), 0) << family;
      }
    }
  }
}

TEST_F(CliWan, ASavedPromptPlaysTheSame) {
  const std::string saved = scratch_ / "prompt.safetensors";
  play({"--prompt", "a fox", "--frames", "2", "--save-prompt", saved}, "words");
  play({"--load-prompt", saved, "--frames", "2"}, "loaded");
  play({"--prompt", "a hen", "--frames", "2"}, "other");
  EXPECT_EQ(picture("words", 1), picture("loaded", 1));
  EXPECT_NE(picture("words", 1), picture("other", 1));
  expect_failure(generate({"--load-prompt", saved, "--prompt", "a"}), 2, "--load-prompt");
  expect_failure(generate({"--load-prompt", model() + "/taew2_1.safetensors"}), 3,
                 "expected prompt_embeds of 1..512 x 64, found no such tensor");
}

TEST_F(CliWan, AnotherPromptTakesOverAtTheNextChunk) {
  for (const char* family : {"self-forcing", "longlive", "rolling-forcing"}) {
    SCOPED_TRACE(family);
    const Args base = {"--prompt", "a fox", "--frames", "22", "--rollout", family};
    Args with = base;
    with.insert(with.end(), {"--prompt-at", "10:a hen"});
    play(base, "one");
    play(with, "two");
    EXPECT_EQ(picture("one", 20), picture("two", 20)) << "of the chunk that frame 10 lies in";
    EXPECT_NE(picture("one", 21), picture("two", 21));
  }
}

TEST_F(CliWan, StartsFromAPictureOrAVideo) {
  play({"--prompt", "a", "--frames", "9"}, "given");
  for (const char* decoder : {"vae", "taehv"}) {
    for (const char* family : {"self-forcing", "longlive-infinite", "rolling-forcing"}) {
      SCOPED_TRACE(std::string(decoder) + " " + family);
      const Args base = {"--prompt", "a",         "--frames", "13",      "--decoder",
                         decoder,    "--rollout", family,     "--stats", scratch_ / "s.json"};
      Args video = base, picture_only = base;
      video.insert(video.end(), {"--init", scratch_ / "given"});
      picture_only.insert(picture_only.end(), {"--init", scratch_ / "given/frame_000003.png"});
      play(base, "plain");
      play(video, "video");
      EXPECT_EQ(stats()["chunks"][0]["frames"], 12) << "no latent is a single frame any more";
      play(picture_only, "picture");
      EXPECT_NE(picture("video", 0), picture("plain", 0));
      EXPECT_NE(picture("video", 0), picture("picture", 0));
    }
  }
  expect_failure(generate({"--prompt", "a", "--init", scratch_ / "none.png"}), 3, "none.png");
}

TEST_F(CliWan, TheNumberOfStepsIsAFlag) {
  for (const char* family : {"longlive", "rolling-forcing"}) {
    play({"--prompt", "a", "--frames", "1", "--steps", "2", "--rollout", family, "--stats",
          scratch_ / "s.json"},
         "steps");
    EXPECT_EQ(stats()["steps"], 2);
  }
}

TEST_F(CliWan, LongPromptsAreCutWithAWarning) {
  std::string prompt;
  for (int i = 0; i < 120; ++i) prompt += "word" + std::to_string(100 + i) + ' ';
  const Result result = run(generate({"--prompt", prompt, "--frames", "1"}));
  EXPECT_EQ(result.code, 0) << result.err;
  EXPECT_NE(result.err.find("warning: prompt: expected at most 512 tokens, found 961; left out "
                            "from: "),
            std::string::npos)
      << result.err;
  EXPECT_NE(result.err.find(" word164 word165"), std::string::npos) << result.err;
}

TEST_F(CliWan, BadInputIsOneLineBeforeAnythingSlow) {
  const Args prompt = {"--prompt", "a"};
  const auto refuse = [&](Args extra, int code, const std::string& part) {
    extra.insert(extra.end(), prompt.begin(), prompt.end());
    expect_failure(generate(extra), code, part);
  };
  expect_failure(generate({}), 2, "--prompt: expected what the video shows");
  for (const char* flag : {"--actions", "--save-state", "--load-state", "--calibration"})
    refuse({flag, "x"}, 2, std::string(flag) + ": expected a world model");
  refuse({"--rollout", "teacher"}, 2, "--rollout: expected self-forcing, ");
  refuse({"--step-cache", "teacache"}, 2, "--step-cache: expected none");
  refuse({"--prompt-at", "81:b"}, 2, "--prompt-at: expected FRAME:TEXT with a frame in 1..80");
  refuse({"--rollout", "rolling-forcing", "--window-frames", "17"}, 2,
         "--window-frames: expected at least 18");
  refuse({"--rollout", "rolling-forcing", "--preset", "annsa", "--dense-steps", "1"}, 2,
         "--dense-steps: expected auto or none");
  refuse({"--preset", "tempcache", "--memory-budget", "5"}, 2,
         "--memory budget: expected at least 24 keys per head");
  refuse({"--memory", "full", "--frames", "10000000"}, 2, "--memory window or fewer --frames");
  refuse({"--base-model", scratch_ / "none", "--save-prompt", scratch_ / "no/p"}, 2,
         "--save-prompt: expected a writable file");
  Args large = generate(prompt);
  large[4] = "16384x16384";
  expect_failure(large, 2, "--size, --decoder-tile or --decoder taehv lowers it), found ");
  for (const char* size : {"48x33", "0x32", "x", "48x32x2", "16400x32"}) {
    large[4] = size;
    expect_failure(large, 2, "--size: expected WxH in multiples of 16");
  }
  EXPECT_FALSE(std::filesystem::exists(scratch_ / "v.mp4")) << "a refused run leaves nothing";
}

TEST_F(CliWan, MissingPartsAreNamed) {
  const std::string alone = scratch_ / "alone";
  Context ctx({}, 1);
  wan::write_random_model(ctx, alone,
                          {.size = "tiny", .dtype = DType::kF32, .transformer_only = true});
  const auto with = [&](const Args& extra) {
    Args args = generate(extra);
    args[2] = alone;
    return args;
  };
  expect_failure(with({"--prompt", "a"}), 3, "expected Wan2.1_VAE.pth or taew2_1.pth beside it");
  std::filesystem::copy_file(model() + "/taew2_1.safetensors", alone + "/taew2_1.safetensors");
  expect_failure(with({"--prompt", "a"}), 3, "expected models_t5_umt5-xxl-enc-bf16.pth beside it");
  expect_failure(with({"--prompt", "a", "--decoder", "vae"}), 3, "expected Wan2.1_VAE.pth beside");
  expect_failure(with({"--prompt", "a", "--decoder-tile", "100"}), 2,
                 "--decoder-tile: expected a multiple of 8 from 64 to ");
  EXPECT_EQ(
      run(with({"--prompt", "a", "--frames", "1", "--base-model", model(), "--decoder-tile", "64"}))
          .code,
      0);

  // The layout of a maker's folder, with the base model where their code wants it.
  std::filesystem::create_directories(scratch_ / "maker/models");
  std::filesystem::create_directories(scratch_ / "maker/wan_models");
  std::filesystem::copy_file(alone + "/diffusion_pytorch_model.safetensors",
                             scratch_ / "maker/models/longlive_base.pt");
  std::filesystem::create_directory_symlink(model(), scratch_ / "maker/wan_models/Wan2.1-T2V-1.3B");
  for (const char* path : {"maker", "maker/models/longlive_base.pt"}) {
    Args args = generate({"--prompt", "a", "--frames", "1", "--stats", scratch_ / "s.json"});
    args[2] = scratch_ / path;
    const Result result = run(args);
    EXPECT_EQ(result.code, 0) << result.err;
    const std::string method = stats()["method"];
    EXPECT_EQ(method.rfind("memory=window:sink-frames=3:window-frames=9:", 0), 0U) << method;
  }

  std::filesystem::resize_file(alone + "/diffusion_pytorch_model.safetensors", 100'000);
  expect_failure(with({"--prompt", "a"}), 3, "truncated");
  std::filesystem::remove(alone + "/diffusion_pytorch_model.safetensors");
  expect_failure(with({"--prompt", "a"}), 3, "config.json");
}

TEST_F(CliWan, ASignalLeavesAPlayableVideoAndStatistics) {
  const std::string err = scratch_ / "stderr";
  const Process process(generate({"--prompt", "a", "--frames", "1000000", "--decoder", "taehv",
                                  "--stats", scratch_ / "s.json"}),
                        scratch_ / "stdout", err);
  wait_for_bytes(scratch_ / "v.mp4", 10000);
  process.send(SIGTERM);
  EXPECT_EQ(process.wait(), 1);
  EXPECT_NE(read_text(err).find("SIGTERM: expected 1000000 frames"), std::string::npos)
      << read_text(err);
  const auto found = stats();
  EXPECT_TRUE(found["interrupted"]);
  int64_t frames = 0;
  for (const auto& chunk : found["chunks"]) frames += chunk["frames"].get<int64_t>();
  EXPECT_EQ(count_frames(scratch_ / "v.mp4", 48, 32), frames);
}

}  // namespace
}  // namespace longtake
