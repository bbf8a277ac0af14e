#include "models/world/autoencoder.h"

#include <cmath>

#include "base/error.h"
#include "nn/convolve.h"
#include "ops/elementwise.h"
#include "ops/norm.h"
#include "ops/pixel_shuffle.h"

namespace longtake::world {
namespace {

constexpr int64_t kColours = 3;
constexpr int64_t kShuffled = 4;  // channels of one pixel after a 2 x 2 block became one

View norm_silu(Context& ctx, View x, const Tensor& weight, DType dtype) {
  const View out = ctx.workspace().take(dtype, x.shape());
  rms_norm_silu(ctx, x, weight, kChannelNormEps, out);
  return out;
}

// A convolution to four times the channels, which become a picture of twice the size.
View upsample(Context& ctx, View x, const ConvWeight& weight, DType compute) {
  const View small = convolve(ctx, converted(ctx, x, compute), weight, DType::kF32);
  const View large = ctx.workspace().take(
      DType::kF32, {2 * small.dim(0), 2 * small.dim(1), small.dim(2) / kShuffled});
  pixel_shuffle(ctx, small, large);
  return large;
}

}  // namespace

void Autoencoder::Residual::list(WeightTable& table, const std::string& name, int64_t channels,
                                 DType compute) {
  table.tensor(name + ".norm1.weight", {channels}, norm1);
  table.conv(name + ".conv1", channels, channels, compute, conv1);
  table.tensor(name + ".norm2.weight", {channels}, norm2);
  table.conv(name + ".conv2", channels, channels, compute, conv2);
}

void Autoencoder::Residual::forward(Context& ctx, View x) const {
  const Workspace::Scope scope(ctx.workspace());
  const DType compute = conv1->compute_dtype();
  const View h = convolve(ctx, norm_silu(ctx, x, norm1, compute), *conv1, compute);
  const View y = convolve(ctx, norm_silu(ctx, h, norm2, compute), *conv2, compute);
  add(ctx, x, y);
}

Autoencoder::Autoencoder(const AutoencoderConfig& config, DType compute, WeightTable& table)
    : compute_(compute) {
  const auto [w0, w1, w2] = config.widths;
  const int64_t channels = config.latent_channels;
  table.tensor("autoencoder.latent_mean", {channels}, mean_);
  table.tensor("autoencoder.latent_std", {channels}, std_);

  auto at = [](int n) { return str("autoencoder.encoder.", n); };
  table.conv(at(1), w0, kShuffled * kColours, compute, encoder_.in);
  encoder_.res1.list(table, at(2), w0, compute);
  table.conv(at(3), w1, w0, compute, encoder_.down1, {.stride = 2});
  encoder_.res2a.list(table, at(4), w1, compute);
  encoder_.res2b.list(table, at(5), w1, compute);
  table.conv(at(6), w2, w1, compute, encoder_.down2, {.stride = 2});
  encoder_.res3a.list(table, at(7), w2, compute);
  encoder_.res3b.list(table, at(8), w2, compute);
  table.tensor(at(9) + ".weight", {w2}, encoder_.norm);
  table.conv(at(11), channels, w2, compute, encoder_.out);

  auto to = [](int n) { return str("autoencoder.decoder.", n); };
  table.conv(to(0), w2, channels, compute, decoder_.in);
  decoder_.res1a.list(table, to(1), w2, compute);
  decoder_.res1b.list(table, to(2), w2, compute);
  table.conv(to(3), kShuffled * w1, w2, compute, decoder_.up1);
  decoder_.res2a.list(table, to(5), w1, compute);
  decoder_.res2b.list(table, to(6), w1, compute);
  table.conv(to(7), kShuffled * w0, w1, compute, decoder_.up2);
  decoder_.res3.list(table, to(9), w0, compute);
  table.tensor(to(10) + ".weight", {w0}, decoder_.norm);
  table.conv(to(12), kShuffled * kColours, w0, compute, decoder_.out);
}

void Autoencoder::decode(Context& ctx, View z, View pixels) const {
  const Workspace::Scope scope(ctx.workspace());
  const int64_t channels = z.dim(0);
  const int64_t area = z.dim(1) * z.dim(2);
  const View latents = ctx.workspace().take(DType::kF32, {z.dim(1), z.dim(2), channels});
  for (int64_t i = 0; i < area; ++i) {
    for (int64_t c = 0; c < channels; ++c)
      latents.data<float>()[i * channels + c] =
          z.data<float>()[c * area + i] * std_.data<float>()[c] + mean_.data<float>()[c];
  }
  View x = convolve(ctx, converted(ctx, latents, compute_), *decoder_.in, DType::kF32);
  decoder_.res1a.forward(ctx, x);
  decoder_.res1b.forward(ctx, x);
  x = upsample(ctx, x, *decoder_.up1, compute_);
  decoder_.res2a.forward(ctx, x);
  decoder_.res2b.forward(ctx, x);
  x = upsample(ctx, x, *decoder_.up2, compute_);
  decoder_.res3.forward(ctx, x);
  x = convolve(ctx, norm_silu(ctx, x, decoder_.norm, compute_), *decoder_.out, DType::kF32);
  pixel_shuffle(ctx, x, pixels);
}

void Autoencoder::encode(Context& ctx, View pixels, View z) const {
  const Workspace::Scope scope(ctx.workspace());
  View x = ctx.workspace().take(DType::kF32,
                                {pixels.dim(0) / 2, pixels.dim(1) / 2, kShuffled * kColours});
  pixel_unshuffle(ctx, pixels, x);
  x = convolve(ctx, converted(ctx, x, compute_), *encoder_.in, DType::kF32);
  encoder_.res1.forward(ctx, x);
  x = convolve(ctx, converted(ctx, x, compute_), *encoder_.down1, DType::kF32);
  encoder_.res2a.forward(ctx, x);
  encoder_.res2b.forward(ctx, x);
  x = convolve(ctx, converted(ctx, x, compute_), *encoder_.down2, DType::kF32);
  encoder_.res3a.forward(ctx, x);
  encoder_.res3b.forward(ctx, x);
  x = convolve(ctx, norm_silu(ctx, x, encoder_.norm, compute_), *encoder_.out, DType::kF32);

  const int64_t channels = z.dim(0);
  const int64_t area = z.dim(1) * z.dim(2);
  LONGTAKE_CHECK(x.numel() == z.numel(), x.shape().to_string(), " for ", z.shape().to_string());
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t i = 0; i < area; ++i)
      z.data<float>()[c * area + i] =
          (x.data<float>()[i * channels + c] - mean_.data<float>()[c]) / std_.data<float>()[c];
  }
}

void to_rgb(View pixels, View rgb) {
  const float* from = pixels.data<float>();
  auto* to = rgb.data<uint8_t>();
  for (int64_t i = 0; i < pixels.numel(); ++i) {
    const float value = (from[i] + 1.0F) * 127.5F;
    to[i] = value >= 255.0F ? 255 : value > 0.0F ? static_cast<uint8_t>(value + 0.5F) : 0;
  }
}

void from_rgb(View rgb, View pixels) {
  const auto* from = rgb.data<uint8_t>();
  auto* to = pixels.data<float>();
  for (int64_t i = 0; i < rgb.numel(); ++i) to[i] = static_cast<float>(from[i]) / 127.5F - 1.0F;
}

}  // namespace longtake::world
