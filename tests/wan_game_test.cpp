// What Matrix-Game 2 takes beside the transformer, which the parity tests look at: actions from
// keys, the picture's tokens and latents; and rollouts without an end.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/philox.h"
#include "core_support.h"
#include "golden_support.h"
#include "models/wan/image_encoder.h"
#include "models/wan/model.h"
#include "models/wan/model_files.h"
#include "models/wan/random_model.h"
#include "models/wan/transformer.h"
#include "models/wan/vae_encoder.h"
#include "ops/clock.h"
#include "ops/copy.h"
#include "ops/image.h"
#include "pipeline/wan_actions.h"
#include "pipeline/wan_picture.h"
#include "pipeline/wan_rollout.h"
#include "reference/attention.h"
#include "reference/linear.h"
#include "reference/norm.h"
#include "runtime_support.h"

namespace longtake {
namespace {

using namespace testing_support;
using test::same_bits;
using Doubles = std::vector<double>;
using Floats = std::vector<float>;

TEST(Actions, AreTheKeysOfTheModel) {
  const ActionRows walk = parse_actions("w*2,sd kl .", ActionKind::kWalk);
  EXPECT_EQ(walk.keyboard, (Floats{1, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0}));
  EXPECT_EQ(walk.mouse, (Floats{0, 0, 0, 0, 0, 0, -0.1F, 0.1F, 0, 0}));
  EXPECT_EQ(walk.count(4), 5);

  const ActionRows drive = parse_actions("wa s .", ActionKind::kDrive);
  EXPECT_EQ(drive.keyboard, (Floats{1, 0, 0, 1, 0, 0}));
  EXPECT_EQ(drive.mouse, (Floats{0, -0.1F, 0, 0, 0, 0}));

  const ActionRows run = parse_actions("l .", ActionKind::kRun);
  EXPECT_EQ(run.keyboard, (Floats{0, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0}));
  EXPECT_TRUE(run.mouse.empty());
  for (const ActionKind kind : {ActionKind::kWalk, ActionKind::kDrive, ActionKind::kRun})
    EXPECT_FALSE(parse_actions(gentle_actions(kind), kind).keyboard.empty());
}

TEST(Actions, OthersAreRefusedByName) {
  const auto message = [](const char* text, ActionKind kind) {
    try {
      parse_actions(text, kind);
    } catch (const Error& error) {
      EXPECT_EQ(error.kind(), ErrorKind::kUsage);
      return std::string(error.what());
    }
    return std::string("nothing");
  };
  for (const auto& [text, kind] :
       {std::pair("W", ActionKind::kWalk), std::pair("ws", ActionKind::kWalk),
        std::pair("ww", ActionKind::kWalk), std::pair("q", ActionKind::kWalk),
        std::pair("jl", ActionKind::kWalk), std::pair("*3", ActionKind::kWalk),
        std::pair("w.", ActionKind::kWalk), std::pair("i", ActionKind::kDrive),
        std::pair("wd", ActionKind::kRun), std::pair("k", ActionKind::kRun)}) {
    const std::string found = message((std::string(". ") + text).c_str(), kind);
    EXPECT_EQ(
        found.rfind(std::string("actions: token \"") + text + "\" at character 3: expected ", 0),
        0U)
        << found;
  }
  EXPECT_NE(message("w*0", ActionKind::kWalk).find("a whole number"), std::string::npos);
  EXPECT_NE(message("l", ActionKind::kDrive).find("a d to steer"), std::string::npos);
}

TEST(Actions, KindsAreKnownByTheirInputs) {
  EXPECT_EQ(action_kind({15, 16, 4, 128, true}), ActionKind::kWalk);
  EXPECT_EQ(action_kind({15, 16, 2, 128, true}), ActionKind::kDrive);
  EXPECT_EQ(action_kind({15, 16, 7, 128, false}), ActionKind::kRun);
  EXPECT_THROW(action_kind({15, 16, 4, 128, false}), Error);
  for (const ActionKind kind : {ActionKind::kWalk, ActionKind::kDrive, ActionKind::kRun}) {
    const WanOptions options = options_of_family(family_of(kind));
    EXPECT_EQ(options.context_frames, kind == ActionKind::kDrive ? 4 : 6);
    EXPECT_EQ(options.steps.size(), kind == ActionKind::kRun ? 4U : 3U);
  }
}

// Weights of half a pixel are -3/32, 19/32, 19/32, -3/32, and edges repeat.
TEST(ScaledBicubic, IsTheOneOfTheReleasedCode) {
  std::vector<uint8_t> rgb(20 * 20 * 3);
  for (size_t i = 0; i < rgb.size(); ++i) rgb[i] = static_cast<uint8_t>(i * 7);
  const Floats same = wan::scaled_bicubic(View(rgb.data(), DType::kU8, Device{}, {20, 20, 3}), 20);
  for (size_t i = 0; i < rgb.size(); ++i) EXPECT_EQ(same[i], rgb[i]);

  const uint8_t line[] = {0, 100, 50, 200};
  std::vector<uint8_t> wide, tall;
  for (size_t i = 0; i < 4 * 4 * 3; ++i) {
    wide.push_back(line[i / 3 % 4]);
    tall.push_back(line[i / 12]);
  }
  for (const bool is_wide : {true, false}) {
    std::vector<uint8_t>& picture = is_wide ? wide : tall;
    const Floats half =
        wan::scaled_bicubic(View(picture.data(), DType::kU8, Device{}, {4, 4, 3}), 2);
    for (size_t i = 0; i < half.size(); ++i)
      EXPECT_FLOAT_EQ(half[i], (is_wide ? i / 3 % 2 : i / 6) == 0 ? 54.6875F : 120.3125F) << i;
  }
}

// [height, width, 3] u8.
std::vector<uint8_t> picture(int64_t height, int64_t width) {
  std::vector<uint8_t> rgb(static_cast<size_t>(height * width * 3));
  for (size_t i = 0; i < rgb.size(); ++i) rgb[i] = static_cast<uint8_t>(i * i % 251);
  return rgb;
}

// A tiny model with random weights, written once for all tests and removed at the end.
class WanGame : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    scratch_ = new ScratchFolder;
    Context ctx({}, 2);
    wan::write_random_model(ctx, folder(), {.size = "matrix-game-2-tiny", .dtype = DType::kF32});
  }

