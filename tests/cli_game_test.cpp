// The binary with a Matrix-Game 2 model: a tiny one with random weights, written once.
#include <filesystem>
#include <string>
#include <vector>

#include "cli_model_support.h"
#include "io/checkpoint.h"
#include "io/safetensors.h"
#include "media/frame_writer.h"

namespace longtake {
namespace {

using namespace testing_support;

class CliGame : public CliModelTest {
 protected:
  static void SetUpTestSuite() { write_model("matrix-game-2-tiny"); }

  // A picture 30 pixels wide and 40 high.
  CliGame() {
    const auto writer = open_frame_writer(scratch_ / "given", 30, 40, 1);
    std::vector<uint8_t> rgb(30 * 40 * 3);
    for (size_t i = 0; i < rgb.size(); ++i) rgb[i] = static_cast<uint8_t>(i * 5);
    writer->write(rgb.data());
    writer->close();
    init_ = scratch_ / "given/frame_000000.png";
  }

  Args game(const Args& extra, const std::string& out = "v.mp4") const {
    Args args = generate({"--init", init_}, out);
    args.insert(args.end(), extra.begin(), extra.end());
    return args;
  }

  std::string init_;
};

TEST_F(CliGame, MakesAVideoOfActions) {
  const Result result = run(game({"--actions", "w*12 wl*8 . dk", "--stats", scratch_ / "s.json"}));
  ASSERT_EQ(result.code, 0) << result.err;
  EXPECT_NE(result.err.find("23 frames, 1.9 s of video"), std::string::npos) << result.err;
  EXPECT_EQ(count_frames(scratch_ / "v.mp4", 48, 32), 23);
  const auto found = stats();
  ASSERT_EQ(found["chunks"].size(), 3U);
  const int frames[] = {9, 12, 2};
  for (size_t i = 0; i < 3; ++i) EXPECT_EQ(found["chunks"][i]["frames"], frames[i]);
  EXPECT_EQ(found["method"],
            "memory=window:sink-frames=0:window-frames=3:memory-budget=0:self-attention=dense:"
            "cross-attention=dense:step-cache=none:steps=3");
}

// What is pressed shows from the frame on that it leads to, and not before its chunk.
TEST_F(CliGame, ActionsChangeWhatFollows) {
  run(game({"--frames", "13", "--actions", "w"}, "walk"));
  run(game({"--frames", "13", "--actions", "w*11 l w"}, "look"));
  write_text(scratch_ / "actions", "w*12\n");
  run(game({"--frames", "13", "--actions-file", scratch_ / "actions"}, "file"));
  ASSERT_FALSE(picture("walk", 12).empty());
  EXPECT_EQ(picture("walk", 8), picture("look", 8)) << "of the chunk before";
  EXPECT_NE(picture("walk", 12), picture("look", 12));
  EXPECT_EQ(picture("walk", 12), picture("file", 12));
}

TEST_F(CliGame, PlaysEveryMethodAndDecoder) {
  for (const char* preset : {"tempcache-quant", "annsa-lsh", "annca-quant", "all-lsh", "dense"}) {
    const Result result = run(game({"--frames", "34", "--preset", preset, "--decoder", "taehv",
                                    "--steps", "2", "--stats", scratch_ / "s.json"}));
    ASSERT_EQ(result.code, 0) << preset << ": " << result.err;
    EXPECT_EQ(stats()["steps"], 2);
  }
}

TEST_F(CliGame, InspectSaysWhatItIs) {
  const Result folder = run({"inspect", model()});
  EXPECT_EQ(folder.code, 0) << folder.err;
  EXPECT_NE(folder.out.find(": a Matrix-Game 2 model\n"), std::string::npos) << folder.out;
  EXPECT_EQ(folder.out.find("missing"), std::string::npos) << folder.out;
  const Result file = run({"inspect", model() + "/base_distilled_model/base_distill.safetensors"});
  EXPECT_NE(file.out.find("actions: 4 keys and the mouse, 2 heads x 64 in the first 1 layers, "
                          "played as matrix-game-2\ncomplete"),
            std::string::npos)
      << file.out;
}

TEST_F(CliGame, BadInputIsOneLineBeforeAnythingSlow) {
  expect_failure(generate({}), 2, "--init: expected the picture that a Matrix-Game 2 video begins");
  expect_failure(generate({"--init", scratch_ / "none.png"}), 3, "none.png: expected a video");
  const auto refuse = [&](const Args& extra, int code, const std::string& part) {
    expect_failure(game(extra), code, part);
  };
  refuse({"--actions", "w q"}, 2, "actions: token \"q\" at character 3: expected keys w s a d");
  refuse({"--actions", "W*3"}, 2, "actions: token \"W*3\" at character 1: expected keys w s a d");
  refuse({"--actions", "ik"}, 2, "several of them without opposites");
  for (const char* flag : {"--prompt", "--prompt-at", "--load-prompt", "--save-prompt"})
    refuse({flag, "1:x"}, 2, std::string(flag) + ": expected none, since a Matrix-Game 2 model");
  for (const char* flag : {"--save-state", "--load-state", "--calibration"})
    refuse({flag, "x"}, 2, std::string(flag) + ": expected a world model");
  refuse({"--rollout", "matrix-game-2-run"}, 2,
         "--rollout: expected matrix-game-2, as the weights");
  refuse({"--rollout", "self-forcing"}, 2, "--rollout: expected matrix-game-2, as the weights");
  Args size = game({});
  size[4] = "50x32";
  expect_failure(size, 2, "--size: expected WxH in multiples of 16 up to 16384, such as 640x352");
  EXPECT_FALSE(std::filesystem::exists(scratch_ / "v.mp4")) << "a refused run leaves nothing";
}

TEST_F(CliGame, MissingPartsAreNamed) {
  const std::string other = scratch_ / "other";
  const std::string weights = other + "/base_distilled_model/base_distill.safetensors";
  std::filesystem::create_directories(other + "/base_distilled_model");
  std::filesystem::copy_file(model() + "/base_distilled_model/base_distill.safetensors", weights);
  const auto with = [&](const std::string& path, const Args& extra) {
    Args args = game(extra);
    args[2] = path;
    return args;
  };
  expect_failure(with(other, {}), 3, "expected Wan2.1_VAE.pth or taew2_1.pth beside it");
  std::filesystem::copy_file(model() + "/taew2_1.safetensors", other + "/taew2_1.safetensors");
  expect_failure(with(other, {}), 3, "expected Wan2.1_VAE.pth beside it, in the folder above");
  std::filesystem::copy_file(model() + "/Wan2.1_VAE.safetensors",
                             other + "/Wan2.1_VAE.safetensors");
  expect_failure(with(other, {}), 3, "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth");
  for (const std::string& path : {other, other + "/base_distilled_model", weights}) {
    const Result result = run(with(path, {"--frames", "1", "--base-model", model()}));
    EXPECT_EQ(result.code, 0) << path << ": " << result.err;
  }
  // What is shared lies above the transformer's folder.
  const Result alone = run(with(model() + "/base_distilled_model", {"--frames", "1"}));
  EXPECT_EQ(alone.code, 0) << alone.err;
  // Several to choose from.
  std::filesystem::create_directories(other + "/gta_distilled_model");
  std::filesystem::copy_file(weights, other + "/gta_distilled_model/gta_keyboard2dim.safetensors");
  expect_failure(with(other, {}), 3,
                 "expected one transformer, such as diffusion_pytorch_model.safetensors, found "
                 "base_distilled_model/base_distill.safetensors and gta_distilled_model/");
  std::filesystem::resize_file(weights, 100'000);
  expect_failure(with(weights, {"--base-model", model()}), 3, "truncated");
}

// A transformer whose tensors are renamed or given other shapes.
TEST_F(CliGame, OtherModelsAreNamed) {
  const Checkpoint file(model() + "/base_distilled_model/base_distill.safetensors");
  const auto refuse = [&](const std::string& from, const std::string& to, const std::string& part) {
    std::vector<NamedView> tensors;
    for (const StoredTensor& tensor : file.tensors()) {
      std::string name = tensor.name;
      const size_t at = name.find(from);
      if (at != std::string::npos) name.replace(at, from.size(), to);
      tensors.push_back({name, tensor.view()});
    }
    const std::string path = scratch_ / "other.safetensors";
    write_safetensors(path, tensors, {});
    Args args = game({"--base-model", model()});
    args[2] = path;
    expect_failure(args, 3, part);
  };
  refuse("blocks.0.action_model", "blocks.0.other", "such as an image-to-video model");
  refuse("blocks.1.modulation", "blocks.1.other",
         "expected a distilled Matrix-Game 2, with action modules in its first layers, found the "
         "foundation model");
  refuse("action_model.t_qkv", "action_model.qkv", "blocks.0.action_model.t_qkv.weight: expected");
  refuse("img_emb.proj.1", "img_emb.proj.2", "expected a Wan transformer with text_embedding.0");
}

}  // namespace
}  // namespace longtake
