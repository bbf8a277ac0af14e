// The Wan family on a GPU, held against the CPU: a tiny model with random weights.
#include <gtest/gtest.h>

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "device/buffer.h"
#include "gpu_support.h"
#include "models/wan/decoder.h"
#include "models/wan/model.h"
#include "models/wan/random_model.h"
#include "ops/copy.h"
#include "ops/linear.h"
#include "pipeline/wan_memory.h"
#include "pipeline/wan_session.h"
#include "runtime_support.h"

namespace longtake {
namespace {

using testing_support::ScratchFolder;

constexpr Device kGpu{DeviceKind::kCuda, 0};
constexpr int64_t kHeight = 4, kWidth = 6;  // of a latent frame

Tensor on_host(Context& ctx, View x) {
  Tensor out(Device{}, x.dtype(), x.shape());
  copy(ctx, x, out);
  return out;
}

double distance(View found, View expected) {
  double difference = 0, norm = 0;
  for (int64_t i = 0; i < expected.numel(); ++i) {
    const double e = expected.data<float>()[i];
    const double d = found.data<float>()[i] - e;
    difference += d * d;
    norm += e * e;
  }
  return std::sqrt(difference / norm);
}

bool same_bits(View a, View b) {
  return a.bytes() == b.bytes() && std::equal(a.raw(), a.raw() + a.bytes(), b.raw());
}

class WanDevice : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    scratch_ = new ScratchFolder;
    Context ctx({}, 2);
    wan::write_random_model(ctx, *scratch_ / "model", {.size = "tiny", .dtype = DType::kF32});
  }

  static void TearDownTestSuite() { delete scratch_; }

  void SetUp() override { cuda::skip_without_gpu(); }

  static wan::ModelFiles files() { return wan::find_model_files(*scratch_ / "model"); }

  static ScratchFolder* scratch_;
};

ScratchFolder* WanDevice::scratch_ = nullptr;

// A rollout with all that it needs.
class Played {
 public:
  Played(Device device, DType dtype, const std::string& family, const std::string& method,
         const wan::ModelFiles& files)
      : ctx(device, 2), transformer_(wan::load_transformer(ctx, files, dtype, DType::kF32)) {
    WanOptions options = options_of_family(family);
    options.dtype = dtype;
    options.height = kHeight;
    options.width = kWidth;
    options.expected_frames = 6;  // the full history grows beyond
    options.method = choose_method(ctx, options, transformer_->config(), method, {});
    text_ = Tensor(Device{}, DType::kF32, {8, transformer_->config().text_dim});
    Context host({}, 1);
    noise_of_seed(host, 1)({0, 0}, text_.view().reshape({1, text_.numel()}));
    const View padding = text_.view().rows(5, 8);
    std::fill_n(padding.data<float>(), padding.numel(), 0.0F);
    if (options.is_rolling)
      rollout = std::make_unique<RollingRollout>(ctx, *transformer_, text_, options, 0);
    else
      rollout = std::make_unique<ChunkRollout>(ctx, *transformer_, text_, options);
    latents_ = Tensor(device, DType::kF32, {options.chunk_frames, 16, kHeight, kWidth});
  }

  Tensor next() {
    rollout->next_chunk(ctx, noise_of_seed(ctx, 5), latents_);
    Tensor out = on_host(ctx, latents_);
    rollout->expect_finite();
    return out;
  }

  void switch_prompt() {
    Tensor other = text_.clone();
    for (int64_t i = 0; i < other.numel(); ++i) other.data<float>()[i] *= -1;
    rollout->switch_prompt(ctx, other);
  }

  Context ctx;
  std::unique_ptr<WanRollout> rollout;

 private:
  std::unique_ptr<wan::Transformer> transformer_;
  Tensor text_, latents_;
};

class WanDeviceMethod
    : public WanDevice,
      public testing::WithParamInterface<std::tuple<DType, const char*, const char*>> {
 protected:
  void SetUp() override {
    WanDevice::SetUp();
    const auto& [dtype, family, method] = GetParam();
    const std::string name = method;
    if (name == "dense" && (family == std::string("longlive-infinite") || family[0] == 'r'))
      GTEST_SKIP() << "no policy that keeps the sink apart";
  }

  std::unique_ptr<Played> make(Device device) const {
    const auto& [dtype, family, method] = GetParam();
    return std::make_unique<Played>(device, dtype, family, method, files());
  }
};

// Live, recorded and replayed chunks, and those behind a switch of the prompt. Rollouts are
// chaotic, so few chunks tell.
TEST_P(WanDeviceMethod, FirstChunksAreTheCpus) {
  const auto& [dtype, family, method] = GetParam();
  if (std::string(method).find("ann") == 0 || std::string(method).find("all") == 0)
    GTEST_SKIP() << "a GPU selects by exact products, the CPU by estimates";
  if (dtype == DType::kBF16 && !bf16_products_supported())
    GTEST_SKIP() << "no bf16 products on this CPU";
  const auto cpu = make({}), gpu = make(kGpu);
  const bool merges = std::string(method).find("tempcache") == 0;
  for (int i = 0; i < 6; ++i) {
    if (i == 4) {
      cpu->switch_prompt();
      gpu->switch_prompt();
    }
    const double error = distance(gpu->next(), cpu->next());
    EXPECT_LE(error, dtype == DType::kF32 ? (merges ? 1e-2 : 1e-3) : 4e-2) << "chunk " << i;
    std::printf("chunk %d: %.1e\n", i, error);
  }
}