  static void TearDownTestSuite() { delete scratch_; }

  static std::string folder() { return *scratch_ / "model"; }

  static wan::ModelFiles files() {
    return wan::find_model_files(folder() + "/base_distilled_model");
  }

  Context ctx_{{}, 2};

 private:
  static ScratchFolder* scratch_;
};

ScratchFolder* WanGame::scratch_ = nullptr;

TEST_F(WanGame, RandomModelIsComplete) {
  const wan::ModelFiles found = files();
  EXPECT_EQ(found.family, "matrix-game-2");
  EXPECT_EQ(wan::find_model_files(folder()).transformer, found.transformer);
  for (const auto& [path, part] : {std::pair(found.transformer, wan::Part::kGame),
                                   std::pair(found.image_encoder, wan::Part::kImageEncoder),
                                   std::pair(found.vae, wan::Part::kVae)}) {
    const Checkpoint file(path);
    EXPECT_EQ(wan::part_of(file), part) << path;
    EXPECT_EQ(wan::check_part(file, part), std::vector<std::string>()) << path;
  }
}

// The image encoder against its definition in double.
TEST_F(WanGame, ImageEncoderIsItsDefinition) {
  const Checkpoint file(files().image_encoder);
  const wan::ImageEncoderConfig config = wan::image_encoder_config(file);
  WeightTable table(file, &ctx_);
  const wan::ImageEncoder encoder(config, DType::kF32, table);
  table.finish();
  EXPECT_EQ(config.num_layers, 1);  // of two
  std::vector<uint8_t> rgb = picture(32, 48);
  const View view(rgb.data(), DType::kU8, Device{}, {32, 48, 3});
  const Tensor found = encoder.encode(ctx_, view);

  const auto weight = [&](const std::string& name) {
    const StoredTensor& stored = *file.find("visual." + name);
    const View values = stored.view();
    return Doubles(values.data<float>(), values.data<float>() + values.numel());
  };
  const auto dim = static_cast<size_t>(config.dim),
             tokens = static_cast<size_t>(config.num_tokens());
  const auto side = static_cast<size_t>(config.side), patch = static_cast<size_t>(config.patch);
  const Floats square = wan::scaled_bicubic(view, config.pixels());
  const double mean[] = {0.48145466, 0.4578275, 0.40821073};
  const double deviation[] = {0.26862954, 0.26130258, 0.27577711};
  Doubles patches;
  for (size_t p = 0; p < side * side; ++p) {
    for (size_t c = 0; c < 3; ++c) {
      for (size_t i = 0; i < patch * patch; ++i) {
        const size_t y = p / side * patch + i / patch, x = p % side * patch + i % patch;
        patches.push_back((square[(y * side * patch + x) * 3 + c] / 255.0 - mean[c]) /
                          deviation[c]);
      }
    }
  }
  Doubles x = weight("cls_embedding");
  const Doubles embedded = reference::linear(patches, weight("patch_embedding.weight"), {},
                                             tokens - 1, 3 * patch * patch, dim);
  x.insert(x.end(), embedded.begin(), embedded.end());
  const auto add = [&](const Doubles& y) {
    for (size_t i = 0; i < x.size(); ++i) x[i] += y[i];
  };
  const auto norm = [&](const std::string& name) {
    return reference::layer_norm(x, weight(name + ".weight"), weight(name + ".bias"), 1e-5, false);
  };
  const auto linear = [&](const Doubles& y, const std::string& name, size_t in, size_t out) {
    return reference::linear(y, weight(name + ".weight"), weight(name + ".bias"), tokens, in, out);
  };
  add(weight("pos_embedding"));
  x = norm("pre_norm");
  const std::string at = "transformer.0.";
  const Doubles qkv = linear(norm(at + "norm1"), at + "attn.to_qkv", dim, 3 * dim);
  Doubles parts[3];
  for (size_t i = 0; i < qkv.size(); ++i) parts[i / dim % 3].push_back(qkv[i]);
  const size_t heads = dim / wan::kImageHeadDim;
  add(linear(reference::attention(parts[0], parts[1], parts[2], {}, tokens, tokens, heads,
                                  dim / heads, 1 / std::sqrt(double{wan::kImageHeadDim})),
             at + "attn.proj", dim, dim));
  const auto wide = static_cast<size_t>(config.ffn_dim);
  Doubles hidden = linear(norm(at + "norm2"), at + "mlp.0", dim, wide);
  for (double& h : hidden) h = reference::gelu(h);
  add(linear(hidden, at + "mlp.2", wide, dim));

  ASSERT_EQ(found.shape().to_string(), Shape({config.num_tokens(), config.dim}).to_string());
  Tensor expected({}, DType::kF32, found.shape());
  std::copy(x.begin(), x.end(), expected.data<float>());
  EXPECT_LT(distance(expected, found).relative_l2, 1e-5);
}

