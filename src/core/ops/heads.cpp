#include "ops/heads.h"

#include <algorithm>

#include "device/dispatch.h"
#include "ops/expect.h"

namespace longtake {

bool expect_heads(int64_t rows, int64_t columns, std::span<const HeadPart> parts, View cos,
                  View sin) {
  const auto wanted = std::find_if(parts.begin(), parts.end(),
                                   [](const HeadPart& part) { return !part.out.empty(); });
  if (rows == 0 || wanted == parts.end()) return false;
  LONGTAKE_CHECK(parts.size() <= kMaxHeadParts, parts.size(), " parts");
  const View first = wanted->out;
  expect_rank("split_heads out", first, 3);
  expect_float("split_heads out", first);
  const int64_t dim = first.dim(1) * first.dim(2);
  const Shape expected{first.dim(0), static_cast<int64_t>(parts.size()) * dim};
  if (rows != expected[0] || columns != expected[1])
    throw Error(str("split_heads x: expected ", expected.to_string(), ", found ",
                    Shape{rows, columns}.to_string()));
  for (const HeadPart& part : parts) {
    if (part.out.empty()) continue;
    expect_shape("split_heads out", part.out, first.shape());
    expect_dtype("split_heads out", part.out, first.dtype());
    if (!part.norm.empty()) {
      expect_shape("split_heads norm", part.norm, {dim});
      expect_dtype("split_heads norm", part.norm, DType::kF32);
    }
    if (!part.rotates) continue;
    if (first.dim(2) % 2 != 0)
      throw Error(str("split_heads out: expected an even head_dim, found ", first.dim(2)));
    for (const View& table : {cos, sin}) {
      expect_shape("split_heads rotation", table, {first.dim(0), first.dim(2) / 2});
      expect_dtype("split_heads rotation", table, DType::kF32);
    }
  }
  return true;
}

void split_heads(Context& ctx, View x, std::span<const HeadPart> parts, View cos, View sin,
                 float eps) {
  expect_rank("split_heads x", x, 2);
  expect_dtype("split_heads x", x, DType::kF32);
  if (!expect_heads(x.dim(0), x.dim(1), parts, cos, sin)) return;
  LONGTAKE_DISPATCH(ctx, split_heads, x, parts, cos, sin, eps);
}

}  // namespace longtake
