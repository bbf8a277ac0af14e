// The decoders and encoders against the official code.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <functional>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "golden_support.h"
#include "models/wan/random_model.h"
#include "models/wan/taehv.h"
#include "models/wan/vae.h"
#include "models/wan/vae_encoder.h"
#include "ops/elementwise.h"
#include "runtime_support.h"

namespace longtake {
namespace {

using namespace testing_support;

class GoldenDecoder : public GoldenDeviceTest {
 protected:
  void SetUp() override {
    GoldenDeviceTest::SetUp();
    if (!IsSkipped()) context_.emplace(device(), 2);
  }

  Context& ctx() { return *context_; }

  static bool has_bf16() { return on_gpu() || bf16_products_supported(); }

  std::optional<Context> context_;
  ScratchFolder scratch_;
};

LONGTAKE_ON_BOTH_DEVICES(GoldenDecoder);

// [H, W, C] in f32 or bf16 -> [C, H, W] f32 on the CPU, the first `channels` of it.
Tensor channels_first(Context& ctx, View image, int64_t channels) {
  const Tensor converted(ctx.device(), DType::kF32, image.shape());
  convert(ctx, image, converted);
  const Tensor wide = on_host(ctx, converted);
  const int64_t area = image.dim(0) * image.dim(1);
  Tensor out(Device{}, DType::kF32, {channels, image.dim(0), image.dim(1)});
  for (int64_t i = 0; i < area; ++i) {
    for (int64_t c = 0; c < channels; ++c)
      out.data<float>()[c * area + i] = wide.data<float>()[i * image.dim(2) + c];
  }
  return out;
}

// [C, H, W] f32 -> [H, W, C]
Tensor channels_last(View image) {
  const int64_t channels = image.dim(0);
  const int64_t area = image.dim(1) * image.dim(2);
  Tensor out(Device{}, DType::kF32, {image.dim(1), image.dim(2), channels});
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t i = 0; i < area; ++i)
      out.data<float>()[i * channels + c] = image.data<float>()[c * area + i];
  }
  return out;
}

void clamp(View x, float low, float high) {
  for (int64_t i = 0; i < x.numel(); ++i)
    x.data<float>()[i] = std::min(std::max(x.data<float>()[i], low), high);
}

View frame_of(View frames, int64_t index) {
  return frames.rows(index, index + 1).reshape({frames.dim(1), frames.dim(2), frames.dim(3)});
}

// The parity data's exceptions to its formula, which keep the pictures in range.
void taehv_exception(const std::string& name, double& offset, double& scale) {
  if (name == "decoder.22.weight") scale *= 0.9;
  if (name == "decoder.22.bias") offset = 0.5;
  if (name.ends_with("conv.4.weight")) scale *= 0.6;
}

TEST_P(GoldenDecoder, Taehv) {
  const Checkpoint golden(golden_path("taehv.safetensors"));
  const Checkpoint none;
  WeightTable list(none, nullptr);
  wan::TaehvDecoder(DType::kF32, list);
  const Checkpoint weights = formula_weights(golden, list.wanted(), formula_seed(golden),
                                             scratch_ / "weights", "", taehv_exception);
  for (const DType compute : {DType::kF32, DType::kBF16}) {
    if (compute == DType::kBF16 && !has_bf16()) continue;
    const Bound bound = compute == DType::kF32 ? kCallF32 : Bound{INFINITY, 3e-2};
    WeightTable table(weights, &ctx());
    const wan::TaehvDecoder decoder(compute, table);
    table.finish();
    const Tensor latents = read_golden(golden, "latents");
    const Tensor frames = read_golden(golden, "decode.frames");
    const Tensor counts = read_golden(golden, "stream.counts");
    wan::TaehvDecoder::State state;
    int64_t frame = 0;
    for (int64_t n = 0; n < latents.dim(0); ++n) {
      const int64_t before = frame;
      decoder.decode(ctx(), on_device(ctx(), frame_of(latents, n)), state, [&](View found) {
        const Tensor picture = channels_first(ctx(), found, found.dim(2));
        clamp(picture, 0, 1);
        expect_near(str("frame ", frame), frame_of(frames, frame), picture, bound);
        ++frame;
      });
      EXPECT_EQ(frame - before, counts.data<int32_t>()[n]);
    }
    EXPECT_EQ(frame, frames.dim(0));
    const Tensor layers = read_golden(golden, "stream.memory_layers");
    for (int64_t i = 0; i < layers.numel(); ++i) {
      const Tensor expected = read_golden(golden, str("stream.memory.", layers.data<int32_t>()[i]));
      const auto stage = static_cast<size_t>(i / wan::TaehvDecoder::kBlocks);
      const auto block = static_cast<size_t>(i % wan::TaehvDecoder::kBlocks);
      expect_near(str("memory ", i), expected,
                  channels_first(ctx(), state.memory[stage][block], expected.dim(0)), bound);
    }
    print_tally(compute == DType::kF32 ? "taehv" : "taehv, bf16");
  }
}