constexpr int64_t kHeight = 4, kWidth = 6;  // of a latent frame

// A rollout of the tiny model with all that it needs, on a device.
class Played {
 public:
  Played(const wan::ModelFiles& files, const char* keys, const std::string& preset = "",
         Device device = {}, DType dtype = DType::kF32)
      : ctx(device, 2), transformer_(wan::load_transformer(ctx, files, dtype, DType::kF32)) {
    WanOptions options = options_of_family("matrix-game-2");
    options.dtype = dtype;
    options.height = kHeight;
    options.width = kWidth;
    options.method = choose_method(ctx, options, transformer_->config(), preset, {});
    const Tensor context({}, DType::kF32, {5, transformer_->config().text_dim});
    fill_normal(1, 0, 0, context.data<float>(), context.numel());
    rollout.emplace(ctx, *transformer_, context, options);
    windows.emplace(ctx, transformer_->config(), parse_actions(keys, ActionKind::kWalk),
                    controls());
    std::vector<uint8_t> rgb = picture(8 * kHeight, 8 * kWidth);
    latents.emplace(ctx, vae_encoder(ctx, files, dtype),
                    View(rgb.data(), DType::kU8, Device{}, {8 * kHeight, 8 * kWidth, 3}),
                    controls());
    made_ = Tensor(device, DType::kF32, {options.chunk_frames, 16, kHeight, kWidth});
  }

  static wan::VaeEncoder vae_encoder(Context& ctx, const wan::ModelFiles& files, DType dtype) {
    const Checkpoint file(files.vae);
    WeightTable table(file, &ctx);
    wan::VaeEncoder encoder(wan::vae_dim(file), dtype, table);
    table.finish();
    return encoder;
  }

  wan::Controls& controls() { return *rollout->controls(); }

  const wan::TransformerConfig& config() const { return transformer_->config(); }

