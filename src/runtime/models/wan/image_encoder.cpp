#include "models/wan/image_encoder.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "attention/attend.h"
#include "base/error.h"
#include "kv/page.h"
#include "ops/copy.h"
#include "ops/elementwise.h"
#include "ops/heads.h"
#include "ops/norm.h"
#include "ops/patchify.h"

namespace longtake::wan {
namespace {

constexpr const char* kAt = "visual.";
constexpr float kNormEps = 1e-5F;
constexpr int64_t kColours = 3;
constexpr std::array<float, kColours> kMean = {0.48145466F, 0.4578275F, 0.40821073F};
constexpr std::array<float, kColours> kDeviation = {0.26862954F, 0.26130258F, 0.27577711F};

const StoredTensor& tensor_of(const Checkpoint& file, const std::string& name, int rank) {
  const StoredTensor* tensor = file.find(kAt + name);
  if (tensor == nullptr || tensor->shape.rank() != rank)
    throw Error(ErrorKind::kInput,
                str(file.path(), ": expected a CLIP image encoder with ", kAt, name, " of ", rank,
                    " axes, found ", tensor ? tensor->shape.to_string() : "no such tensor"));
  return *tensor;
}

// Which pixels a new one is made of along an axis, and how.
struct Taps {
  std::array<int64_t, 4> at;
  std::array<double, 4> weights;
};

Taps taps_of(int64_t index, int64_t from, int64_t to) {
  constexpr double kA = -0.75;
  const double centre =
      (static_cast<double>(index) + 0.5) * static_cast<double>(from) / static_cast<double>(to) -
      0.5;
  const double first = std::floor(centre);
  const auto near = [](double x) { return ((kA + 2) * x - (kA + 3)) * x * x + 1; };
  const auto far = [](double x) { return ((kA * x - 5 * kA) * x + 8 * kA) * x - 4 * kA; };
  const double t = centre - first;
  Taps taps{{}, {far(t + 1), near(t), near(1 - t), far(2 - t)}};
  for (int64_t i = 0; i < 4; ++i)
    taps.at[static_cast<size_t>(i)] =
        std::clamp<int64_t>(static_cast<int64_t>(first) + i - 1, 0, from - 1);
  return taps;
}

}  // namespace

std::vector<float> scaled_bicubic(View rgb, int64_t side) {
  const int64_t height = rgb.dim(0), width = rgb.dim(1);
  std::vector<float> out(static_cast<size_t>(side * side * kColours));
  for (int64_t y = 0; y < side; ++y) {
    const Taps down = taps_of(y, height, side);
    for (int64_t x = 0; x < side; ++x) {
      const Taps right = taps_of(x, width, side);
      for (int64_t c = 0; c < kColours; ++c) {
        double sum = 0;
        for (size_t i = 0; i < 4; ++i) {
          double line = 0;
          for (size_t j = 0; j < 4; ++j)
            line += right.weights[j] *
                    rgb.data<uint8_t>()[(down.at[i] * width + right.at[j]) * kColours + c];
          sum += down.weights[i] * line;
        }
        out[static_cast<size_t>((y * side + x) * kColours + c)] = static_cast<float>(sum);
      }
    }
  }
  return out;
}

ImageEncoderConfig image_encoder_config(const Checkpoint& file) {
  ImageEncoderConfig config;
  const Shape& patches = tensor_of(file, "patch_embedding.weight", 4).shape;
  const Shape& positions = tensor_of(file, "pos_embedding", 3).shape;
  config.dim = patches[0];
  config.patch = patches[2];
  config.side = std::llround(std::sqrt(static_cast<double>(positions[1] - 1)));
  config.ffn_dim = tensor_of(file, "transformer.0.mlp.0.weight", 2).shape[0];
  const auto has_layer = [&](int64_t n) {
    return file.find(str(kAt, "transformer.", n, ".norm1.weight")) != nullptr;
  };
  while (has_layer(config.num_layers + 1)) ++config.num_layers;
  if (config.dim % kImageHeadDim != 0 || config.num_tokens() != positions[1] || config.patch < 1 ||
      config.num_layers < 1)
    throw Error(ErrorKind::kInput,
                str(file.path(), ": expected a CLIP image encoder of heads of ", kImageHeadDim,
                    " channels, a square of tokens and at least 2 layers, found ", config.dim,
                    " channels, ", positions[1], " tokens, ", config.num_layers + 1, " layers"));
  return config;
}

ImageEncoder::ImageEncoder(const ImageEncoderConfig& config, DType compute, WeightTable& table)
    : config_(config), compute_(compute) {
  const int64_t dim = config.dim;
  const std::string at = kAt;
  table.linear(at + "patch_embedding", dim, kColours * config.patch * config.patch, compute,
               patch_embedding_,
               {.stored = Shape{dim, kColours, config.patch, config.patch},
                .row_order = {},
                .has_bias = false});
  table.tensor(at + "cls_embedding", {1, 1, dim}, own_token_);
  table.tensor(at + "pos_embedding", {1, config.num_tokens(), dim}, positions_);
  table.tensor(at + "pre_norm.weight", {dim}, norm_weight_);
  table.tensor(at + "pre_norm.bias", {dim}, norm_bias_);
  layers_.resize(static_cast<size_t>(config.num_layers));
  for (size_t n = 0; n < layers_.size(); ++n) {
    Layer& layer = layers_[n];
    const std::string in = str(at, "transformer.", n, ".");
    table.tensor(in + "norm1.weight", {dim}, layer.norm1_weight);
    table.tensor(in + "norm1.bias", {dim}, layer.norm1_bias);
    table.linear(in + "attn.to_qkv", 3 * dim, dim, compute, layer.qkv);
    table.linear(in + "attn.proj", dim, dim, compute, layer.out);
    table.tensor(in + "norm2.weight", {dim}, layer.norm2_weight);
    table.tensor(in + "norm2.bias", {dim}, layer.norm2_bias);
    layer.mlp.activation = Activation::kGelu;
    layer.mlp.list(table, in + "mlp", dim, config.ffn_dim, dim, compute);
  }
  // What follows: the last layer, the way to where pictures and texts meet, and the text's half.
  table.ignore(str(at, "transformer.", config.num_layers, "."));
  for (const char* name : {"visual.post_norm.", "visual.head", "textual.", "log_scale"})
    table.ignore(name);
}

void ImageEncoder::attend(Context& ctx, const Layer& layer, View h, View out) const {
  const Workspace::Scope scope(ctx.workspace());
  const int64_t length = h.dim(0);
  const Shape heads{length, config_.dim / kImageHeadDim, kImageHeadDim};
  const View qkv = ctx.workspace().take(DType::kF32, {length, 3 * config_.dim});
  const View mixed = ctx.workspace().take(compute_, heads);
  std::array<HeadPart, 3> parts;
  for (HeadPart& part : parts) part.out = ctx.workspace().take(compute_, heads);
  linear(ctx, h, *layer.qkv, Activation::kNone, qkv);
  split_heads(ctx, qkv, parts, View(), View(), kNormEps);
  const KvPages pages(ctx, parts[1].out, parts[2].out);
  longtake::attend(ctx, parts[0].out, pages.view(),
                   1 / std::sqrt(static_cast<float>(kImageHeadDim)), mixed);
  linear(ctx, mixed.reshape(h.shape()), *layer.out, Activation::kNone, out);
}

Tensor ImageEncoder::encode(Context& ctx, View rgb) const {
  LONGTAKE_CHECK(ctx.device().kind == DeviceKind::kCpu, "image encoders run on the CPU");
  const Workspace::Scope scope(ctx.workspace());
  const int64_t pixels = config_.pixels(), tokens = config_.num_tokens(), dim = config_.dim;
  const std::vector<float> square = scaled_bicubic(rgb, pixels);
  const View planes = ctx.workspace().take(DType::kF32, {kColours, pixels, pixels});
  for (int64_t i = 0; i < pixels * pixels; ++i) {
    for (int64_t c = 0; c < kColours; ++c) {
      const auto colour = static_cast<size_t>(c);
      planes.data<float>()[c * pixels * pixels + i] =
          (square[static_cast<size_t>(i * kColours + c)] / 255 - kMean[colour]) /
          kDeviation[colour];
    }
  }
  Tensor x(ctx.device(), DType::kF32, {tokens, dim});
  const View patches =
      ctx.workspace().take(compute_, {tokens - 1, patch_embedding_->in_features()});
  patchify(ctx, planes, config_.patch, patches);
  copy(ctx, own_token_, x.view().rows(0, 1));
  linear(ctx, patches, *patch_embedding_, Activation::kNone, x.view().rows(1, tokens));
  add(ctx, x, positions_.view().reshape(x.shape()));
  layer_norm(ctx, x, norm_weight_, norm_bias_, kNormEps, /*scale_plus_one=*/false, x);
  const View h = ctx.workspace().take(compute_, x.shape());
  const View y = ctx.workspace().take(DType::kF32, x.shape());
  for (const Layer& layer : layers_) {
    layer_norm(ctx, x, layer.norm1_weight, layer.norm1_bias, kNormEps, /*scale_plus_one=*/false, h);
    attend(ctx, layer, h, y);
    add(ctx, x, y);
    layer_norm(ctx, x, layer.norm2_weight, layer.norm2_bias, kNormEps, /*scale_plus_one=*/false, h);
    layer.mlp.forward(ctx, h, y);
    add(ctx, x, y);
  }
  return x;
}

}  // namespace longtake::wan
