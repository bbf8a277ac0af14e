// Whole rollouts on a GPU, held against the CPU's: the same seed, the same first frames.
#include <gtest/gtest.h>

#include <cctype>
#include <cmath>
#include <string>
#include <tuple>
#include <vector>

#include "device/buffer.h"
#include "gpu_support.h"
#include "models/world/model.h"
#include "ops/copy.h"
#include "pipeline/session.h"
#include "runtime_support.h"

namespace longtake {
namespace {

using testing_support::kTinyModel;
using testing_support::ScratchFolder;

constexpr Device kGpu{DeviceKind::kCuda, 0};

SessionOptions options_of(const std::string& method) {
  SessionOptions options;
  options.prompt = "a winter land with a red tower .";
  options.seed = 5;
  options.method = parse_method(method);
  options.expected_frames = 24;
  return options;
}

CameraPosition camera_at(int64_t frame) {
  // Out and back, so that what was seen comes again.
  const int64_t step = frame % 12;
  return {1024 + 8 * (step < 6 ? step : 12 - step), 1024};
}

std::vector<float> latent_of(const Session& session) {
  Tensor host({}, DType::kF32, session.latent().shape());
  Context ctx(session.latent().device());
  copy(ctx, session.latent(), host);
  return {host.data<float>(), host.data<float>() + host.numel()};
}

struct Played {
  std::vector<std::vector<float>> latents;
  std::vector<std::vector<uint8_t>> frames;
  std::vector<ChunkStats> chunks;
};

Played play(Session& session, int64_t frames) {
  Played out;
  for (int64_t i = 0; i < frames; ++i) {
    const View rgb = session.step(camera_at(session.next_frame()));
    out.frames.emplace_back(rgb.data<uint8_t>(), rgb.data<uint8_t>() + rgb.numel());
    out.latents.push_back(latent_of(session));
    out.chunks.push_back(session.last_chunk());
  }
  return out;
}

Played play(Device device, DType dtype, const std::string& method, int64_t frames) {
  Context ctx(device, 2);
  const auto model = world::load_model(ctx, kTinyModel, dtype);
  Session session(ctx, model, options_of(method));
  return play(session, frames);
}

double distance(const std::vector<float>& found, const std::vector<float>& expected) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double d = double{found[i]} - double{expected[i]};
    difference += d * d;
    norm += double{expected[i]} * double{expected[i]};
  }
  return std::sqrt(difference / norm);
}

class DeviceSession : public testing::Test {
 protected:
  void SetUp() override { cuda::skip_without_gpu(); }
};

class DeviceMethod : public DeviceSession,
                     public testing::WithParamInterface<std::tuple<DType, const char*>> {};

// Rollouts are chaotic: the first frames tell whether both compute the same.
TEST_P(DeviceMethod, FirstFramesAreTheCpus) {
  const auto& [dtype, method] = GetParam();
  const std::string name = method;
  if (name.find("ann") == 0 || name.find("all") == 0)
    GTEST_SKIP() << "a GPU selects by exact products, the CPU by estimates";
  constexpr int64_t kFrames = 4;
  const Played cpu = play(Device{}, dtype, method, kFrames);
  const Played gpu = play(kGpu, dtype, method, kFrames);
  for (size_t i = 0; i < kFrames; ++i) {
    const double error = distance(gpu.latents[i], cpu.latents[i]);
    EXPECT_LE(error, dtype == DType::kF32 ? 1e-3 : 2e-2) << "frame " << i;
  }
}

// From the third frame on a session replays a record; nothing is allocated then, what comes out
// depends on the frame, and a second session gives the same bits.
TEST_P(DeviceMethod, ReplaysAreSteadyAndRepeatable) {
  const auto& [dtype, method] = GetParam();
  Context ctx(kGpu, 2);
  const auto model = world::load_model(ctx, kTinyModel, dtype);
  Session session(ctx, model, options_of(method));
  const Played first = play(session, 12);
  const uint64_t before = num_buffer_allocations();
  for (int64_t i = 0; i < 4; ++i) session.step(camera_at(session.next_frame()));
  EXPECT_EQ(num_buffer_allocations(), before);
  Session again(ctx, model, options_of(method));
  const Played second = play(again, 12);
  for (size_t i = 0; i < 12; ++i) {
    EXPECT_EQ(first.frames[i], second.frames[i]) << "frame " << i;
    if (i == 0) continue;
    EXPECT_NE(first.latents[i], first.latents[i - 1]) << "frame " << i;
  }
}

// The history is the same size as on the CPU, or nearly where keys merge by distances that round.
TEST_P(DeviceMethod, KeepsAsManyKeys) {
  const auto& [dtype, method] = GetParam();
  constexpr int64_t kFrames = 14;
  const Played cpu = play(Device{}, dtype, method, kFrames);
  const Played gpu = play(kGpu, dtype, method, kFrames);
  for (size_t i = 0; i < kFrames; ++i) {
    const auto expected = static_cast<double>(cpu.chunks[i].cache_total_entries);
    const auto found = static_cast<double>(gpu.chunks[i].cache_total_entries);
    const bool merges =
        std::string(method).find("tempcache") == 0 || std::string(method).find("all") == 0;
    EXPECT_NEAR(found, expected, merges ? 0.1 * expected : 0) << "frame " << i;
  }
}

INSTANTIATE_TEST_SUITE_P(All, DeviceMethod,
                         testing::Combine(testing::Values(DType::kF32, DType::kBF16),
                                          testing::Values("dense", "window:4", "tempcache-lsh",
                                                          "tempcache-quant", "annsa-lsh",
                                                          "annca-lsh", "all-lsh", "teacache")),
                         [](const auto& param) {
                           std::string name = std::string(name_of(std::get<0>(param.param))) + "_" +
                                              std::get<1>(param.param);
                           for (char& c : name)
                             c = std::isalnum(static_cast<unsigned char>(c)) ? c : '_';
                           return name;
                         });

TEST_F(DeviceSession, ASavedSessionGoesOn) {
  for (const char* method : {"window:4", "tempcache-lsh"}) {
    SCOPED_TRACE(method);
    const ScratchFolder scratch;
    Context ctx(kGpu, 2);
    const auto model = world::load_model(ctx, kTinyModel, DType::kBF16);
    Session whole(ctx, model, options_of(method));
    play(whole, 8);
    whole.save(scratch / "state", {});
    Session resumed(ctx, model, options_of(method));
    resumed.load(scratch / "state");
    const Played expected = play(whole, 4), found = play(resumed, 4);
    for (size_t i = 0; i < 4; ++i) EXPECT_EQ(found.frames[i], expected.frames[i]) << i;
  }
}

TEST_F(DeviceSession, AGivenFrameIsRemembered) {
  Context ctx(kGpu, 2);
  const auto model = world::load_model(ctx, kTinyModel, DType::kBF16);
  std::vector<uint8_t> grey(size_t{128} * 256 * 3, 128);
  Session plain(ctx, model, options_of("dense")), primed(ctx, model, options_of("dense"));
  primed.remember(View(grey.data(), DType::kU8, Device{}, {128, 256, 3}), camera_at(0));
  play(plain, 1);
  EXPECT_NE(play(plain, 1).frames, play(primed, 1).frames);
}

}  // namespace
}  // namespace longtake