// Once all kinds of passes are recorded nothing is allocated, what comes out depends on the chunk,
// and a second rollout gives the same bits.
TEST_P(WanDeviceMethod, ReplaysAreSteadyAndRepeatable) {
  const auto first = make(kGpu), second = make(kGpu);
  std::vector<Tensor> all;
  uint64_t before = 0;
  constexpr int kChunks = 14;
  for (int i = 0; i < kChunks; ++i) {
    if (i == kChunks - 3) before = num_buffer_allocations();
    all.push_back(first->next());
  }
  EXPECT_EQ(num_buffer_allocations(), before + 3 * 2)
      << "the copy that next() returns, the noise's clock";
  for (int i = 0; i < kChunks; ++i) {
    EXPECT_TRUE(same_bits(second->next(), all[static_cast<size_t>(i)])) << "chunk " << i;
    if (i == 0) continue;
    EXPECT_FALSE(same_bits(all[static_cast<size_t>(i)], all[static_cast<size_t>(i) - 1])) << i;
  }
}

INSTANTIATE_TEST_SUITE_P(
    All, WanDeviceMethod,
    testing::Combine(testing::Values(DType::kF32, DType::kBF16),
                     testing::Values("self-forcing", "causal-forcing-framewise", "longlive",
                                     "longlive-infinite", "rolling-forcing"),
                     testing::Values("", "dense", "tempcache-lsh", "annca-quant", "all-lsh")),
    [](const auto& param) {
      std::string name = std::string(name_of(std::get<0>(param.param))) + "_" +
                         std::get<1>(param.param) + "_" + std::get<2>(param.param);
      for (char& c : name) c = std::isalnum(static_cast<unsigned char>(c)) ? c : '_';
      return name;
    });

// A given past, longer than a chunk and not a multiple of it.
TEST_F(WanDevice, GivenLatentsAreRemembered) {
  for (const char* family : {"self-forcing", "longlive-infinite", "rolling-forcing"}) {
    SCOPED_TRACE(family);
    const Tensor given(Device{}, DType::kF32, {7, 16, kHeight, kWidth});
    Context host({}, 1);
    noise_of_seed(host, 9)({0, 0}, given);
    Played cpu({}, DType::kF32, family, "", files()), gpu(kGpu, DType::kF32, family, "", files());
    cpu.rollout->remember(cpu.ctx, given);
    gpu.rollout->remember(gpu.ctx, given);
    for (int i = 0; i < 3; ++i) EXPECT_LE(distance(gpu.next(), cpu.next()), 1e-3) << i;
  }
}

// Pictures of either decoder, replayed from the third latent on, and latents of either encoder.
TEST_F(WanDevice, CodersAreTheCpus) {
  for (const auto kind : {wan::DecoderKind::kVae, wan::DecoderKind::kTaehv}) {
    for (const DType dtype : {DType::kF32, DType::kBF16}) {
      if (dtype == DType::kBF16 && !bf16_products_supported()) continue;
      SCOPED_TRACE(kind == wan::DecoderKind::kVae ? "vae" : "taehv");
      const Checkpoint file(kind == wan::DecoderKind::kVae ? files().vae : files().taehv);
      std::vector<std::vector<uint8_t>> pictures[2];
      std::vector<Tensor> latents[2];
      for (const size_t side : {0, 1}) {
        Context ctx(side == 0 ? Device{} : kGpu, 2);
        const auto decoder = wan::open_decoder(ctx, file, kind, dtype);
        const auto encoder = wan::open_encoder(ctx, file, kind, dtype);
        const Tensor z(ctx.device(), DType::kF32, {1, 16, 5, 7});
        const auto noise = noise_of_seed(ctx, 3);
        for (int64_t n = 0; n < 5; ++n) {
          noise({n, 0}, z);
          decoder->decode(ctx, z.view().reshape({16, 5, 7}), [&](View rgb) {
            pictures[side].emplace_back(rgb.data<uint8_t>(), rgb.data<uint8_t>() + rgb.numel());
          });
        }
        const auto keep = [&](View found) { latents[side].push_back(on_host(ctx, found)); };
        for (auto& picture : pictures[0])  // both encode the CPU's
          encoder->encode(ctx, View(picture.data(), DType::kU8, Device{}, {40, 56, 3}), keep);
        encoder->finish(ctx, keep);
      }
      ASSERT_EQ(pictures[0].size(), 17U);
      ASSERT_EQ(pictures[1].size(), 17U);
      for (size_t i = 0; i < pictures[0].size(); ++i) {
        int most = 0;
        for (size_t j = 0; j < pictures[0][i].size(); ++j)
          most = std::max(most, std::abs(int{pictures[0][i][j]} - int{pictures[1][i][j]}));
        EXPECT_LE(most, dtype == DType::kF32 ? 1 : 12) << "picture " << i;
      }
      ASSERT_EQ(latents[0].size(), 5U);
      ASSERT_EQ(latents[1].size(), 5U);
      for (size_t i = 0; i < latents[0].size(); ++i)
        EXPECT_LE(distance(latents[1][i], latents[0][i]), dtype == DType::kF32 ? 1e-3 : 3e-2) << i;
    }
  }
}

