// The Wan family without parity data: sizes, windows, streams without end, on random weights.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "base/philox.h"
#include "io/tokenizer.h"
#include "models/wan/checkpoint.h"
#include "models/wan/decoder.h"
#include "models/wan/image_encoder.h"
#include "models/wan/model_files.h"
#include "models/wan/random_model.h"
#include "models/wan/taehv.h"
#include "models/wan/text_encoder.h"
#include "models/wan/transformer.h"
#include "models/wan/vae_encoder.h"
#include "ops/clock.h"
#include "pipeline/wan_rollout.h"
#include "runtime_support.h"

namespace longtake {
namespace {

using namespace testing_support;

int64_t parameters(const WeightTable& table) {
  return std::accumulate(
      table.wanted().begin(), table.wanted().end(), int64_t{0},
      [](int64_t sum, const auto& wanted) { return sum + wanted.shape.numel(); });
}

// The released models' numbers of parameters and tensors.
TEST(WanSizes, AreThoseOfTheReleasedModels) {
  const Checkpoint none;

  struct Case {
    wan::TransformerConfig config;
    int64_t parameters;
    size_t tensors;
  };

  for (const Case& c : {Case{{1536, 8960, 12, 30, 16, 16, 256, 4096}, 1'418'996'800, 825},
                        Case{{5120, 13824, 40, 40, 16, 16, 256, 4096}, 14'288'491'584, 1095},
                        // Matrix-Game 2 to walk (files of 6.48 GB in f32) and to run (6.03 GB).
                        Case{{1536, 8960, 12, 30, 36, 16, 256, 1280, true, {15, 16, 4, 128, true}},
                             1'619'242'304,
                             1114},
                        Case{{1536, 8960, 12, 30, 36, 16, 256, 1280, true, {15, 16, 7, 128, false}},
                             1'508'715'584,
                             964}}) {
    WeightTable table(none, nullptr);
    wan::Transformer(c.config, DType::kF32, DType::kF32, table);
    EXPECT_EQ(parameters(table), c.parameters);
    EXPECT_EQ(table.wanted().size(), c.tensors);
  }
  WeightTable text(none, nullptr);
  wan::TextEncoder::list_weights({256384, 4096, 4096, 10240, 64, 24}, text);
  EXPECT_EQ(parameters(text), 5'680'910'336);
  EXPECT_EQ(text.wanted().size(), 242U);
  WeightTable image(none, nullptr);
  wan::ImageEncoder({1280, 5120, 32, 14, 16}, DType::kF32, image);  // with the layer left out
  constexpr int64_t kBehindLayers = 1280 * 1024 + 2 * 1280;
  EXPECT_EQ(parameters(image) + kBehindLayers, 632'076'800);
  WeightTable vae(none, nullptr);
  wan::VaeDecoder(96, DType::kF32, vae);
  constexpr int64_t kConv2 = 16 * 16 + 16;
  EXPECT_EQ(parameters(vae), 73'295'331 + kConv2);
  WeightTable taehv(none, nullptr);
  wan::TaehvDecoder(DType::kF32, taehv);
  EXPECT_EQ(parameters(taehv), 9'844'611);
  WeightTable vae_encoder(none, nullptr);
  wan::VaeEncoder(96, DType::kF32, vae_encoder);
  constexpr int64_t kConv1 = 32 * 32 + 32;
  EXPECT_EQ(parameters(vae_encoder), 53'595'872 + kConv1);
  WeightTable taehv_encoder(none, nullptr);
  wan::TaehvEncoder(DType::kF32, taehv_encoder);
  EXPECT_EQ(parameters(taehv_encoder), 1'470'928);
}

// A tiny model with random weights, written once for all tests and removed at the end.
class Wan : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    scratch_ = new ScratchFolder;
    Context ctx({}, 2);
    wan::write_random_model(ctx, folder(), {.size = "tiny", .dtype = DType::kF32});
  }

  static void TearDownTestSuite() { delete scratch_; }

  static std::string folder() { return *scratch_ / "model"; }

  Wan() {
    const Checkpoint file = wan::open_generator(wan::find_model_files(folder()).transformer);
    WeightTable table(file, &ctx_);
    transformer_.emplace(wan::transformer_config(file), DType::kF32, DType::kF32, table);
    table.finish();
    text_ = Tensor::zeros(Device{}, DType::kF32, {8, transformer_->config().text_dim});
    noise_of_seed(ctx_, 1)({0, 0}, text_.view().reshape({1, text_.numel()}));
  }

  static WanOptions sized(WanOptions options) {
    options.height = 4;
    options.width = 6;
    return options;
  }

  static Tensor frames(int64_t count) {
    return Tensor::zeros(Device{}, DType::kF32, {count, 16, 4, 6});
  }

  static bool is_finite(View x) {
    for (int64_t i = 0; i < x.numel(); ++i) {
      if (!std::isfinite(x.data<float>()[i])) return false;
    }
    return true;
  }

  static bool same_bits(View a, View b) {
    return a.bytes() == b.bytes() && std::memcmp(a.raw(), b.raw(), a.bytes()) == 0;
  }

  Context ctx_{{}, 2};
  std::optional<wan::Transformer> transformer_;
  Tensor text_;

 private:
  static ScratchFolder* scratch_;
};

ScratchFolder* Wan::scratch_ = nullptr;

TEST_F(Wan, RandomModelIsComplete) {
  const wan::ModelFiles files = wan::find_model_files(folder());
  for (const auto& [path, part] :
       {std::pair(files.transformer, wan::Part::kTransformer),
        std::pair(files.text_encoder, wan::Part::kTextEncoder),
        std::pair(files.vae, wan::Part::kVae), std::pair(files.taehv, wan::Part::kTaehv)}) {
    const Checkpoint file(path);
    EXPECT_EQ(wan::part_of(file), part) << path;
    EXPECT_EQ(wan::check_part(file, part), std::vector<std::string>()) << path;
  }
  const Tokenizer tokenizer(files.tokenizer);
  const std::vector<int32_t> ids = tokenizer.encode("a b");
  EXPECT_EQ(ids.size(), 5U) << "a space before the first word";
  EXPECT_EQ(ids[0], ids[2]);
  EXPECT_EQ(ids[4], 1);
  EXPECT_EQ(tokenizer.encode("\xc3\xa9").size(), 4U) << "two bytes";
}

TEST_F(Wan, ShardsHoldTheSameWeights) {
  const ScratchFolder scratch;
  wan::write_random_model(ctx_, scratch / "m",
                          {.size = "tiny",
                           .dtype = DType::kF32,
                           .transformer_only = true,
                           .shard_bytes = size_t{1} << 20});
  const Checkpoint shards(wan::find_model_files(scratch / "m").transformer);
  const Checkpoint whole(wan::find_model_files(folder()).transformer);
  EXPECT_NE(shards.format(), "safetensors in 1 file");
  EXPECT_EQ(wan::check_part(shards, wan::Part::kTransformer), std::vector<std::string>());
  for (const StoredTensor& tensor : whole.tensors()) {
    const StoredTensor* other = shards.find(tensor.name);
    ASSERT_NE(other, nullptr) << tensor.name;
    EXPECT_TRUE(same_bits(tensor.view(), other->view())) << tensor.name;
  }
}

TEST_F(Wan, OnlyDistancesInTimeMatter) {
  std::vector<LayerState> layers(static_cast<size_t>(transformer_->config().num_layers));
  CacheOptions cache;
  cache.dtype = DType::kF32;
  cache.num_heads = transformer_->config().num_heads;
  cache.head_dim = transformer_->config().head_dim();
  cache.tokens_per_frame = 6;
  for (LayerState& layer : layers) layer.memory.cache = make_cache(ctx_, cache);
  transformer_->set_text(ctx_, text_, layers);
  const wan::Level level = transformer_->level(ctx_, 500);
  const std::vector<const wan::Level*> levels(3, &level);
  const Tensor x = frames(3);
  noise_of_seed(ctx_, 2)({0, 0}, x);
  RopeTable rope = transformer_->make_rope(ctx_, 18);
  std::vector<Tensor> flows;
  for (const int64_t first_frame : {0, 1'000'000}) {
    const Tensor clock = Tensor::zeros(ctx_.device(), DType::kI64, {1});
    set_clock(ctx_, clock, first_frame);
    transformer_->set_rope(ctx_, clock, 2, 3, rope);
    flows.push_back(frames(3));
    transformer_->flow(ctx_, x, {.levels = levels, .rope = rope, .layers = layers, .reading = {}},
                       flows.back());
  }
  for (int64_t i = 0; i < flows[0].numel(); ++i)
    EXPECT_NEAR(flows[0].data<float>()[i], flows[1].data<float>()[i], 1e-4);
}

// A prompt's padding is read as one key that counts as many.
TEST_F(Wan, PaddingIsOneKey) {
  const View padding = text_.view().rows(3, 8);
  std::fill_n(padding.data<float>(), padding.numel(), 0.0F);

  class KeysRead final : public PassObserver {
   public:
    void on_cross_attention(int64_t, const AttentionRead& read) override {
      most = std::max<int64_t>(most, read.kv.heads[0][0].num_keys);
    }

    int64_t most = 0;
  };

  std::vector<Tensor> chunks;
  for (const char* method : {"", "annca-quant"}) {
    WanOptions options = sized(self_forcing_options());
    options.method = choose_method(ctx_, options, transformer_->config(), method, {});
    options.method->dense_steps = std::vector<int64_t>{0, 1, 2, 3};  // nothing is left out
    ChunkRollout rollout(ctx_, *transformer_, text_, options);
    KeysRead read;
    rollout.observe(&read);
    chunks.push_back(frames(3));
    rollout.next_chunk(ctx_, noise_of_seed(ctx_, 3), chunks.back());
    EXPECT_EQ(read.most, *method == 0 ? 4 : 8);
  }
  for (int64_t i = 0; i < chunks[0].numel(); ++i)
    EXPECT_NEAR(chunks[0].data<float>()[i], chunks[1].data<float>()[i], 1e-4);
}

// How many frames every pass reads, its own included.
class FramesRead final : public PassObserver {
 public:
  void on_self_attention(int64_t layer, const AttentionRead& read) override {
    if (layer != 0) return;
    int64_t keys = 0;
    for (const KvPage& page : read.kv.heads[0]) keys += page.num_keys;
    counts.push_back(keys / 6);
  }

  std::vector<int64_t> counts;
};

// Rolling-Forcing's windows, 12 chunks of 3 frames in 5 steps. Noisy passes read sink, window and
// all in work; clean passes their own chunk and the newest 18 frames.
TEST_F(Wan, RollingForcingWindows) {
  constexpr int64_t kChunks = 12;
  RollingRollout rollout(ctx_, *transformer_, text_, sized(rolling_forcing_options()), kChunks);
  FramesRead read;
  rollout.observe(&read);
  const Tensor latents = frames(3);
  for (int64_t n = 0; n < kChunks; ++n) rollout.next_chunk(ctx_, noise_of_seed(ctx_, 3), latents);
  const std::vector<int64_t> expected = {3,  6,  9,  12, 15, 3,   // ramp, first chunk clean
                                         18, 6,  21, 9,  21, 12,  // windows 5, 6, 7: noisy, clean
                                         21, 15, 21, 18, 21, 21,  // 8, 9, 10
                                         21, 21, 21, 21, 21, 21,  // 11, 12, 13
                                         21, 21, 21, 21};         // 14, 15
  EXPECT_EQ(read.counts, expected);
}

TEST_F(Wan, AnEndlessRollingRolloutBeginsLikeAFiniteOne) {
  const WanOptions options = sized(rolling_forcing_options());
  RollingRollout finite(ctx_, *transformer_, text_, options, 9);
  RollingRollout endless(ctx_, *transformer_, text_, options, 0);
  const Tensor a = frames(3);
  const Tensor b = frames(3);
  for (int64_t n = 0; n < 9 - 4; ++n) {  // the last windows of a finite one are shorter
    finite.next_chunk(ctx_, noise_of_seed(ctx_, 3), a);
    endless.next_chunk(ctx_, noise_of_seed(ctx_, 3), b);
    EXPECT_TRUE(same_bits(a, b)) << n;
  }
}

// As long as nothing has to be forgotten, every policy that merges nothing is the same.
TEST_F(Wan, PoliciesPlayAChunkRollout) {
  std::vector<Tensor> last;
  for (const char* memory : {"window", "full", "tempcache"}) {
    WanOptions options = sized(self_forcing_options());
    options.method = parse_method(str("memory=", memory));
    ChunkRollout rollout(ctx_, *transformer_, text_, options);
    last.push_back(frames(3));
    for (int n = 0; n < 7; ++n) rollout.next_chunk(ctx_, noise_of_seed(ctx_, 4), last.back());
    EXPECT_EQ(rollout.num_frames(), 21);
    EXPECT_TRUE(is_finite(last.back())) << memory;
  }
  for (int64_t i = 0; i < last[0].numel(); ++i)
    EXPECT_NEAR(last[0].data<float>()[i], last[1].data<float>()[i], 1e-3);
}

TEST_F(Wan, LongRolloutsStayFlatAndFinite) {
  for (const bool infinite : {false, true}) {
    WanOptions options = sized(longlive_options(infinite));
    options.steps = {1000, 500};
    ChunkRollout rollout(ctx_, *transformer_, text_, options);
    const Tensor latents = frames(3);
    size_t bytes = 0;
    for (int n = 0; n < 24; ++n) {
      if (n == 10) rollout.switch_prompt(ctx_, text_);
      rollout.next_chunk(ctx_, noise_of_seed(ctx_, 5), latents);
      ASSERT_TRUE(is_finite(latents)) << n;
      const size_t now =
          rollout.layers()[0].memory.cache->bytes() + ctx_.workspace().bytes_reserved();
      if (n > 15) {
        EXPECT_EQ(now, bytes) << n;
      }
      bytes = now;
    }
  }
}

TEST_F(Wan, AnotherPromptChangesWhatFollows) {
  const Tensor other = text_.clone();
  for (int64_t i = 0; i < other.numel(); ++i) other.data<float>()[i] *= -1;
  const Tensor kept = frames(3);
  const Tensor switched = frames(3);
  for (const bool is_switched : {false, true}) {
    ChunkRollout rollout(ctx_, *transformer_, text_, sized(longlive_options(false)));
    const Tensor& latents = is_switched ? switched : kept;
    for (int n = 0; n < 6; ++n) {
      if (is_switched && n == 5) rollout.switch_prompt(ctx_, other);
      rollout.next_chunk(ctx_, noise_of_seed(ctx_, 6), latents);
    }
  }
  EXPECT_FALSE(same_bits(kept, switched));
}

TEST_F(Wan, OptionsAreChecked) {
  const auto error = [&](const WanOptions& options, int64_t num_chunks) {
    try {
      RollingRollout(ctx_, *transformer_, text_, options, num_chunks);
    } catch (const Error& caught) {
      return std::string(caught.what());
    }
    return std::string("no error");
  };
  WanOptions options = rolling_forcing_options();
  EXPECT_NE(error(options, 0).find("latent size: expected multiples of 2"), std::string::npos);
  options = sized(options);
  EXPECT_NE(error(options, 4).find("length: expected at least 5 chunks, found 4"),
            std::string::npos);
  options.context_frames = 17;
  EXPECT_NE(error(options, 0).find("window-frames: expected at least 18"), std::string::npos);
  options.steps = {1001};
  EXPECT_NE(error(options, 0).find("denoising step: expected 0..1000, found 1001"),
            std::string::npos);
  options = sized(longlive_options(true));
  options.method = parse_method("dense");  // keeps no frames apart, so its sink cannot move
  EXPECT_THROW(ChunkRollout(ctx_, *transformer_, text_, options), Error);
}

TEST_F(Wan, DecodersGiveFourFramesALatentButOneOfTheFirst) {
  const wan::ModelFiles files = wan::find_model_files(folder());
  const Tensor z = Tensor::zeros(Device{}, DType::kF32, {16, 2, 3});
  const Checkpoint vae_file(files.vae);
  WeightTable vae_table(vae_file, &ctx_);
  const wan::VaeDecoder vae(wan::vae_dim(vae_file), DType::kF32, vae_table);
  const Checkpoint taehv_file(files.taehv);
  WeightTable taehv_table(taehv_file, &ctx_);
  const wan::TaehvDecoder taehv(DType::kF32, taehv_table);
  wan::VaeDecoder::State vae_state;
  wan::TaehvDecoder::State taehv_state;
  for (const int64_t expected : {1, 4, 4}) {
    int64_t vae_count = 0;
    int64_t taehv_count = 0;
    vae.decode(ctx_, z, vae_state, [&](View frame) {
      EXPECT_EQ(frame.shape(), (Shape{16, 24, 3}));
      ++vae_count;
    });
    taehv.decode(ctx_, z, taehv_state, [&](View frame) {
      EXPECT_EQ(frame.shape(), (Shape{16, 24, 3}));
      ++taehv_count;
    });
    EXPECT_EQ(vae_count, expected);
    EXPECT_EQ(taehv_count, expected);
  }
}

TEST(DecoderTiles, CoverAPictureAndOverlapByAQuarter) {
  for (const int64_t latents : {1, 8, 9, 16, 33, 60, 104}) {
    for (const int64_t tile : {0, 8, 12, 32, 200}) {
      SCOPED_TRACE(str(latents, " latents in tiles of ", tile));
      const wan::TileAxis axis = wan::tiles_along(latents, tile);
      EXPECT_EQ(axis.size, tile == 0 ? latents : std::min(tile, latents));
      EXPECT_EQ(axis.begins.front(), 0);
      EXPECT_EQ(axis.begins.back() + axis.size, latents);
      for (size_t i = 1; i < axis.begins.size(); ++i) {
        EXPECT_GT(axis.begins[i], axis.begins[i - 1]);
        EXPECT_LE(axis.begins[i] - axis.begins[i - 1], axis.size - axis.size / 4);
      }
    }
  }
}

// In tiles that need not be cut nothing changes; in smaller ones a picture stays near itself.
TEST_F(Wan, ADecoderInTilesMakesNearlyTheSamePictures) {
  const wan::ModelFiles files = wan::find_model_files(folder());
  for (const auto kind : {wan::DecoderKind::kVae, wan::DecoderKind::kTaehv}) {
    SCOPED_TRACE(kind == wan::DecoderKind::kVae ? "vae" : "taehv");
    const Checkpoint file(kind == wan::DecoderKind::kVae ? files.vae : files.taehv);
    std::vector<std::vector<uint8_t>> videos;
    for (const int64_t tile : {0, 24, 8}) {
      const auto decoder = wan::open_decoder(ctx_, file, kind, DType::kF32, nullptr, tile);
      videos.emplace_back();
      for (uint32_t i = 0; i < 3; ++i) {
        const Tensor z({}, DType::kF32, {16, 12, 20});
        fill_normal(7, i, 0, z.data<float>(), z.numel());
        decoder->decode(ctx_, z, [&](View rgb) {
          EXPECT_EQ(rgb.shape(), (Shape{8 * 12, 8 * 20, 3}));
          videos.back().insert(videos.back().end(), rgb.data<uint8_t>(),
                               rgb.data<uint8_t>() + rgb.numel());
        });
      }
    }
    EXPECT_EQ(videos[0], videos[1]);
    ASSERT_EQ(videos[0].size(), videos[2].size());
    double apart = 0, turned = 0;
    for (size_t i = 0; i < videos[0].size(); ++i) {
      apart += std::abs(int{videos[0][i]} - int{videos[2][i]});
      turned += std::abs(int{videos[0][i]} - int{videos[0][videos[0].size() - 1 - i]});
    }
    EXPECT_GT(apart, 0);
    EXPECT_LT(apart, 0.3 * turned);
  }
}

TEST_F(Wan, FoldersWithoutATransformerAreNamed) {
  const ScratchFolder scratch;
  EXPECT_FALSE(wan::is_model(scratch / "."));
  try {
    wan::find_model_files(scratch / ".");
    ADD_FAILURE() << "no error";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("expected one transformer"), std::string::npos);
  }
}

}  // namespace
}  // namespace longtake
