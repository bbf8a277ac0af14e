// split_heads on the CPU: composed of the ops that it fuses on the GPU.
#include "ops/elementwise.h"
#include "ops/heads.h"
#include "ops/image.h"
#include "ops/norm.h"
#include "ops/rope.h"

namespace longtake::cpu {

void split_heads(Context& ctx, View x, std::span<const HeadPart> parts, View cos, View sin,
                 float eps) {
  const int64_t rows = x.dim(0);
  const int64_t dim = x.dim(1) / static_cast<int64_t>(parts.size());
  const Shape flat{rows, dim};
  for (size_t p = 0; p < parts.size(); ++p) {
    const HeadPart& part = parts[p];
    if (part.out.empty()) continue;
    const Workspace::Scope scope(ctx.workspace());
    View own = x;
    if (parts.size() > 1) {
      own = ctx.workspace().take(DType::kF32, flat);
      cpu::slice_channels(ctx, x.reshape({rows, 1, x.dim(1)}), static_cast<int64_t>(p) * dim,
                          own.reshape({rows, 1, dim}));
    }
    const View out = part.out.reshape(flat);
    if (part.norm.empty() && !part.rotates) {
      cpu::convert(ctx, own, out);
      continue;
    }
    View normed = part.rotates ? own : out;
    if (part.rotates && !part.norm.empty() && parts.size() == 1)
      normed = ctx.workspace().take(DType::kF32, flat);  // x is only read
    if (!part.norm.empty()) cpu::rms_norm(ctx, own, part.norm, eps, normed);
    if (part.rotates) cpu::rope(ctx, normed.reshape(part.out.shape()), cos, sin, part.out);
  }
}

}  // namespace longtake::cpu
