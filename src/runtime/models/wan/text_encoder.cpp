#include "models/wan/text_encoder.h"

#include <algorithm>
#include <array>
#include <utility>

#include "attention/relative.h"
#include "base/error.h"
#include "models/wan/config.h"
#include "ops/elementwise.h"
#include "ops/norm.h"

namespace longtake::wan {
namespace {

constexpr int64_t kBuckets = 32;
constexpr int64_t kMaxLayers = 1000;
constexpr const char* kWords = "token_embedding.weight";

const StoredTensor& matrix(const Checkpoint& file, const std::string& name) {
  const StoredTensor* tensor = file.find(name);
  if (tensor == nullptr || tensor->shape.rank() != 2)
    throw Error(ErrorKind::kInput,
                str(file.path(), ": expected a umT5 encoder with ", name, " of 2 axes, found ",
                    tensor ? tensor->shape.to_string() : "no such tensor"));
  return *tensor;
}

// Biases of all distances, [N, 2 L - 1], from those of the buckets, [32, N].
void spread_bias(View buckets, View out) {
  const int64_t heads = out.dim(0);
  const int64_t length = (out.dim(1) + 1) / 2;
  for (int64_t i = 0; i < out.dim(1); ++i) {
    const float* bias = buckets.data<float>() + distance_bucket(i - length + 1) * heads;
    for (int64_t head = 0; head < heads; ++head)
      out.data<float>()[head * out.dim(1) + i] = bias[head];
  }
}

}  // namespace

TextEncoderConfig text_encoder_config(const Checkpoint& file) {
  TextEncoderConfig config;
  config.vocab_size = matrix(file, kWords).shape[0];
  config.dim = matrix(file, kWords).shape[1];
  config.attention_dim = matrix(file, "blocks.0.attn.q.weight").shape[0];
  config.ffn_dim = matrix(file, "blocks.0.ffn.fc1.weight").shape[0];
  config.num_heads = matrix(file, "blocks.0.pos_embedding.embedding.weight").shape[1];
  while (config.num_layers < kMaxLayers &&
         file.find(str("blocks.", config.num_layers, ".norm1.weight")) != nullptr)
    ++config.num_layers;
  if (config.num_heads < 1 || config.attention_dim % config.num_heads != 0)
    throw Error(ErrorKind::kInput,
                str(file.path(), ": expected heads that share ", config.attention_dim,
                    " channels evenly, found ", config.num_heads));
  return config;
}

int64_t distance_bucket(int64_t distance) {
  // Near distances have buckets of their own, far ones share: the formula's logarithm falls exactly
  // on some of these borders, so they are written down.
  constexpr std::array<int64_t, 8> kShared = {8, 12, 16, 23, 32, 46, 64, 91};
  const int64_t side = distance > 0 ? kBuckets / 2 : 0;
  const int64_t far = std::abs(distance);
  if (far < kShared[0]) return side + far;
  const auto* above = std::upper_bound(kShared.begin(), kShared.end(), far);
  return side + kShared[0] + (above - kShared.begin()) - 1;
}

void TextEncoder::list(WeightTable& table, const TextEncoderConfig& config, DType compute,
                       std::vector<Layer>& layers, Tensor& final_norm) {
  const LinearForm plain{.stored = {}, .row_order = {}, .has_bias = false};
  layers.resize(static_cast<size_t>(config.num_layers));
  table.leave_in_file(kWords, {config.vocab_size, config.dim});
  for (size_t n = 0; n < layers.size(); ++n) {
    const std::string at = str("blocks.", n, ".");
    Layer& layer = layers[n];
    table.tensor(at + "norm1.weight", {config.dim}, layer.norm1);
    for (const auto& [name, field] :
         {std::pair("q", &layer.q), std::pair("k", &layer.k), std::pair("v", &layer.v)})
      table.linear(at + "attn." + name, config.attention_dim, config.dim, compute, *field, plain);
    table.linear(at + "attn.o", config.dim, config.attention_dim, compute, layer.o, plain);
    table.tensor(at + "norm2.weight", {config.dim}, layer.norm2);
    table.linear(at + "ffn.gate.0", config.ffn_dim, config.dim, compute, layer.gate, plain);
    table.linear(at + "ffn.fc1", config.ffn_dim, config.dim, compute, layer.fc1, plain);
    table.linear(at + "ffn.fc2", config.dim, config.ffn_dim, compute, layer.fc2, plain);
    table.tensor(at + "pos_embedding.embedding.weight", {kBuckets, config.num_heads},
                 layer.distance_bias);
  }
  table.tensor("norm.weight", {config.dim}, final_norm);
}

TextEncoder::TextEncoder(Context& ctx, Checkpoint file, DType compute)
    : file_(std::move(file)), config_(text_encoder_config(file_)), compute_(compute) {
  WeightTable table(file_, &ctx);
  list(table, config_, compute, layers_, final_norm_);
  table.finish();
}

void TextEncoder::list_weights(const TextEncoderConfig& config, WeightTable& table) {
  std::vector<Layer> layers;
  Tensor final_norm;
  list(table, config, DType::kF32, layers, final_norm);
}

void TextEncoder::attend(Context& ctx, const Layer& layer, View x, View out) const {
  const Workspace::Scope scope(ctx.workspace());
  const int64_t length = x.dim(0);
  const Shape flat{length, config_.attention_dim};
  const Shape heads{length, config_.num_heads, config_.attention_dim / config_.num_heads};
  const View h = ctx.workspace().take(compute_, x.shape());
  const View q = ctx.workspace().take(DType::kF32, flat);
  const View k = ctx.workspace().take(DType::kF32, flat);
  const View v = ctx.workspace().take(DType::kF32, flat);
  const View bias = ctx.workspace().take(DType::kF32, {config_.num_heads, 2 * length - 1});
  const View mixed = ctx.workspace().take(compute_, heads);
  rms_norm(ctx, x, layer.norm1, kEps, h);
  linear(ctx, h, *layer.q, Activation::kNone, q);
  linear(ctx, h, *layer.k, Activation::kNone, k);
  linear(ctx, h, *layer.v, Activation::kNone, v);
  spread_bias(layer.distance_bias, bias);
  attend_relative(ctx, q.reshape(heads), k.reshape(heads), v.reshape(heads), bias, mixed);
  linear(ctx, mixed.reshape(flat), *layer.o, Activation::kNone, out);
}

void TextEncoder::feed_forward(Context& ctx, const Layer& layer, View x, View out) const {
  const Workspace::Scope scope(ctx.workspace());
  const Shape wide{x.dim(0), config_.ffn_dim};
  const View h = ctx.workspace().take(compute_, x.shape());
  const View gate = ctx.workspace().take(DType::kF32, wide);
  const View value = ctx.workspace().take(DType::kF32, wide);
  const View product = ctx.workspace().take(compute_, wide);
  rms_norm(ctx, x, layer.norm2, kEps, h);
  linear(ctx, h, *layer.gate, Activation::kGeluTanh, gate);
  linear(ctx, h, *layer.fc1, Activation::kNone, value);
  multiply(ctx, gate, value, product);
  linear(ctx, product, *layer.fc2, Activation::kNone, out);
}

Tensor TextEncoder::encode(Context& ctx, std::span<const int32_t> ids,
                           const LayerObserver& observer) const {
  const Shape shape{static_cast<int64_t>(ids.size()), config_.dim};
  Tensor x(ctx.device(), DType::kF32, shape);
  const StoredTensor& words = *file_.find(kWords);
  for (int64_t i = 0; i < shape[0]; ++i) {
    const int64_t id = ids[static_cast<size_t>(i)];
    if (id < 0 || id >= config_.vocab_size)
      throw Error(ErrorKind::kInput, str(file_.path(), ": expected tokens below ",
                                         config_.vocab_size, ", found ", id));
    StoredTensor word = words;
    word.shape[0] = 1;
    word.data += id * words.strides[0] * static_cast<int64_t>(size_of(words.dtype));
    read_tensor(word, x.view().rows(i, i + 1));
  }
  const Workspace::Scope scope(ctx.workspace());
  const View y = ctx.workspace().take(DType::kF32, shape);
  for (size_t n = 0; n < layers_.size(); ++n) {
    attend(ctx, layers_[n], x, y);
    add(ctx, x, y);
    feed_forward(ctx, layers_[n], x, y);
    add(ctx, x, y);
    if (observer) observer(static_cast<int64_t>(n), x);
  }
  rms_norm(ctx, x, final_norm_, kEps, x);
  return x;
}

Tensor TextEncoder::encode_padded(Context& ctx, std::span<const int32_t> ids,
                                  int64_t text_len) const {
  const auto count = std::min(static_cast<int64_t>(ids.size()), text_len);
  const Tensor real = encode(ctx, ids.first(static_cast<size_t>(count)));
  Tensor out = Tensor::zeros(ctx.device(), DType::kF32, {text_len, config_.dim});
  convert(ctx, real, out.view().rows(0, count));
  return out;
}

}  // namespace longtake::wan