  // The next chunk, on the CPU; its noise does not know where it is.
  Tensor next() {
    const int64_t first = rollout->num_frames();
    if (windows) windows->fill(ctx, first, controls());
    if (latents) latents->fill(ctx, first, controls());
    const Tensor host({}, DType::kF32, made_.shape());
    rollout->next_chunk(
        ctx,
        [&](const NoiseDraw& draw, View out) {
          fill_normal(5, 0, static_cast<uint32_t>(draw.step), host.data<float>(), host.numel());
          copy(ctx, host, out);
          ctx.synchronize();
        },
        made_);
    copy(ctx, made_, host);
    rollout->expect_finite();
    return host.clone();
  }

  Context ctx;

 private:
  std::unique_ptr<wan::Transformer> transformer_;
  Tensor made_;

 public:
  std::optional<ChunkRollout> rollout;
  std::optional<ActionWindows> windows;
  std::optional<PictureLatents> latents;
};

bool is_finite(View x) {
  return std::all_of(x.data<float>(), x.data<float>() + x.numel(),
                     [](float value) { return std::isfinite(value); });
}

// The latents are those of the encoder over the picture and grey frames; the first one is marked,
// and those behind kPictureLatents are what all later ones would be.
TEST_F(WanGame, PictureLatentsAreThoseOfAGreyVideo) {
  Played game(files(), "w");
  const wan::VaeEncoder encoder = Played::vae_encoder(ctx_, files(), DType::kF32);
  wan::VaeEncoder::State state;
  std::vector<Tensor> expected;
  std::vector<uint8_t> rgb = picture(8 * kHeight, 8 * kWidth);
  const Shape shape{8 * kHeight, 8 * kWidth, 3};
  const Tensor pixels = Tensor::zeros(Device{}, DType::kF32, shape);
  from_rgb(ctx_, View(rgb.data(), DType::kU8, Device{}, shape), pixels);
  constexpr size_t kMore = 8;
  while (expected.size() < kPictureLatents + kMore) {
    encoder.encode(ctx_, pixels, state, [&](View z) {
      expected.emplace_back(Device{}, DType::kF32, z.shape());
      std::copy_n(z.data<float>(), z.numel(), expected.back().data<float>());
    });
    std::fill_n(pixels.data<float>(), pixels.numel(), 0.0F);
  }
  const View image = game.controls().image;
  const int64_t masks = image.dim(1) - 16;
  for (int64_t first = 0; first + 3 <= static_cast<int64_t>(expected.size()); first += 3) {
    game.latents->fill(game.ctx, first, game.controls());
    for (int64_t f = 0; f < 3; ++f) {
      const View frame = image.rows(f, f + 1).reshape({masks + 16, kHeight, kWidth});
      const View behind = frame.rows(masks, masks + 16);
      EXPECT_TRUE(std::all_of(frame.data<float>(), behind.data<float>(),
                              [&](float value) { return value == (first + f == 0 ? 1 : 0); }));
      EXPECT_TRUE(same_bits(behind, expected[static_cast<size_t>(first + f)])) << first + f;
    }
  }
}

// Rows from 4 f - 12 on, what lies before the video like its first row, and again from the front
// behind the last.
TEST_F(WanGame, WindowsOfActions) {
  Played game(files(), "w");
  wan::Controls& controls = game.controls();
  constexpr int64_t kRows = 21;
  ActionRows rows;
  for (int64_t i = 0; i < kRows; ++i) {
    rows.keyboard.insert(rows.keyboard.end(), 4, static_cast<float>(i));
    rows.mouse.insert(rows.mouse.end(), {static_cast<float>(i), -static_cast<float>(i)});
  }
  ActionWindows windows(game.ctx, game.config(), rows, controls);
  for (const int64_t first : {0, 3, 300}) {
    windows.fill(game.ctx, first, controls);
    for (int64_t f = 0; f < 3; ++f) {
      for (int64_t i = 0; i < 12; ++i) {
        const auto row = static_cast<float>(std::max<int64_t>(4 * (first + f) - 12 + i, 0) % kRows);
        EXPECT_EQ(controls.keyboard.data<float>()[(f * 12 + i) * 4 + 3], row);
        const int64_t last_token = (f + 1) * kHeight * kWidth / 4 - 1;
        EXPECT_EQ(controls.mouse.data<float>()[last_token * 24 + 2 * i], row);
        EXPECT_EQ(controls.mouse.data<float>()[last_token * 24 + 2 * i + 1], -row);
      }
    }
  }
}

TEST_F(WanGame, KeysAndThePictureChangeWhatIsMade) {
  std::vector<Tensor> made;
  for (const char* keys : {"w", "w", "s", "wl"}) {
    Played game(files(), keys);
    if (made.size() == 1) game.latents.reset();
    game.next();
    made.push_back(game.next());
    ASSERT_TRUE(is_finite(made.back()));
  }
  for (size_t i = 1; i < made.size(); ++i) EXPECT_FALSE(same_bits(made[0], made[i])) << i;
}

