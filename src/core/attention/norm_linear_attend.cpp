#include "attention/norm_linear_attend.h"

#include "device/dispatch.h"
#include "ops/expect.h"

namespace longtake {

void norm_linear_attend(Context& ctx, View x, const StreamNorm& norm, const LinearWeight& weight,
                        View head_norm, float eps, const KvView& kv, float scale, View out) {
  expect_normed("norm_linear_attend", x, norm, weight);
  expect_shape("norm_linear_attend out", out, {x.dim(0), kv.num_heads(), kv.head_dim});
  expect_dtype("norm_linear_attend out", out, kv.dtype);
  expect_dtype("norm_linear_attend out", out, weight.compute_dtype());
  const HeadPart part{head_norm, false, out};
  if (!expect_heads(x.dim(0), weight.out_features(), {&part, 1}, View(), View())) return;
  LONGTAKE_DISPATCH(ctx, norm_linear_attend, x, norm, weight, head_norm, eps, kv, scale, out);
}

namespace cpu {

void norm_linear_attend(Context& ctx, View x, const StreamNorm& norm, const LinearWeight& weight,
                        View head_norm, float eps, const KvView& kv, float scale, View out) {
  const Workspace::Scope scope(ctx.workspace());
  const View q = ctx.workspace().take(kv.dtype, out.shape());
  const HeadPart part{head_norm, false, q};
  cpu::norm_linear_heads(ctx, x, norm, weight, {&part, 1}, View(), View(), eps);
  cpu::attend(ctx, q, kv, nullptr, scale, out);
}

}  // namespace cpu

}  // namespace longtake
