// Two linear layers around an activation: `name`.0, `name`.2 in PyTorch's Sequential numbering.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "device/context.h"
#include "nn/weight_table.h"
#include "ops/linear.h"
#include "tensor/tensor.h"

namespace longtake {

struct FeedForward {
  Activation activation = Activation::kGeluTanh;
  std::optional<LinearWeight> up, down;

  void list(WeightTable& table, const std::string& name, int64_t in, int64_t hidden, int64_t out,
            DType compute) {
    table.linear(name + ".0", hidden, in, compute, up);
    table.linear(name + ".2", out, hidden, compute, down);
  }

  // x [L, in] in the compute dtype, out [L, out] f32 | bf16.
  void forward(Context& ctx, View x, View out) const {
    const Workspace::Scope scope(ctx.workspace());
    const View hidden = ctx.workspace().take(down->compute_dtype(), {x.dim(0), up->out_features()});
    linear(ctx, x, *up, activation, hidden);
    linear(ctx, hidden, *down, Activation::kNone, out);
  }
};

}  // namespace longtake
