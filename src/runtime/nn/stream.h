// The residual stream in a layer: parts of the layer read it through a norm and add a product to
// it. Where rows are few, each is one op with its product (ops/stream_linear.h); where they are
// many, what is added waits for the next norm, so that the stream is read and written once for
// both.
#pragma once

#include <cstdint>
#include <span>

#include "device/context.h"
#include "ops/heads.h"
#include "ops/linear.h"
#include "ops/residual.h"
#include "ops/stream_linear.h"
#include "tensor/tensor.h"

namespace longtake {

// What goes into a product: rows in the weight's compute dtype, or what `norm` makes of the stream.
struct LayerInput {
  View rows;  // [L, in]; empty: the stream's
  View stream;
  StreamNorm norm;

  int64_t length() const { return rows.empty() ? stream.dim(0) : rows.dim(0); }
};

// out = act(input W^T + b).
void project(Context& ctx, const LayerInput& input, const LinearWeight& weight,
             Activation activation, View out);

// split_heads (ops/heads.h) of input W^T + b.
void project_to_heads(Context& ctx, const LayerInput& input, const LinearWeight& weight,
                      std::span<const HeadPart> parts, View cos, View sin, float eps);

class Stream {
 public:
  // x [L, dim] f32, in place; complete() when the layer is done with it. Takes memory from the
  // workspace. residual bf16: x is rounded after everything that is added to it.
  Stream(Context& ctx, View x, DType compute, DType residual);

  // Of which what was added last is not a part until complete().
  View x() const { return x_; }

  // Valid until the next call.
  LayerInput normed(const StreamNorm& norm);

  // x += (rows W^T + b) * gate, or without a gate; the gate's views must stay until the next norm.
  void add(View rows, const LinearWeight& weight, const FrameVectors& gate);

  // Everything that was added is in x.
  void complete();

 private:
  Context& ctx_;
  View x_;
  DType residual_;
  bool is_short_;  // few rows
  View normed_;
  // What is added to the stream stays f32: rounding it to bf16 would add a tenth to the error.
  View added_;
  bool is_added_ = true;
  FrameVectors gate_;  // of added_, if it is not
};

}  // namespace longtake
