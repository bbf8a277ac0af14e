#include "attention/layer_tail.h"

#include "attention/norm_linear_attend.h"
#include "device/dispatch.h"
#include "ops/expect.h"

namespace longtake {
namespace {

void expect_mixed(View mixed, View x, const LinearWeight& weight) {
  expect_dtype("layer_tail mixed", mixed, weight.compute_dtype());
  expect_shape("layer_tail mixed", mixed, x.shape());
}

}  // namespace

bool layer_tail(Context& ctx, View mixed, View x, const LayerTail& tail) {
  expect_dtype("layer_tail", x, DType::kF32);
  if (tail.self_o != nullptr) expect_mixed(mixed, x, *tail.self_o);
  if (tail.q != nullptr) {
    LONGTAKE_CHECK(tail.cross_o != nullptr && tail.up != nullptr && tail.down != nullptr);
    expect_normed("layer_tail, cross attention", x, tail.cross_norm, *tail.q);
    expect_normed("layer_tail, feed forward", x, tail.ffn_norm, *tail.up);
    expect_vectors("layer_tail", x, tail.self_gate);
    expect_vectors("layer_tail", x, tail.ffn_gate);
  } else {
    LONGTAKE_CHECK(tail.self_o == nullptr && tail.next_qkv != nullptr);
  }
  if (tail.next_qkv != nullptr) {
    expect_normed("layer_tail, next heads", x, tail.next_norm, *tail.next_qkv);
    expect_heads(x.dim(0), tail.next_qkv->out_features(), tail.next, tail.cos, tail.sin);
  }
  LONGTAKE_DISPATCH(ctx, layer_tail, mixed, x, tail);
}

void layer_queries(Context& ctx, View mixed, View x, const LayerTail& tail, View q) {
  LONGTAKE_CHECK(tail.self_o != nullptr && tail.q != nullptr);
  expect_mixed(mixed, x, *tail.self_o);
  expect_normed("layer_queries", x, tail.cross_norm, *tail.q);
  expect_vectors("layer_queries", x, tail.self_gate);
  expect_shape("layer_queries", q, {x.dim(0), tail.prompt.num_heads(), tail.prompt.head_dim});
  expect_dtype("layer_queries", q, tail.q->compute_dtype());
  LONGTAKE_DISPATCH(ctx, layer_queries, mixed, x, tail, q);
}

void layer_queries_by_ops(Context& ctx, View mixed, View x, const LayerTail& tail, View q) {
  add_linear(ctx, mixed, *tail.self_o, tail.self_gate, DType::kF32, x, x);
  const HeadPart part{tail.q_norm, false, q};
  norm_linear_heads(ctx, x, tail.cross_norm, *tail.q, {&part, 1}, View(), View(), tail.eps);
}

bool layer_tail_by_ops(Context& ctx, View mixed, View x, const LayerTail& tail) {
  if (tail.q != nullptr) {
    const Workspace::Scope scope(ctx.workspace());
    const DType compute = tail.q->compute_dtype();
    if (tail.self_o != nullptr)
      add_linear(ctx, mixed, *tail.self_o, tail.self_gate, DType::kF32, x, x);
    const View read = ctx.workspace().take(compute, x.shape());
    norm_linear_attend(ctx, x, tail.cross_norm, *tail.q, tail.q_norm, tail.eps, tail.prompt,
                       tail.scale,
                       read.reshape({x.dim(0), tail.prompt.num_heads(), tail.prompt.head_dim}));
    add_linear(ctx, read, *tail.cross_o, {}, DType::kF32, x, x);
    const View hidden = ctx.workspace().take(compute, {x.dim(0), tail.up->out_features()});
    norm_linear(ctx, x, tail.ffn_norm, *tail.up, tail.activation, hidden);
    add_linear(ctx, hidden, *tail.down, tail.ffn_gate, DType::kF32, x, x);
  }
  if (tail.next_qkv != nullptr)
    norm_linear_heads(ctx, x, tail.next_norm, *tail.next_qkv, tail.next, tail.cos, tail.sin,
                      tail.eps);
  return false;
}

namespace cpu {

void layer_queries(Context& ctx, View mixed, View x, const LayerTail& tail, View q) {
  layer_queries_by_ops(ctx, mixed, x, tail, q);
}

bool layer_tail(Context& ctx, View mixed, View x, const LayerTail& tail) {
  return layer_tail_by_ops(ctx, mixed, x, tail);
}

}  // namespace cpu

}  // namespace longtake
