#include "models/wan/taehv.h"

#include "base/error.h"
#include "nn/convolve.h"
#include "ops/elementwise.h"
#include "ops/image.h"

namespace longtake::wan {
namespace {

// Channels of a stage's blocks and behind it; its first tensor's number in the file.
struct StageSizes {
  int64_t channels, next_channels, frames;
  int first_block, grow, conv;
};

constexpr StageSizes kSizes[TaehvDecoder::kStages] = {
    {256, 128, 1, 3, 7, 8}, {128, 64, 2, 9, 13, 14}, {64, 64, 2, 15, 19, 20}};

// z [C, h, w] -> [h, w, C], softly limited to (-3, 3) as the decoder was trained.
View limited(Context& ctx, View z, DType dtype) {
  constexpr float kLimit = 3;
  const Shape shape{z.dim(1), z.dim(2), z.dim(0)};
  const View wide = ctx.workspace().take(DType::kF32, shape);
  const View out = dtype == DType::kF32 ? wide : ctx.workspace().take(dtype, shape);
  to_channels_last(ctx, z, View(), View(), wide);
  soft_limit(ctx, wide, kLimit, out);
  return out;
}

// Part `index` of [H, W, parts C], as an image of its own.
View channels_part(Context& ctx, View x, int64_t index, int64_t parts) {
  if (parts == 1) return x;
  const int64_t channels = x.dim(2) / parts;
  const View out = ctx.workspace().take(x.dtype(), {x.dim(0), x.dim(1), channels});
  slice_channels(ctx, x, index * channels, out);
  return out;
}

}  // namespace

void TaehvBlock::list(WeightTable& table, const std::string& name, int64_t channels,
                      DType compute) {
  table.conv(name + ".conv.0", channels, 2 * channels, compute, conv0);
  table.conv(name + ".conv.2", channels, channels, compute, conv2);
  table.conv(name + ".conv.4", channels, channels, compute, conv4);
}

TaehvDecoder::TaehvDecoder(DType compute, WeightTable& table) : compute_(compute) {
  const auto name = [](int index) { return str("decoder.", index); };
  table.conv(name(1), kSizes[0].channels, kLatentChannels, compute, in_);
  for (int s = 0; s < kStages; ++s) {
    const StageSizes& sizes = kSizes[s];
    Stage& stage = stages_[static_cast<size_t>(s)];
    stage.frames = sizes.frames;
    for (int b = 0; b < kBlocks; ++b) {
      stage.blocks[static_cast<size_t>(b)].list(table, name(sizes.first_block + b), sizes.channels,
                                                compute);
    }
    table.conv(name(sizes.grow) + ".conv", sizes.frames * sizes.channels, sizes.channels, compute,
               stage.grow, {.kernel = 1, .has_bias = false, .keeps_last_rows = true});
    table.conv(name(sizes.conv), sizes.next_channels, sizes.channels, compute, stage.conv,
               {.has_bias = false});
  }
  constexpr int kOut = 22;
  constexpr int64_t kColours = 3;
  table.conv(name(kOut), kColours, kSizes[kStages - 1].next_channels, compute, out_);
  table.ignore("encoder.");
}

void TaehvDecoder::decode(Context& ctx, View z, State& state, const FrameSink& sink) const {
  const Workspace::Scope scope(ctx.workspace());
  const View x = convolve(ctx, limited(ctx, z, compute_), *in_, compute_);
  relu(ctx, x, x);
  int64_t skip = state.num_latents++ == 0 ? kFramesSkipped : 0;
  run_stage(ctx, 0, x, state, skip, sink);
}

void TaehvBlock::run(Context& ctx, Tensor& memory, View x) const {
  const Workspace::Scope scope(ctx.workspace());
  const DType compute = conv0->compute_dtype();
  if (memory.empty()) memory = Tensor::zeros(ctx.device(), compute, x.shape());
  const View parts[] = {x, memory};
  View h = convolve(ctx, parts, *conv0, compute);
  convert(ctx, x, memory);
  relu(ctx, h, h);
  h = convolve(ctx, h, *conv2, compute);
  relu(ctx, h, h);
  const View sum = convolve(ctx, h, *conv4, DType::kF32);
  add(ctx, sum, x);
  relu(ctx, sum, x);
}

void TaehvDecoder::run_stage(Context& ctx, int index, View x, State& state, int64_t& skip,
                             const FrameSink& sink) const {
  const Workspace::Scope scope(ctx.workspace());
  if (index == kStages) {
    if (skip-- > 0) return;
    relu(ctx, x, x);
    sink(convolve(ctx, x, *out_, DType::kF32));
    return;
  }
  const auto at = static_cast<size_t>(index);
  const Stage& stage = stages_[at];
  for (size_t b = 0; b < stage.blocks.size(); ++b) stage.blocks[b].run(ctx, state.memory[at][b], x);
  // The official order is upsampling, then this 1 x 1 convolution: the same on a quarter of the
  // pixels.
  const View grown = convolve(ctx, x, *stage.grow, compute_);
  for (int64_t frame = 0; frame < stage.frames; ++frame) {
    const Workspace::Scope frame_scope(ctx.workspace());
    const View small = channels_part(ctx, grown, frame, stage.frames);
    const View large = ctx.workspace().take(compute_, {2 * x.dim(0), 2 * x.dim(1), small.dim(2)});
    upsample_nearest(ctx, small, large);
    const View next = convolve(ctx, large, *stage.conv, compute_);
    run_stage(ctx, index + 1, next, state, skip, sink);
  }
}

TaehvEncoder::TaehvEncoder(DType compute, WeightTable& table) : compute_(compute) {
  constexpr int64_t kChannels = 64;
  constexpr int64_t kColours = 3;
  constexpr int kStageTensors = 5, kFirst = 2, kOut = 17;
  constexpr int64_t kPooled[kStages] = {2, 2, 1};
  const auto name = [](int index) { return str("encoder.", index); };
  table.conv(name(0), kChannels, kColours, compute, in_);
  for (int s = 0; s < kStages; ++s) {
    Stage& stage = stages_[static_cast<size_t>(s)];
    stage.frames = kPooled[s];
    const int first = kFirst + kStageTensors * s;
    table.conv(name(first) + ".conv", kChannels, stage.frames * kChannels, compute, stage.pool,
               {.kernel = 1, .has_bias = false});
    table.conv(name(first + 1), kChannels, kChannels, compute, stage.conv,
               {.stride = 2, .has_bias = false});
    for (int b = 0; b < kBlocks; ++b)
      stage.blocks[static_cast<size_t>(b)].list(table, name(first + 2 + b), kChannels, compute);
  }
  table.conv(name(kOut), TaehvDecoder::kLatentChannels, kChannels, compute, out_);
  table.ignore("decoder.");
}

void TaehvEncoder::encode(Context& ctx, View rgb, State& state, const FrameSink& latent) const {
  const Workspace::Scope scope(ctx.workspace());
  const View x = convolve(ctx, converted(ctx, rgb, compute_), *in_, compute_);
  relu(ctx, x, x);
  run_stage(ctx, 0, x, state, latent);
}

void TaehvEncoder::run_stage(Context& ctx, int index, View x, State& state,
                             const FrameSink& latent) const {
  const Workspace::Scope scope(ctx.workspace());
  if (index == kStages) {
    const View z = convolve(ctx, x, *out_, DType::kF32);
    const View out = ctx.workspace().take(DType::kF32, {z.dim(2), z.dim(0), z.dim(1)});
    to_planes(ctx, z, View(), View(), out);
    latent(out);
    return;
  }
  const auto at = static_cast<size_t>(index);
  const Stage& stage = stages_[at];
  View all = x;
  if (stage.frames == 2) {
    Tensor& waiting = state.waiting[at];
    if (waiting.empty()) waiting = Tensor(ctx.device(), compute_, x.shape());
    state.waits[at] = !state.waits[at];
    if (state.waits[at]) return convert(ctx, x, waiting);
    const View parts[] = {waiting, x};
    all = side_by_side(ctx, parts);
  }
  const View pooled = convolve(ctx, all, *stage.pool, compute_);
  const View small = convolve(ctx, pooled, *stage.conv, compute_);
  for (size_t b = 0; b < stage.blocks.size(); ++b)
    stage.blocks[b].run(ctx, state.memory[at][b], small);
  run_stage(ctx, index + 1, small, state, latent);
}

}  // namespace longtake::wan