TEST_P(GoldenDecoder, TaehvEncoder) {
  const Checkpoint golden(golden_path("taehv.safetensors"));
  const Checkpoint none;
  WeightTable list(none, nullptr);
  wan::TaehvEncoder(DType::kF32, list);
  const Checkpoint weights = formula_weights(golden, list.wanted(), formula_seed(golden),
                                             scratch_ / "weights", "", taehv_exception);
  const Tensor rgb = read_golden(golden, "encode.rgb");  // [9, 3, H, W]
  const Tensor expected = read_golden(golden, "encode.latents");
  for (const DType compute : {DType::kF32, DType::kBF16}) {
    if (compute == DType::kBF16 && !has_bf16()) continue;
    const Bound bound = compute == DType::kF32 ? kCallF32 : Bound{INFINITY, 3e-2};
    WeightTable table(weights, &ctx());
    const wan::TaehvEncoder encoder(compute, table);
    table.finish();
    wan::TaehvEncoder::State state;
    int64_t latents = 0;
    for (int64_t n = 0; n < 4 * expected.dim(0); ++n) {  // the last frame again at the end
      const View frame = frame_of(rgb, std::min(n, rgb.dim(0) - 1));
      encoder.encode(ctx(), on_device(ctx(), channels_last(frame)), state, [&](View z) {
        expect_near(str("latent ", latents), frame_of(expected, latents), on_host(ctx(), z), bound);
        ++latents;
      });
      EXPECT_EQ(latents, (n + 1) / 4);
    }
    print_tally(compute == DType::kF32 ? "taehv encoder" : "taehv encoder, bf16");
  }
}

// Frame `index` of [C, T, H, W] as [H, W, C].
Tensor frame_last(View video, int64_t index) {
  const int64_t channels = video.dim(0);
  const int64_t area = video.dim(2) * video.dim(3);
  Tensor out(Device{}, DType::kF32, {video.dim(2), video.dim(3), channels});
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t i = 0; i < area; ++i)
      out.data<float>()[i * channels + c] =
          video.data<float>()[(c * video.dim(1) + index) * area + i];
  }
  return out;
}

// The latents' frame `index` of [C, T, H, W] as [C, H, W].
Tensor latent(View z, int64_t index) {
  Context ctx({}, 1);
  return channels_first(ctx, frame_last(z, index), z.dim(0));
}

// Every history of a decoder, in the order that frames visit them.
std::vector<const wan::FrameHistory*> histories(const wan::VaeDecoder::State& state) {
  std::vector<const wan::FrameHistory*> out = {&state.in};
  const auto add = [&](const wan::VaeResidual::State& block) {
    for (const wan::FrameHistory& history : block) out.push_back(&history);
  };
  for (const auto& block : state.middle) add(block);
  for (size_t g = 0; g < state.blocks.size(); ++g) {
    for (const auto& block : state.blocks[g]) add(block);
    if (g < 2) out.push_back(&state.upsamples[g].history);
  }
  out.push_back(&state.out);
  return out;
}

