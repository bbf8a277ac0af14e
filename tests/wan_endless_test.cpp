// Wan rollouts without an end: thousands of chunks of a transformer so small that time is no
// matter. The memory stays what it was, the numbers stay finite, and a place in time far from the
// first frame is as good as any other.
//
// One layer only: what it remembers of a frame depends on nothing but the frame, so a rollout that
// is given the remembered frames anew, from frame 0 on, must go on as the long one does.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/philox.h"
#include "io/safetensors.h"
#include "models/wan/transformer.h"
#include "pipeline/stats.h"
#include "pipeline/wan_actions.h"
#include "pipeline/wan_rollout.h"
#include "runtime_support.h"

namespace longtake {
namespace {

using namespace testing_support;

constexpr int64_t kSide = 4;  // of a latent frame: 2 x 2 tokens

constexpr int64_t kNumChunks = 10'000;

class WanEndless : public testing::Test {
 protected:
  WanEndless() { use(kConfig); }

  // Random weights of these sizes, and a prompt or a picture.
  void use(const wan::TransformerConfig& config) {
    const Checkpoint none;
    WeightTable list(none, nullptr);
    const wan::Transformer shapes(config, DType::kF32, DType::kF32, list);
    std::vector<TensorSpec> specs;
    for (const auto& [name, shape] : list.wanted()) specs.push_back({name, DType::kF32, shape});
    Tensor tensor;
    uint32_t number = 0;
    write_safetensors(scratch_ / "weights", specs, {}, [&](const TensorSpec& spec) {
      tensor = Tensor(Device{}, DType::kF32, spec.shape);
      fill_normal(7, number++, 0, tensor.data<float>(), tensor.numel());
      const float gain =
          std::sqrt(static_cast<float>(spec.shape[0]) / static_cast<float>(tensor.numel()));
      for (int64_t i = 0; i < tensor.numel(); ++i)
        tensor.data<float>()[i] = spec.shape.rank() == 1 ? 1.0F : gain * tensor.data<float>()[i];
      return tensor.view();
    });
    const Checkpoint file(scratch_ / "weights");
    WeightTable table(file, &ctx_);
    transformer_.emplace(config, DType::kF32, DType::kF32, table);
    table.finish();
    text_ = Tensor::zeros(Device{}, DType::kF32, {4, config.text_dim});
    fill_normal(8, 0, 0, text_.data<float>(), text_.numel());
  }

  WanOptions sized(WanOptions options, const std::string& preset = "",
                   const MethodSettings& settings = {}) {
    options.height = options.width = kSide;
    options.method = choose_method(ctx_, options, transformer_->config(), preset, settings);
    return options;
  }

  std::unique_ptr<WanRollout> make(const WanOptions& options) {
    if (options.is_rolling)
      return std::make_unique<RollingRollout>(ctx_, *transformer_, text_, options, 0);
    return std::make_unique<ChunkRollout>(ctx_, *transformer_, text_, options);
  }

  static Tensor frames(int64_t count) {
    return Tensor::zeros(Device{}, DType::kF32, {count, 16, kSide, kSide});
  }

  // Everything that could grow, in bytes.
  size_t bytes(const WanRollout& rollout) {
    return rollout.layers()[0].memory.cache->bytes() + ctx_.workspace().bytes_reserved();
  }

  // Plays all chunks; the newest `kept` frames and the first three are returned.
  std::vector<Tensor> play(WanRollout& rollout, size_t kept) {
    const NoiseSource noise = noise_of_seed(ctx_, 3);
    const Tensor latents = frames(3);
    std::vector<Tensor> first;
    std::deque<Tensor> newest;
    size_t early_bytes = 0, early_peak = 0;
    for (int64_t n = 0; n < kNumChunks; ++n) {
      if (windows_) windows_->fill(ctx_, rollout.num_frames(), *rollout.controls());
      rollout.next_chunk(ctx_, noise, latents);
      for (int64_t f = 0; f < 3; ++f) {
        Tensor frame = frames(1);
        std::copy_n(latents.view().rows(f, f + 1).data<float>(), frame.numel(),
                    frame.data<float>());
        for (int64_t i = 0; i < frame.numel(); ++i) {
          if (!std::isfinite(frame.data<float>()[i])) ADD_FAILURE() << "chunk " << n;
        }
        if (n == 0)
          first.push_back(std::move(frame));
        else
          newest.push_back(std::move(frame));
        if (newest.size() > kept) newest.pop_front();
      }
      if (n == kNumChunks / 10) {
        early_bytes = bytes(rollout);
        early_peak = peak_rss_bytes();
      }
    }
    EXPECT_EQ(bytes(rollout), early_bytes);
    constexpr size_t kSlack = size_t{1} << 20;  // of the allocator, whatever the length
    EXPECT_LE(peak_rss_bytes(), early_peak + kSlack);
    EXPECT_EQ(rollout.num_frames(), 3 * kNumChunks);
    first.insert(first.end(), std::make_move_iterator(newest.begin()),
                 std::make_move_iterator(newest.end()));
    return first;
  }