constexpr const char* kPresets[] = {"window",    "dense",       "tempcache-lsh", "tempcache-quant",
                                    "annsa-lsh", "annca-quant", "all-lsh",       "all-quant"};

TEST_F(WanGame, EveryPolicyAndSelectionPlays) {
  for (const char* preset : kPresets) {
    Played game(files(), "w*5 dk", preset);
    game.latents.reset();
    for (int n = 0; n < 8; ++n) ASSERT_TRUE(is_finite(game.next())) << preset << ' ' << n;
    // The modules remember what their model remembers, whatever the method.
    EXPECT_EQ(game.controls().memories.at(0).mouse.k.dim(0), 6) << preset;
  }
}

// A place in time far from the first frame is as good as any other: pass after pass, also what the
// action modules remember is only so far away.
TEST_F(WanGame, OnlyDistancesInTimeMatter) {
  const auto transformer = wan::load_transformer(ctx_, files(), DType::kF32, DType::kF32);
  const wan::TransformerConfig& config = transformer->config();
  const wan::Level level = transformer->level(ctx_, 500), clean = transformer->level(ctx_, 0);
  const Tensor context({}, DType::kF32, {5, config.text_dim});
  fill_normal(1, 0, 0, context.data<float>(), context.numel());
  const Tensor x({}, DType::kF32, {3, 16, kHeight, kWidth});
  fill_normal(2, 0, 0, x.data<float>(), x.numel());
  std::vector<Tensor> flows;
  for (const int64_t begin : {30, 3'000'000}) {
    const Tensor clock = Tensor::zeros(Device{}, DType::kI64, {1});
    CacheOptions cache;
    cache.dtype = DType::kF32;
    cache.num_heads = config.num_heads;
    cache.head_dim = config.head_dim();
    cache.tokens_per_frame = kHeight * kWidth / 4;
    std::vector<LayerState> layers(static_cast<size_t>(config.num_layers));
    for (LayerState& layer : layers) layer.memory.cache = make_cache(ctx_, cache);
    transformer->set_text(ctx_, context, layers);
    wan::Controls controls =
        wan::make_controls(ctx_, config, DType::kF32, clock, 3, 3, kHeight, kWidth);
    ActionWindows windows(ctx_, config, parse_actions("wj", ActionKind::kWalk), controls);
    RopeTable rope = transformer->make_rope(ctx_, 3 * cache.tokens_per_frame);
    flows.emplace_back(Device{}, DType::kF32, x.shape());
    for (int64_t frame = begin; frame < begin + 9; frame += 3) {
      set_clock(ctx_, clock, frame);
      wan::set_rope(ctx_, controls);
      windows.fill(ctx_, frame, controls);
      transformer->set_rope(ctx_, clock, kHeight / 2, kWidth / 2, rope);
      for (const wan::Level* now : {&level, &clean}) {
        const std::vector<const wan::Level*> levels(3, now);
        const wan::Pass pass{
            .levels = levels, .rope = rope, .layers = layers, .reading = {}, .controls = &controls};
        if (now == &level)
          transformer->flow(ctx_, x, pass, flows.back());
        else
          transformer->commit(ctx_, x, pass, {frame, 3});
      }
    }
  }
  for (int64_t i = 0; i < flows[0].numel(); ++i)
    EXPECT_NEAR(flows[0].data<float>()[i], flows[1].data<float>()[i], 1e-4);
}

// Also where passes are recorded and replayed.
TEST_F(WanGame, AGpuMakesWhatTheCpuMakes) {
  if (!test::has_gpu()) GTEST_SKIP() << "no NVIDIA GPU on this machine";
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    for (const char* preset : {"window", "tempcache-lsh", "annca-quant"}) {
      Played cpu(files(), "w*5 dk", preset);
      Played gpu(files(), "w*5 dk", preset, Device{DeviceKind::kCuda, 0}, dtype);
      for (int n = 0; n < 5; ++n) {
        const Tensor expected = cpu.next();
        const Tensor found = gpu.next();
        EXPECT_LT(distance(expected, found).relative_l2, dtype == DType::kF32 ? 1e-3 : 5e-2)
            << preset << " in " << name_of(dtype) << ", chunk " << n;
      }
    }
  }
}

}  // namespace
}  // namespace longtake