TEST_P(GoldenDecoder, Vae) {
  const Checkpoint golden(golden_path("vae.safetensors"));
  const Checkpoint weights(golden_path("vae.weights.safetensors"));
  WeightTable table(weights, &ctx());
  const wan::VaeDecoder decoder(wan::vae_dim(weights), DType::kF32, table);
  table.finish();
  const Tensor mean = read_golden(golden, "mean");
  const Tensor std = read_golden(golden, "std");
  for (size_t c = 0; c < wan::kLatentMean.size(); ++c) {
    EXPECT_EQ(mean.data<float>()[c], wan::kLatentMean[c]);
    EXPECT_EQ(std.data<float>()[c], wan::kLatentStd[c]);
  }
  const auto check = [&](const std::string& z_name, const std::string& out_name,
                         wan::VaeDecoder::State& state) {
    const Tensor z = read_golden(golden, z_name);
    const Tensor out = read_golden(golden, out_name);
    int64_t frame = 0;
    for (int64_t n = 0; n < z.dim(1); ++n)
      decoder.decode(ctx(), on_device(ctx(), latent(z, n)), state, [&](View found) {
        ASSERT_LT(frame, out.dim(1));
        expect_near(str(out_name, " ", frame), frame_last(out, frame), on_host(ctx(), found),
                    kCallF32);
        ++frame;
      });
    EXPECT_EQ(frame, out.dim(1)) << out_name;
  };
  wan::VaeDecoder::State state;
  check("decode.z", "decode.out", state);
  const auto kept = histories(state);
  for (size_t i = 0; i < kept.size(); ++i) {
    const Tensor expected = read_golden(golden, str("cached.2.feat.", i));
    for (int64_t t = 0; t < 2; ++t)
      expect_near(str("history ", i), frame_last(expected, t),
                  on_host(ctx(), (*kept[i])[static_cast<size_t>(t)]), kCallF32);
  }
  const auto sizes = nlohmann::json::parse(golden.metadata().at("config"));
  for (const int64_t count : sizes.at("count_n")) {
    wan::VaeDecoder::State fresh;
    check(str("count.", count, ".z"), str("count.", count, ".out"), fresh);
  }
  print_tally("vae");
}

TEST_P(GoldenDecoder, VaeEncoder) {
  const Checkpoint golden(golden_path("vae.safetensors"));
  const Checkpoint weights(golden_path("vae.weights.safetensors"));
  WeightTable table(weights, &ctx());
  const wan::VaeEncoder encoder(wan::vae_dim(weights), DType::kF32, table);
  table.finish();
  const Tensor x = read_golden(golden, "encode.x");
  const Tensor expected = read_golden(golden, "encode.mu_normalised");
  wan::VaeEncoder::State state;
  int64_t latents = 0;
  const auto encode = [&](int64_t frame) {
    encoder.encode(ctx(), on_device(ctx(), frame_last(x, frame)), state, [&](View z) {
      expect_near(str("latent ", latents), latent(expected, latents), on_host(ctx(), z), kCallF32);
      ++latents;
    });
  };
  for (int64_t n = 0; n < x.dim(1); ++n) {
    encode(n);
    EXPECT_EQ(latents, 1 + n / 4);
  }
  EXPECT_EQ(latents, expected.dim(1));
  encode(0);  // frames too few for another latent
  encode(1);
  EXPECT_EQ(latents, expected.dim(1));
  print_tally("vae encoder");
}

// Real latents, which are all there is of real data: [1, 16, frames, H, W], 16 frames of 320 x 512
// pixels. The weights are random, so only shapes, counts and ranges say something.
TEST_P(GoldenDecoder, RealLatents) {
  const std::string path = golden_path("../weights/test_latents_wan.pth");
  if (!std::filesystem::exists(path)) GTEST_SKIP() << path << " is not there: nothing decoded";
  const Checkpoint file(path);
  ASSERT_EQ(file.tensors().size(), 1U);
  const StoredTensor& stored = file.tensors()[0];
  ASSERT_EQ(stored.shape, (Shape{1, 16, 16, 40, 64}));
  const Tensor all(Device{}, DType::kF32, stored.shape);
  read_tensor(stored, all);
  const View video = all.view().reshape({16, 16, 40, 64});
  Context host({}, 2);
  wan::write_random_model(host, scratch_ / "model", {.size = "tiny", .dtype = DType::kF32});
  const Checkpoint vae_file(scratch_ / "model/Wan2.1_VAE.safetensors");
  const Checkpoint taehv_file(scratch_ / "model/taew2_1.safetensors");
  WeightTable vae_table(vae_file, &ctx());
  const wan::VaeDecoder vae(wan::vae_dim(vae_file), DType::kF32, vae_table);
  WeightTable taehv_table(taehv_file, &ctx());
  const wan::TaehvDecoder taehv(DType::kF32, taehv_table);
  // Two frames as large as they are, and all of them in a part of the picture.
  for (const auto& [frames, rows, columns] : {std::tuple(2, 40, 64), std::tuple(16, 6, 8)}) {
    wan::VaeDecoder::State vae_state;
    wan::TaehvDecoder::State taehv_state;
    int vae_frames = 0, taehv_frames = 0;
    const auto check = [&, height = rows, width = columns](View found) {
      const Tensor frame = on_host(ctx(), found);
      ASSERT_EQ(frame.shape(), (Shape{8 * height, 8 * width, 3}));
      for (int64_t i = 0; i < frame.numel(); ++i)
        ASSERT_TRUE(std::isfinite(frame.data<float>()[i])) << i;
    };
    for (int64_t n = 0; n < frames; ++n) {
      const Tensor z(Device{}, DType::kF32, {16, rows, columns});
      for (int64_t c = 0; c < 16; ++c) {
        for (int64_t y = 0; y < rows; ++y)
          std::copy_n(video.data<float>() + ((c * 16 + n) * 40 + y) * 64, columns,
                      z.data<float>() + (c * rows + y) * columns);
      }
      const Tensor there = on_device(ctx(), z);
      vae.decode(ctx(), there, vae_state, [&](View frame) {
        check(frame);
        ++vae_frames;
      });
      taehv.decode(ctx(), there, taehv_state, [&](View frame) {
        check(frame);
        ++taehv_frames;
      });
    }
    EXPECT_EQ(vae_frames, 1 + 4 * (frames - 1));
    EXPECT_EQ(taehv_frames, 4 * frames - 3);
  }
}