  // The next chunk of a rollout, with noise that does not know where it is.
  Tensor next(WanRollout& rollout) {
    const NoiseSource seeded = noise_of_seed(ctx_, 4);
    Tensor latents = frames(3);
    rollout.next_chunk(
        ctx_,
        [&](const NoiseDraw& draw, View out) {
          seeded({0, draw.step}, out);
        },
        latents);
    return latents;
  }

  // The long rollout goes on as one that is given what it remembers: the sink if there is one, and
  // the newest `kept` frames.
  void expect_same_far_away(const WanOptions& options, size_t kept) {
    const auto far = make(options);
    const std::vector<Tensor> remembered = play(*far, kept);
    const auto near = make(options);
    for (size_t i = options.sink_frames > 0 ? 0 : 3; i < remembered.size(); ++i)
      near->remember(ctx_, remembered[i]);
    const Tensor expected = next(*near);
    const Tensor found = next(*far);
    double error = 0, size = 0;
    for (int64_t i = 0; i < found.numel(); ++i) {
      const double off = found.data<float>()[i] - expected.data<float>()[i];
      error += off * off;
      size += double{expected.data<float>()[i]} * expected.data<float>()[i];
    }
    EXPECT_LT(std::sqrt(error / size), 1e-4);
    EXPECT_GT(size, 0);
  }

  static constexpr wan::TransformerConfig kConfig{32, 64, 1, 1, 16, 16, 32, 16};

  ScratchFolder scratch_;
  Context ctx_{{}, 1};
  std::optional<wan::Transformer> transformer_;
  Tensor text_;
  std::optional<ActionWindows> windows_;  // of a model with actions
};

TEST_F(WanEndless, SelfForcing) {
  expect_same_far_away(sized(self_forcing_options()), 18);
}

TEST_F(WanEndless, LongLiveWithAMovedSink) {
  expect_same_far_away(sized(longlive_options(/*infinite=*/true)), 6);
}

TEST_F(WanEndless, RollingForcing) {
  const auto rollout = make(sized(rolling_forcing_options()));
  play(*rollout, 3);
}

TEST_F(WanEndless, TempCacheKeepsItsBudget) {
  for (const WanOptions& options : {sized(longlive_options(/*infinite=*/false), "tempcache-lsh"),
                                    sized(rolling_forcing_options(), "all-quant")}) {
    const auto rollout = make(options);
    play(*rollout, 3);
    const auto& cache = *rollout->layers()[0].memory.cache;
    EXPECT_LE(cache.entries(), static_cast<int64_t>(options.method->budget.amount));
    EXPECT_GT(cache.merge_counts().merged + cache.merge_counts().evicted, 0);
  }
}

// Two layers: the last one has no action module.
TEST_F(WanEndless, MatrixGame) {
  use({32, 64, 1, 2, 36, 16, 32, 16, /*reads_image=*/true, {1, 1, 4, 4, /*has_mouse=*/true}});
  for (const char* preset : {"", "tempcache-lsh"}) {
    const auto rollout = make(sized(options_of_family("matrix-game-2"), preset));
    windows_.emplace(ctx_, transformer_->config(),
                     parse_actions(gentle_actions(ActionKind::kWalk), ActionKind::kWalk),
                     *rollout->controls());
    play(*rollout, 3);
  }
}

}  // namespace
}  // namespace longtake