// A whole video with a switch of the prompt: counts, costs, and the memory that was foretold.
TEST_F(WanDevice, ASessionPlays) {
  Context ctx(kGpu, 2);
  const size_t free_before = free_memory_bytes(kGpu);
  const auto transformer = wan::load_transformer(ctx, files(), DType::kBF16, DType::kF32);
  const Checkpoint file(files().vae);
  const auto decoder = wan::open_decoder(ctx, file, wan::DecoderKind::kVae, DType::kBF16);
  WanSessionOptions options;
  options.rollout = longlive_options(/*infinite=*/false);
  options.rollout.dtype = DType::kBF16;
  options.rollout.height = kHeight;
  options.rollout.width = kWidth;
  options.rollout.method =
      choose_method(ctx, options.rollout, transformer->config(), "tempcache-lsh", {});
  const Tensor text = Tensor::zeros({}, DType::kF32, {8, transformer->config().text_dim});
  WanSession session(ctx, *transformer, *decoder, text, options);
  int64_t frames = 0;
  for (int chunk = 0; chunk < 8; ++chunk) {
    if (chunk == 5) session.switch_prompt(text);
    session.next_chunk([&](View rgb) {
      EXPECT_EQ(rgb.shape(), (Shape{8 * kHeight, 8 * kWidth, 3}));
      ++frames;
    });
    const ChunkStats& cost = session.last_chunk();
    EXPECT_GT(cost.denoise_ms, 0);
    EXPECT_GT(cost.clean_ms, 0);
    EXPECT_GT(cost.decode_ms, 0);
    EXPECT_GT(cost.cache_total_entries, 0);
  }
  EXPECT_EQ(frames, wan::frames_of_latents(24));
  // Less than nothing, where another process gave memory back meanwhile.
  const int64_t taken =
      static_cast<int64_t>(free_before) - static_cast<int64_t>(free_memory_bytes(kGpu));
  EXPECT_LE(taken, static_cast<int64_t>(memory_to_play(options.rollout, transformer->config(), file,
                                                       wan::DecoderKind::kVae, kGpu)
                                            .total()));
}

// Pictures that are decoded while the next chunk is made are those that are decoded after it, and a
// chunk that is prepared ahead follows the prompt it was told.
TEST_F(WanDevice, DecodingBesideTheNextChunkChangesNothing) {
  Context ctx(kGpu, 2);
  const auto transformer = wan::load_transformer(ctx, files(), DType::kBF16, DType::kF32);
  constexpr int kChunks = 5;
  const Tensor text = Tensor::zeros({}, DType::kF32, {8, transformer->config().text_dim});
  const Tensor other = text.clone();
  std::fill_n(other.data<float>(), other.numel(), 0.5F);
  std::vector<std::vector<std::vector<uint8_t>>> videos;
  for (const bool ahead : {false, true}) {
    const auto decoder =
        wan::open_decoder(ctx, Checkpoint(files().vae), wan::DecoderKind::kVae, DType::kBF16);
    WanSessionOptions options;
    options.rollout = longlive_options(/*infinite=*/false);
    options.rollout.dtype = DType::kBF16;
    options.rollout.height = kHeight;
    options.rollout.width = kWidth;
    std::vector<int64_t> begun;
    WanSession* playing = nullptr;
    const auto prepare = [&](int64_t first_frame) {
      if (begun.size() == kChunks) return false;
      if (begun.size() == 2) playing->switch_prompt(other);
      begun.push_back(first_frame);
      return true;
    };
    if (ahead) options.before_chunk = prepare;
    WanSession session(ctx, *transformer, *decoder, text, options);
    playing = &session;
    std::vector<std::vector<uint8_t>> video;
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      if (!ahead) prepare(session.num_frames());
      session.next_chunk([&](View rgb) {
        video.emplace_back(rgb.data<uint8_t>(), rgb.data<uint8_t>() + rgb.numel());
      });
      EXPECT_EQ(session.last_chunk().num_frames, chunk == 0 ? 9 : 12);
      EXPECT_GT(session.last_chunk().decode_ms, 0);
    }
    EXPECT_EQ(begun, (std::vector<int64_t>{0, 9, 21, 33, 45}));
    if (ahead) session.next_chunk([](View) { ADD_FAILURE() << "a frame behind the last one"; });
    videos.push_back(std::move(video));
  }
  EXPECT_EQ(videos[0], videos[1]);
}

}  // namespace
}  // namespace longtake