// Blocks of the released sizes, fed video after video: run(frame, sink) is one frame's way through.
void check_block(Context& ctx, const Checkpoint& golden, const std::string& name,
                 const std::function<void(View, const wan::FrameSink&)>& run) {
  int call = 0;
  for (; golden.find(str(name, ".", call, ".in")) != nullptr; ++call) {
    const Tensor in = read_golden(golden, str(name, ".", call, ".in"));
    const Tensor out = read_golden(golden, str(name, ".", call, ".out"));
    int64_t frame = 0;
    for (int64_t t = 0; t < in.dim(1); ++t) {
      const Workspace::Scope scope(ctx.workspace());
      run(on_device(ctx, frame_last(in, t)), [&](View found) {
        ASSERT_LT(frame, out.dim(1));
        expect_near(str(name, ".", call, " ", frame), frame_last(out, frame), on_host(ctx, found),
                    kCallF32);
        ++frame;
      });
    }
    EXPECT_EQ(frame, out.dim(1));
  }
  EXPECT_GT(call, 0) << name;
}

TEST_P(GoldenDecoder, VaeBlocksOfRealSize) {
  const Checkpoint golden(golden_path("vae_real_blocks.safetensors"));
  // `list` is called twice: to learn the tensors, then to load them.
  const auto load = [&](const std::string& name, const auto& list) {
    const Checkpoint none;
    WeightTable wanted(none, nullptr);
    list(wanted);
    const Checkpoint file =
        formula_weights(golden, wanted.wanted(), formula_seed(golden), scratch_ / name, name + "/");
    WeightTable table(file, &ctx());
    list(table);
    table.finish();
  };
  for (const auto& [name, in, out] :
       {std::tuple("residual_384_384", 384, 384), std::tuple("residual_192_384", 192, 384)}) {
    wan::VaeResidual block;
    load(name, [&](WeightTable& table) { block.list(table, "", out, in, DType::kF32); });
    wan::VaeResidual::State state;
    check_block(ctx(), golden, name,
                [&](View x, const wan::FrameSink& sink) { sink(block.forward(ctx(), x, state)); });
  }
  wan::VaeAttention attention;
  load("attention_384", [&](WeightTable& table) { attention.list(table, "", 384, DType::kF32); });
  check_block(ctx(), golden, "attention_384", [&](View x, const wan::FrameSink& sink) {
    attention.forward(ctx(), x);
    sink(x);
  });
  wan::VaeDownsample down;
  load("downsample3d_192",
       [&](WeightTable& table) { down.list(table, "", 192, true, DType::kF32); });
  wan::VaeDownsample::State down_state;
  check_block(ctx(), golden, "downsample3d_192", [&](View x, const wan::FrameSink& sink) {
    down.forward(ctx(), x, down_state, sink);
  });
  for (const auto& [name, channels, is_temporal] :
       {std::tuple("upsample3d_384", 384, true), std::tuple("upsample2d_192", 192, false)}) {
    wan::VaeUpsample block;
    load(name,
         [&](WeightTable& table) { block.list(table, "", channels, is_temporal, DType::kF32); });
    wan::VaeUpsample::State state;
    check_block(ctx(), golden, name,
                [&](View x, const wan::FrameSink& sink) { block.forward(ctx(), x, state, sink); });
  }
  print_tally("vae blocks");
}

}  // namespace
}  // namespace longtake
