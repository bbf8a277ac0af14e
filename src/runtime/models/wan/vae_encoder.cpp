#include "models/wan/vae_encoder.h"

#include <algorithm>
#include <utility>

#include "base/error.h"
#include "nn/convolve.h"
#include "ops/copy.h"
#include "ops/image.h"

namespace longtake::wan {
namespace {

constexpr int64_t kColours = 3;

// x [H, W, C] with a row and a column of zeros behind it. zeros: some, made at the first call.
View padded(Context& ctx, View x, Tensor& zeros) {
  const int64_t height = x.dim(0), width = x.dim(1), channels = x.dim(2);
  if (zeros.empty())
    zeros = Tensor::zeros(ctx.device(), x.dtype(), {std::max(height, width + 1), channels});
  const View out = ctx.workspace().take(x.dtype(), {height + 1, width + 1, channels});
  // Rows as pixels of many channels, each of which gets a few more.
  const View parts[] = {x.reshape({1, height, width * channels}),
                        zeros.view().rows(0, height).reshape({1, height, channels})};
  concat_channels(ctx, parts, out.rows(0, height).reshape({1, height, (width + 1) * channels}));
  copy(ctx, zeros.view().rows(0, width + 1), out.rows(height, height + 1));
  return out;
}

}  // namespace

void VaeDownsample::list(WeightTable& table, const std::string& name, int64_t channels,
                         bool is_temporal, DType compute) {
  table.conv(name + "resample.1", channels, channels, compute, conv, {.stride = 2, .padding = 0});
  if (is_temporal)
    table.conv(name + "time_conv", channels, channels, compute, time_conv,
               {.kernel = 1, .taps = 3});
}

void VaeDownsample::forward(Context& ctx, View x, State& state, const FrameSink& next) const {
  const Workspace::Scope scope(ctx.workspace());
  const DType compute = conv->compute_dtype();
  const View small =
      convolve(ctx, padded(ctx, converted(ctx, x, compute), state.zeros), *conv, DType::kF32);
  if (!time_conv) return next(small);
  const auto keep = [&] {
    Tensor& to = state.waiting[static_cast<size_t>(state.num_waiting++)];
    if (to.empty()) to = Tensor(ctx.device(), compute, small.shape());
    convert(ctx, small, to);
  };
  if (!std::exchange(state.has_begun, true)) {
    keep();
    return next(small);
  }
  if (state.num_waiting < 2) return keep();
  const View parts[] = {state.waiting[0], state.waiting[1], converted(ctx, small, compute)};
  const View all = side_by_side(ctx, parts);
  state.num_waiting = 0;
  keep();
  next(convolve(ctx, all, *time_conv, DType::kF32));
}

VaeEncoder::VaeEncoder(int64_t dim, DType compute, WeightTable& table) : compute_(compute) {
  // Channels in and out of each group's blocks.
  const std::array<std::pair<int64_t, int64_t>, kGroups> widths = {
      {{dim, dim}, {dim, 2 * dim}, {2 * dim, 4 * dim}, {4 * dim, 4 * dim}}};
  const int64_t widest = 4 * dim;
  table.constant(kLatentMean, latent_mean_);
  table.constant(kLatentStd, latent_std_);
  in_.list(table, "encoder.conv1", dim, kColours, 3, compute);
  int number = 0;
  const auto name = [&] { return str("encoder.downsamples.", number++, "."); };
  for (size_t g = 0; g < kGroups; ++g) {
    const auto [in, out] = widths[g];
    for (size_t b = 0; b < kGroupBlocks; ++b)
      blocks_[g][b].list(table, name(), out, b == 0 ? in : out, compute);
    if (g + 1 < kGroups) downsamples_[g].list(table, name(), out, /*is_temporal=*/g > 0, compute);
  }
  middle1_.list(table, "encoder.middle.0.", widest, widest, compute);
  attention_.list(table, "encoder.middle.1.", widest, compute);
  middle2_.list(table, "encoder.middle.2.", widest, widest, compute);
  table.tensor("encoder.head.0.gamma", {widest, 1, 1, 1}, head_norm_);
  out_.list(table, "encoder.head.2", 2 * kLatentChannels, widest, 3, compute);
  table.conv("conv1", 2 * kLatentChannels, 2 * kLatentChannels, compute, conv1_,
             {.kernel = 1, .taps = 1});
  table.ignore("decoder.");
  table.ignore("conv2.");
}

void VaeEncoder::encode(Context& ctx, View rgb, State& state, const FrameSink& latent) const {
  const Workspace::Scope scope(ctx.workspace());
  const View x = in_.forward(ctx, converted(ctx, rgb, compute_), state.in, DType::kF32);
  run_group(ctx, 0, x, state, latent);
}

void VaeEncoder::run_group(Context& ctx, size_t index, View x, State& state,
                           const FrameSink& latent) const {
  const Workspace::Scope scope(ctx.workspace());
  for (size_t b = 0; b < kGroupBlocks; ++b)
    x = blocks_[index][b].forward(ctx, x, state.blocks[index][b]);
  if (index + 1 < kGroups) {
    downsamples_[index].forward(ctx, x, state.downsamples[index], [&](View frame) {
      run_group(ctx, index + 1, frame, state, latent);
    });
    return;
  }
  x = middle1_.forward(ctx, x, state.middle[0]);
  attention_.forward(ctx, x);
  x = middle2_.forward(ctx, x, state.middle[1]);
  const View head = out_.forward(ctx, norm_silu(ctx, x, head_norm_, compute_), state.out, compute_);
  const View both = convolve(ctx, head, *conv1_, DType::kF32);
  const View means = ctx.workspace().take(DType::kF32, {both.dim(0), both.dim(1), kLatentChannels});
  slice_channels(ctx, both, 0, means);
  const View z = ctx.workspace().take(DType::kF32, {kLatentChannels, both.dim(0), both.dim(1)});
  to_planes(ctx, means, latent_std_, latent_mean_, z);
  latent(z);
}

}  // namespace longtake::wan
