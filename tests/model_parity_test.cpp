// The engine against a PyTorch run of the same weights and noise, layer by layer
// (training/reference.py). A failure names the first layer that diverges.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <string>
#include <vector>

#include "io/safetensors.h"
#include "models/world/model.h"
#include "ops/linear.h"
#include "pipeline/rollout.h"

namespace longtake {
namespace {

std::string from_environment(const char* name, const char* fallback) {
  const char* value = std::getenv(name);
  return value != nullptr ? value : fallback;
}

// Largest relative L2 distance allowed per layer.
double bound_of(DType compute) {
  return compute == DType::kF32 ? 1e-4 : 2e-2;
}

class Reference {
 public:
  explicit Reference(const std::string& path) : file_(path) {
    const auto stride = file_.index().metadata.find("stride");
    if (stride != file_.index().metadata.end()) stride_ = std::stoll(stride->second);
  }

  bool has(const std::string& name) const { return file_.index().find(name) != nullptr; }

  View operator[](const std::string& name) const {
    const TensorInfo* info = file_.index().find(name);
    EXPECT_NE(info, nullptr) << name;
    return info == nullptr ? View() : file_.view(*info);
  }

  // Relative L2 distance of `found`, of which the reference holds every stride-th row.
  double distance(const std::string& name, View found) const {
    const View expected = (*this)[name];
    if (expected.empty() || found.empty()) return INFINITY;
    const int64_t row = found.numel() / found.dim(0);
    if ((found.dim(0) + stride_ - 1) / stride_ * row != expected.numel()) return INFINITY;
    double difference = 0;
    double norm = 0;
    for (int64_t i = 0; i < expected.numel(); ++i) {
      const double e = expected.data<float>()[i];
      const double f = found.data<float>()[i / row * stride_ * row + i % row];
      difference += (f - e) * (f - e);
      norm += e * e;
    }
    return std::sqrt(difference / norm);
  }

 private:
  SafetensorsFile file_;
  int64_t stride_ = 1;
};

// Compares in the order of the computation; only the first divergence is a failure.
class Comparison {
 public:
  Comparison(const Reference& reference, double bound) : reference_(reference), bound_(bound) {}

  void check(const std::string& name, View found) {
    if (diverged_) return;
    const double distance = reference_.distance(name, found);
    worst_ = std::max(worst_, distance);
    ++count_;
    diverged_ = !(distance <= bound_);
    EXPECT_FALSE(diverged_) << "first divergence: " << name << ", relative L2 " << distance
                            << ", bound " << bound_;
  }

  double worst() const { return worst_; }

  int count() const { return count_; }

 private:
  const Reference& reference_;
  double bound_;
  double worst_ = 0;
  int count_ = 0;
  bool diverged_ = false;
};

// [H, W, C] -> [C, H, W], as PyTorch has pictures.
Tensor channels_first(View image) {
  const int64_t area = image.dim(0) * image.dim(1);
  const int64_t channels = image.dim(2);
  Tensor out(Device{}, DType::kF32, {channels, image.dim(0), image.dim(1)});
  for (int64_t i = 0; i < area; ++i) {
    for (int64_t c = 0; c < channels; ++c)
      out.data<float>()[c * area + i] =
          std::min(1.0F, std::max(-1.0F, image.data<float>()[i * channels + c]));
  }
  return out;
}

class ModelParity : public testing::TestWithParam<DType> {};

// Compares what every layer makes of one frame, pass after pass.
class LayerCheck final : public PassObserver {
 public:
  LayerCheck(Comparison& comparison, int64_t frame) : comparison_(comparison), frame_(frame) {}

  void on_layer(int64_t layer, View x) override {
    if (layer == 0) ++step_;
    comparison_.check(str("frame", frame_, ".step", step_, ".blocks.", layer), x);
  }

 private:
  Comparison& comparison_;
  int64_t frame_;
  int64_t step_ = -1;
};

TEST_P(ModelParity, EveryLayerEqualsPyTorch) {
  const DType compute = GetParam();
  if (compute == DType::kBF16 && !bf16_products_supported())
    GTEST_SKIP() << "no bf16 products on this machine";
  const Reference reference(
      from_environment("LONGTAKE_PARITY_REFERENCE", "tests/data/tiny/reference.safetensors"));
  Context ctx;
  const world::Model model =
      world::load_model(ctx, from_environment("LONGTAKE_PARITY_MODEL", "tests/data/tiny"), compute);
  Comparison comparison(reference, bound_of(compute));

  const View ids = reference["prompt.ids"];
  const Tensor text = model.text_encoder.encode(
      ctx, {ids.data<int32_t>(), static_cast<size_t>(ids.numel())},
      [&](int64_t layer, View x) { comparison.check(str("text.layers.", layer), x); });
  comparison.check("text.output", text);

  constexpr uint64_t kSeed = 7;  // training/reference.py's default
  const auto& sizes = model.config.transformer;
  const auto pixels_per_token = static_cast<float>(sizes.token_pixels());
  const View cameras = reference["cameras"];
  Rollout rollout(ctx, model, text, Method{}, 0);
  Tensor z(ctx.device(), DType::kF32,
           {sizes.latent_channels, sizes.latent_height, sizes.latent_width});
  Tensor pixels(ctx.device(), DType::kF32, {sizes.frame_height(), sizes.frame_width(), 3});
  for (int64_t frame = 0; frame < cameras.dim(0); ++frame) {
    const float* camera = cameras.data<float>() + 2 * frame;
    rollout.begin_frame(ctx, frame, std::lround(camera[0] * pixels_per_token),
                        std::lround(camera[1] * pixels_per_token));
    LayerCheck layers(comparison, frame);
    rollout.denoise(ctx, kSeed, z, &layers);
    comparison.check(str("frame", frame, ".latent"), z);
    rollout.remember(ctx, z, &layers);
    model.autoencoder.decode(ctx, z, pixels);
    comparison.check(str("frame", frame, ".pixels"), channels_first(pixels));
    if (frame > 0) continue;
    Tensor clamped(ctx.device(), DType::kF32, pixels.shape());
    for (int64_t i = 0; i < pixels.numel(); ++i)
      clamped.data<float>()[i] = std::min(1.0F, std::max(-1.0F, pixels.data<float>()[i]));
    Tensor encoded(ctx.device(), DType::kF32, z.shape());
    model.autoencoder.encode(ctx, clamped, encoded);
    comparison.check("encoded.latent", encoded);
  }
  EXPECT_GT(comparison.count(), 10);
  RecordProperty("worst_relative_l2", std::to_string(comparison.worst()));
  std::printf("%s: %d tensors, worst relative L2 %.2e (bound %.0e)\n", name_of(compute),
              comparison.count(), comparison.worst(), bound_of(compute));
}

INSTANTIATE_TEST_SUITE_P(Dtypes, ModelParity, testing::Values(DType::kF32, DType::kBF16),
                         [](const auto& param) { return std::string(name_of(param.param)); });

}  // namespace
}  // namespace longtake
