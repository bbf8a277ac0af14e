#include "models/world/text_encoder.h"

#include <cmath>
#include <cstring>

#include "base/error.h"
#include "ops/elementwise.h"
#include "ops/norm.h"

namespace longtake::world {
namespace {

constexpr double kRopeTheta = 10000.0;

// Rotation by the token's index: angle_i = pos * theta^(-i / pairs).
RopeTable rope_by_index(Device device, int64_t length, int64_t pairs) {
  RopeTable rope{Tensor(device, DType::kF32, {length, pairs}),
                 Tensor(device, DType::kF32, {length, pairs})};
  for (int64_t pos = 0; pos < length; ++pos) {
    for (int64_t i = 0; i < pairs; ++i) {
      const double angle =
          static_cast<double>(pos) *
          std::pow(kRopeTheta, -static_cast<double>(i) / static_cast<double>(pairs));
      rope.cos.data<float>()[pos * pairs + i] = static_cast<float>(std::cos(angle));
      rope.sin.data<float>()[pos * pairs + i] = static_cast<float>(std::sin(angle));
    }
  }
  return rope;
}

}  // namespace

TextEncoder::TextEncoder(const TextEncoderConfig& config, WeightTable& table) : config_(config) {
  const std::string at = "text_encoder.";
  table.tensor(at + "embedding.weight", {config.vocab_size, config.dim}, embedding_);
  for (int64_t n = 0; n < config.num_layers; ++n) {
    const std::string layer_at = str(at, "layers.", n, ".");
    Layer layer;
    layer.attn.num_heads = config.num_heads;
    layer.attn.head_dim = config.head_dim();
    table.tensor(layer_at + "norm1.weight", {config.dim}, layer.norm1);
    layer.attn.list_self(table, layer_at + "attn", /*with_norms=*/false, DType::kF32);
    table.tensor(layer_at + "norm2.weight", {config.dim}, layer.norm2);
    layer.ffn.list(table, layer_at + "ffn", config.dim, config.ffn_dim, config.dim, DType::kF32);
    layers_.push_back(std::move(layer));
  }
  table.tensor(at + "final_norm.weight", {config.dim}, final_norm_);
}

Tensor TextEncoder::encode(Context& ctx, std::span<const int32_t> ids,
                           const LayerObserver& observer) const {
  const auto length = static_cast<int64_t>(ids.size());
  const Shape shape{length, config_.dim};
  const RopeTable rope = rope_by_index(ctx.device(), length, config_.head_dim() / 2);
  Tensor x(ctx.device(), DType::kF32, shape);
  for (int64_t i = 0; i < length; ++i) {
    const int64_t id = ids[static_cast<size_t>(i)];
    LONGTAKE_CHECK(id >= 0 && id < config_.vocab_size, "token ", id);
    std::memcpy(x.view().rows(i, i + 1).raw(), embedding_.view().rows(id, id + 1).raw(),
                x.view().rows(i, i + 1).bytes());
  }
  const Workspace::Scope scope(ctx.workspace());
  const View h = ctx.workspace().take(DType::kF32, shape);
  const View y = ctx.workspace().take(DType::kF32, shape);
  for (size_t n = 0; n < layers_.size(); ++n) {
    const Layer& layer = layers_[n];
    rms_norm(ctx, x, layer.norm1, kTextEps, h);
    full_attention(ctx, layer.attn, h, rope, y);
    add(ctx, x, y);
    rms_norm(ctx, x, layer.norm2, kTextEps, h);
    layer.ffn.forward(ctx, h, y);
    add(ctx, x, y);
    if (observer) observer(static_cast<int64_t>(n), x);
  }
  rms_norm(ctx, x, final_norm_, kTextEps, x);
  return x;
}

}  // namespace longtake::world
