#include "models/wan/vae.h"

#include <cmath>

#include "attention/relative.h"
#include "base/error.h"
#include "nn/convolve.h"
#include "ops/copy.h"
#include "ops/elementwise.h"
#include "ops/image.h"
#include "ops/norm.h"

namespace longtake::wan {
namespace {

// The norm divides by the length of a pixel's channels, at least 1e-12: nothing else is added.
constexpr float kVaeEps = 1e-26F;
constexpr int64_t kTaps = 3;
constexpr int64_t kColours = 3;

// Channels [begin, begin + count) of [H, W, C] f32, as an image of their own.
View channels_of(Context& ctx, View x, int64_t begin, int64_t count) {
  const View out = ctx.workspace().take(DType::kF32, {x.dim(0), x.dim(1), count});
  slice_channels(ctx, x, begin, out);
  return out;
}

}  // namespace

View norm_silu(Context& ctx, View x, const Tensor& gamma, DType dtype) {
  const View out = ctx.workspace().take(dtype, x.shape());
  rms_norm_silu(ctx, x, gamma.view().reshape({gamma.numel()}), kVaeEps, out);
  return out;
}

void CausalConv::list(WeightTable& table, const std::string& name, int64_t out, int64_t in,
                      int64_t kernel, DType compute) {
  table.conv(name, out, in, compute, weight, {.kernel = kernel, .taps = kTaps});
}

View CausalConv::forward(Context& ctx, View x, FrameHistory& history, DType dtype) const {
  for (Tensor& frame : history) {
    if (frame.empty()) frame = Tensor::zeros(ctx.device(), x.dtype(), x.shape());
  }
  const View parts[] = {history[0], history[1], x};
  const View out = convolve(ctx, parts, *weight, dtype);
  // Every frame keeps its place, so that a recorded step can be replayed.
  copy(ctx, history[1], history[0]);
  copy(ctx, x, history[1]);
  return out;
}

void VaeResidual::list(WeightTable& table, const std::string& name, int64_t out, int64_t in,
                       DType compute) {
  table.tensor(name + "residual.0.gamma", {in, 1, 1, 1}, norm1);
  conv1.list(table, name + "residual.2", out, in, 3, compute);
  table.tensor(name + "residual.3.gamma", {out, 1, 1, 1}, norm2);
  conv2.list(table, name + "residual.6", out, out, 3, compute);
  if (in != out)
    table.conv(name + "shortcut", out, in, compute, shortcut, {.kernel = 1, .taps = 1});
}

View VaeResidual::forward(Context& ctx, View x, State& state) const {
  const DType compute = conv1.weight->compute_dtype();
  const View out =
      ctx.workspace().take(DType::kF32, {x.dim(0), x.dim(1), conv1.weight->out_channels()});
  const Workspace::Scope scope(ctx.workspace());
  const View h = conv1.forward(ctx, norm_silu(ctx, x, norm1, compute), state[0], DType::kF32);
  const View y = conv2.forward(ctx, norm_silu(ctx, h, norm2, compute), state[1], DType::kF32);
  if (shortcut)
    conv2d(ctx, converted(ctx, x, compute), *shortcut, out);
  else
    convert(ctx, x, out);
  add(ctx, out, y);
  return out;
}

void VaeAttention::list(WeightTable& table, const std::string& name, int64_t channels,
                        DType compute) {
  table.tensor(name + "norm.gamma", {channels, 1, 1}, norm);
  table.conv(name + "to_qkv", 3 * channels, channels, compute, to_qkv, {.kernel = 1});
  table.conv(name + "proj", channels, channels, compute, proj, {.kernel = 1});
}

void VaeAttention::forward(Context& ctx, View x) const {
  const Workspace::Scope scope(ctx.workspace());
  const DType compute = proj->compute_dtype();
  const int64_t channels = x.dim(2);
  const Shape tokens{x.dim(0) * x.dim(1), 1, channels};
  const View h = ctx.workspace().take(compute, x.shape());
  rms_norm(ctx, x, norm.view().reshape({channels}), kVaeEps, h);
  const View qkv = convolve(ctx, h, *to_qkv, DType::kF32);
  const View q = channels_of(ctx, qkv, 0, channels);
  const View k = channels_of(ctx, qkv, channels, channels);
  const View v = channels_of(ctx, qkv, 2 * channels, channels);
  axpby(ctx, 1 / std::sqrt(static_cast<float>(channels)), q, 0, q, q);
  const View mixed = ctx.workspace().take(compute, x.shape());
  attend_relative(ctx, q.reshape(tokens), k.reshape(tokens), v.reshape(tokens), View(),
                  mixed.reshape(tokens));
  add(ctx, x, convolve(ctx, mixed, *proj, DType::kF32));
}

void VaeUpsample::list(WeightTable& table, const std::string& name, int64_t channels,
                       bool is_temporal, DType compute) {
  if (is_temporal) time_conv.list(table, name + "time_conv", 2 * channels, channels, 1, compute);
  table.conv(name + "resample.1", channels / 2, channels, compute, conv);
}

void VaeUpsample::forward(Context& ctx, View x, State& state, const FrameSink& next) const {
  const Workspace::Scope scope(ctx.workspace());
  const DType compute = conv->compute_dtype();
  const auto enlarge = [&](View frame) {
    const Workspace::Scope frame_scope(ctx.workspace());
    const View large =
        ctx.workspace().take(compute, {2 * frame.dim(0), 2 * frame.dim(1), frame.dim(2)});
    upsample_nearest(ctx, converted(ctx, frame, compute), large);
    next(convolve(ctx, large, *conv, DType::kF32));
  };
  // A video's first frame stays one, and is not remembered.
  const bool is_first = !state.has_begun;
  state.has_begun = true;
  if (!time_conv.weight || is_first) return enlarge(x);
  const View both = time_conv.forward(ctx, converted(ctx, x, compute), state.history, DType::kF32);
  for (int64_t half = 0; half < 2; ++half)
    enlarge(channels_of(ctx, both, half * x.dim(2), x.dim(2)));
}

VaeDecoder::VaeDecoder(int64_t dim, DType compute, WeightTable& table) : compute_(compute) {
  // Channels in and out of each group's blocks; an upsampling halves them.
  const std::array<std::pair<int64_t, int64_t>, kGroups> widths = {
      {{4 * dim, 4 * dim}, {2 * dim, 4 * dim}, {2 * dim, 2 * dim}, {dim, dim}}};
  const int64_t widest = 4 * dim;
  table.constant(kLatentMean, latent_mean_);
  table.constant(kLatentStd, latent_std_);
  table.conv("conv2", kLatentChannels, kLatentChannels, compute, conv2_, {.kernel = 1, .taps = 1});
  in_.list(table, "decoder.conv1", widest, kLatentChannels, 3, compute);
  middle1_.list(table, "decoder.middle.0.", widest, widest, compute);
  attention_.list(table, "decoder.middle.1.", widest, compute);
  middle2_.list(table, "decoder.middle.2.", widest, widest, compute);
  int number = 0;
  const auto name = [&] { return str("decoder.upsamples.", number++, "."); };
  for (size_t g = 0; g < kGroups; ++g) {
    const auto [in, out] = widths[g];
    for (size_t b = 0; b < kGroupBlocks; ++b)
      blocks_[g][b].list(table, name(), out, b == 0 ? in : out, compute);
    if (g + 1 < kGroups) upsamples_[g].list(table, name(), out, /*is_temporal=*/g < 2, compute);
  }
  table.tensor("decoder.head.0.gamma", {dim, 1, 1, 1}, head_norm_);
  out_.list(table, "decoder.head.2", kColours, dim, 3, compute);
  table.ignore("encoder.");
  table.ignore("conv1.");
}

void VaeDecoder::decode(Context& ctx, View z, State& state, const FrameSink& sink) const {
  const Workspace::Scope scope(ctx.workspace());
  const View latents = ctx.workspace().take(compute_, {z.dim(1), z.dim(2), kLatentChannels});
  to_channels_last(ctx, z, latent_std_, latent_mean_, latents);
  const View entering = convolve(ctx, latents, *conv2_, compute_);
  View x = in_.forward(ctx, entering, state.in, DType::kF32);
  x = middle1_.forward(ctx, x, state.middle[0]);
  attention_.forward(ctx, x);
  x = middle2_.forward(ctx, x, state.middle[1]);
  run_group(ctx, 0, x, state, sink);
}

void VaeDecoder::run_group(Context& ctx, size_t index, View x, State& state,
                           const FrameSink& sink) const {
  const Workspace::Scope scope(ctx.workspace());
  for (size_t b = 0; b < kGroupBlocks; ++b)
    x = blocks_[index][b].forward(ctx, x, state.blocks[index][b]);
  if (index + 1 < kGroups) {
    upsamples_[index].forward(ctx, x, state.upsamples[index],
                              [&](View frame) { run_group(ctx, index + 1, frame, state, sink); });
    return;
  }
  sink(out_.forward(ctx, norm_silu(ctx, x, head_norm_, compute_), state.out, DType::kF32));
}

int64_t vae_dim(const Checkpoint& file) {
  const StoredTensor* head = file.find("decoder.head.0.gamma");
  if (head == nullptr || head->shape.rank() != 4)
    throw Error(ErrorKind::kInput,
                str(file.path(), ": expected a Wan VAE with decoder.head.0.gamma of 4 axes, found ",
                    head ? head->shape.to_string() : "no such tensor"));
  return head->shape[0];
}

}  // namespace longtake::wan
