// A layer of a diffusion transformer in Wan's manner, which the embedded model shares: self
// attention and feed forward modulated by the noise level of their frame, and cross attention to
// the prompt between them.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>

#include "attention/layer_tail.h"
#include "device/context.h"
#include "nn/attention.h"
#include "nn/feed_forward.h"
#include "nn/stream.h"
#include "nn/weight_table.h"
#include "tensor/tensor.h"

namespace longtake {

inline constexpr int64_t kModulations = 6;  // shift1, scale1, gate1, shift2, scale2, gate2

// What one layer carries through a rollout.
struct LayerState {
  Prompt prompt;
  Memory memory;
};

// Watches a pass; for tests, metrics and calibration. Views are valid during the call.
class PassObserver {
 public:
  virtual ~PassObserver() = default;

  // x [L, dim] f32: the residual stream behind the layer.
  virtual void on_layer(int64_t /*layer*/, View /*x*/) {}

  virtual void on_self_attention(int64_t /*layer*/, const AttentionRead&) {}

  virtual void on_cross_attention(int64_t /*layer*/, const AttentionRead&) {}
};

// What a model adds to the stream x [L, dim] f32 between a layer's cross attention and feed
// forward.
class LayerInsert {
 public:
  virtual ~LayerInsert() = default;

  virtual void run(Context& ctx, View x) const = 0;
};

struct DitSizes {
  int64_t dim = 0;
  int64_t num_heads = 0;
  int64_t head_dim = 0;
  int64_t ffn_dim = 0;
  float eps = 0;  // of every norm
};

struct DitLayer;

// The layer behind, whose heads a layer makes with the last of its own work: on the GPU in one
// launch where rows are few.
struct NextHeads {
  const DitLayer& layer;
  std::span<const View> modulation;  // as LayerPass has it
  KvCache& cache;                    // its own
  ChunkHeads& heads;
};

// What a pass brings to a layer.
struct LayerPass {
  int64_t index = 0;                 // of the layer
  std::span<const View> modulation;  // [6, dim] f32 of every frame of the pass
  const RopeTable& rope;
  DType residual = DType::kF32;  // bf16: the stream is rounded after everything that is added to it
  int64_t unread_tokens = 0;     // first tokens whose keys are neither read nor remembered
  std::span<const Bucket> buckets = {};  // what the pass's tokens are assigned to, [L] or empty
  bool sparse = false;
  PromptReading prompt = PromptReading::kAll;
  std::optional<ChunkPosition> commit;
  PassObserver* observer = nullptr;
  const LayerInsert* before_ffn = nullptr;
  // Of the layer, made by the layer before; null: it makes them.
  const ChunkHeads* heads = nullptr;
  const NextHeads* next = nullptr;  // null: nobody asks for them
};

struct DitLayer {
  Attention self_attn;
  Attention cross_attn;
  Tensor norm3_weight, norm3_bias;
  FeedForward ffn;
  Tensor modulation;  // 6 x dim values

  // modulation_shape: as the file has it.
  void list(WeightTable& table, const std::string& name, const DitSizes& sizes,
            const Shape& modulation_shape, DType compute);

  // The keys and values of a prompt or an image, from its embedded tokens [T, dim] in the compute
  // dtype. last_count: of equal tokens that the last one stands for.
  void set_prompt(Context& ctx, View embedded, Prompt& prompt, int64_t last_count = 1) const;

  // Its heads, before the first of a pass's layers runs; x as run() takes it.
  void make_heads(Context& ctx, const LayerPass& pass, View x, KvCache& cache,
                  ChunkHeads& heads) const;

  // x [L, dim] f32, in place; L is a multiple of the number of frames.
  void run(Context& ctx, const LayerPass& pass, LayerState& state, View x) const;
  // The same on a stream that goes through several layers: what the layer adds last waits for the
  // next one's norm.
  void run(Context& ctx, const LayerPass& pass, LayerState& state, Stream& stream) const;

  // All that a last layer must do in a pass whose output nobody reads: its keys and values join the
  // history at pass.commit. x as run() would take it.
  void commit(Context& ctx, const LayerPass& pass, LayerState& state, View x) const;

 private:
  // The norm by vectors `shift` of [6, dim] and behind it.
  StreamNorm modulated(std::span<const View> by, int64_t shift) const;
  static void describe_next(const LayerPass& pass, const NextHeads& next, View x, LayerTail& tail);
  // What follows self attention, which read `mixed`, in a launch of its own; false: it cannot.
  bool run_tail(Context& ctx, const LayerPass& pass, const LayerState& state, View mixed,
                View x) const;
};

// Sets the prompt of every layer from text [T, text_dim] f32: embedded in f32 by `embedding`, then
// in `compute` as the layers read it. states: one a layer. last_count: as DitLayer::set_prompt.
void set_prompts(Context& ctx, View text, const FeedForward& embedding, DType compute,
                 std::span<const DitLayer> layers, std::span<LayerState> states,
                 int64_t last_count = 1);

// The rows of x that belong to frame `index` of `num_frames`.
View frame_rows(View x, int64_t index, int64_t num_frames);

// Row `index` of a matrix, as a vector.
View row(View matrix, int64_t index);

}  // namespace longtake
