// Elementwise ops. Shapes of inputs and output agree unless said otherwise; arithmetic in f32.
#pragma once

#include "device/context.h"
#include "tensor/tensor.h"

namespace longtake {

// x += y. x f32, y f32 | bf16.
void add(Context& ctx, View x, View y);

// x += y * gate, the gated residual. x [L, dim] f32, y [L, dim] f32 | bf16, gate [dim] f32.
void add_gated(Context& ctx, View x, View y, View gate);

// out = x / (1 + exp(-x)). x, out f32 | bf16; may alias when the dtypes agree.
void silu(Context& ctx, View x, View out);

// out = max(x, 0). x, out f32 | bf16; may alias when the dtypes agree.
void relu(Context& ctx, View x, View out);

// out = x in out's dtype, rounded to nearest even. x, out f32 | bf16.
void convert(Context& ctx, View x, View out);

// out = a x + b y. All f32; out may alias x or y.
void axpby(Context& ctx, float a, View x, float b, View y, View out);

// out = x * y. x, y f32, out f32 | bf16; may alias when the dtypes agree.
void multiply(Context& ctx, View x, View y, View out);

// out = limit * tanh(x / limit), softly limited to (-limit, limit). x f32, out f32 | bf16; may
// alias when the dtypes agree.
void soft_limit(Context& ctx, View x, float limit, View out);

namespace cpu {
extern decltype(longtake::add) add;
extern decltype(longtake::add_gated) add_gated;
extern decltype(longtake::silu) silu;
extern decltype(longtake::convert) convert;
extern decltype(longtake::axpby) axpby;
extern decltype(longtake::multiply) multiply;
extern decltype(longtake::relu) relu;
extern decltype(longtake::soft_limit) soft_limit;
}  // namespace cpu

namespace cuda {
extern decltype(longtake::add) add;
extern decltype(longtake::add_gated) add_gated;
extern decltype(longtake::silu) silu;
extern decltype(longtake::convert) convert;
extern decltype(longtake::axpby) axpby;
extern decltype(longtake::multiply) multiply;
extern decltype(longtake::relu) relu;
extern decltype(longtake::soft_limit) soft_limit;
}  // namespace cuda

}  // namespace longtake
