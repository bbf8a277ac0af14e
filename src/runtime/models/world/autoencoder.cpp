#include "models/world/autoencoder.h"

#include "base/error.h"
#include "nn/convolve.h"
#include "ops/elementwise.h"
#include "ops/image.h"
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
  const View latents = ctx.workspace().take(compute_, {z.dim(1), z.dim(2), z.dim(0)});
  to_channels_last(ctx, z, std_, mean_, latents);
  View x = convolve(ctx, latents, *decoder_.in, DType::kF32);
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
  to_planes(ctx, x, std_, mean_, z);
}

}  // namespace longtake::world
