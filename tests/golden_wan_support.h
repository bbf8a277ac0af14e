// A run of the official code on a small Wan transformer, replayed call by call from its own inputs.
#pragma once

#include <algorithm>
#include <cstdio>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "device_rows.h"
#include "golden_support.h"
#include "kv/time_rotation.h"
#include "models/wan/checkpoint.h"
#include "models/wan/schedule.h"
#include "models/wan/transformer.h"
#include "ops/clock.h"
#include "ops/rope.h"
#include "runtime_support.h"

namespace longtake::testing_support {

// A clock that stands at a frame.
inline Tensor clock_at(Context& ctx, int64_t frame) {
  Tensor clock = Tensor::zeros(ctx.device(), DType::kI64, {1});
  set_clock(ctx, clock, frame);
  return clock;
}

// The tensor in f32, whatever its type in the file.
inline Tensor read_golden_f32(const Checkpoint& file, const std::string& name) {
  const StoredTensor* stored = file.find(name);
  if (stored == nullptr) throw Error(file.path() + ": expected " + name + ", found no such tensor");
  Tensor out(Device{}, DType::kF32, stored->shape);
  read_tensor(*stored, out);
  return out;
}

inline int32_t golden_int(const Checkpoint& file, const std::string& name, int64_t index) {
  return read_golden(file, name).data<int32_t>()[index];
}

// Keys and values of a cache that keeps frames apart: the history, then the chunk in work.
inline Rows unpack(Context& ctx, const KvView& view, int64_t sink_frames, int64_t frame_tokens) {
  if (view.device != nullptr) return device_rows(ctx, view, sink_frames, frame_tokens);
  int64_t tokens = 0;
  for (const KvPage& page : view.heads[0]) tokens += page.num_keys;
  const int64_t heads = view.num_heads();
  const Shape shape{tokens, heads, view.head_dim};
  Rows rows{Tensor(Device{}, DType::kF32, shape), Tensor(Device{}, DType::kF32, shape)};
  for (int64_t head = 0; head < heads; ++head) {
    int64_t token = 0;
    for (const KvPage& page : view.heads[static_cast<size_t>(head)]) {
      for (int64_t slot = 0; slot < page.num_keys; ++slot, ++token) {
        const int64_t at = (token * heads + head) * view.head_dim;
        read_token(page, view.dtype, view.head_dim, slot, rows.k.data<float>() + at,
                   rows.v.data<float>() + at);
      }
    }
  }
  return rows;
}

inline Tensor clone(View x) {
  Tensor out(Device{}, x.dtype(), x.shape());
  std::copy_n(x.raw(), x.bytes(), out.view().raw());
  return out;
}

// What each layer's self attention read, and the streams behind the layers.
class ReadRecorder final : public PassObserver {
 public:
  ReadRecorder(Context& ctx, int64_t sink_frames, int64_t frame_tokens)
      : ctx_(ctx), sink_frames_(sink_frames), frame_tokens_(frame_tokens) {}

  void on_self_attention(int64_t layer, const AttentionRead& read) override {
    rows[layer] = unpack(ctx_, read.kv, sink_frames_, frame_tokens_);
  }

  void on_layer(int64_t layer, View x) override { streams[layer] = on_host(ctx_, x); }

  std::map<int64_t, Rows> rows;
  std::map<int64_t, Tensor> streams;

 private:
  Context& ctx_;
  int64_t sink_frames_, frame_tokens_;
};

// The small transformer of a parity file with its weights.
class WanModel {
 public:
  WanModel(Device device, const std::string& file, DType compute, DType residual,
           const std::string& lora = std::string())
      : ctx(device, 2), golden(golden_path(file + ".safetensors")) {
    const auto sizes = nlohmann::json::parse(golden.metadata().at("config"));
    num_heads = sizes.at("num_heads");
    const int64_t dim = sizes.at("dim");
    config = {.dim = dim,
              .ffn_dim = sizes.at("ffn_dim"),
              .num_heads = num_heads,
              .num_layers = sizes.at("num_layers"),
              .in_channels = 16,
              .out_channels = 16,
              .freq_dim = sizes.at("freq_dim"),
              .text_dim = sizes.at("text_dim")};
    height = sizes.at("latent_hw").at(0);
    width = sizes.at("latent_hw").at(1);
    std::optional<Checkpoint> adapter;
    if (!lora.empty()) adapter.emplace(wan::open_lora(lora));
    const Checkpoint weights = open_weights();
    WeightTable table(weights, &ctx);
    if (adapter) table.merge_lora(*adapter, 1);
    transformer.emplace(config, compute, residual, table);
    table.finish();
  }

  int64_t rows() const { return height / wan::kPatch; }

  int64_t columns() const { return width / wan::kPatch; }

  int64_t frame_tokens() const { return rows() * columns(); }

  // Of num_frames frames from first_frame on, for a context's device.
  RopeTable rope(Context& context, int64_t first_frame, int64_t num_frames) const {
    RopeTable table = transformer->make_rope(context, num_frames * frame_tokens());
    const Tensor clock = clock_at(context, first_frame);
    transformer->set_rope(context, clock, rows(), columns(), table);
    context.synchronize();
    return table;
  }

  Context ctx;
  Checkpoint golden;
  wan::TransformerConfig config;
  int64_t num_heads = 0, height = 0, width = 0;
  std::optional<wan::Transformer> transformer;

 private:
  Checkpoint open_weights() {
    const bool is_formula = golden.metadata().count("weights") != 0 &&
                            golden.metadata().at("weights").starts_with("formula");
    if (!is_formula) {
      Checkpoint stored = Checkpoint(golden_path("dit.weights.safetensors"));
      // The sizes that the engine reads off the weights are those of the run.
      const auto found = wan::transformer_config(stored, config.head_dim());
      EXPECT_EQ(found.num_layers, config.num_layers);
      EXPECT_EQ(found.ffn_dim, config.ffn_dim);
      EXPECT_EQ(found.num_heads, config.num_heads);
      return stored;
    }
    const Checkpoint none;
    WeightTable table(none, nullptr);
    const wan::Transformer list(config, DType::kF32, DType::kF32, table);
    return formula_weights(golden, table.wanted(), formula_seed(golden), scratch_ / "weights");
  }

  ScratchFolder scratch_;
};

}  // namespace longtake::testing_support
