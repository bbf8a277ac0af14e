#include "ops/patchify.h"

#include "device/dispatch.h"
#include "ops/expect.h"

namespace longtake {
namespace {

void expect_pair(const char* name, View z, int64_t patch, View tokens) {
  expect_rank(name, z, 3);
  expect_dtype(name, z, DType::kF32);
  if (patch <= 0 || z.dim(1) % patch != 0 || z.dim(2) % patch != 0)
    throw Error(str(name, ": expected height and width divisible by ", patch, ", found ",
                    z.shape().to_string()));
  expect_shape(name, tokens, {(z.dim(1) / patch) * (z.dim(2) / patch), z.dim(0) * patch * patch});
}

}  // namespace

void patchify(Context& ctx, View z, int64_t patch, View out) {
  expect_pair("patchify", z, patch, out);
  expect_float("patchify out", out);
  if (z.empty()) return;
  LONGTAKE_DISPATCH(ctx, patchify, z, patch, out);
}

void unpatchify(Context& ctx, View x, int64_t patch, View z) {
  expect_pair("unpatchify", z, patch, x);
  expect_dtype("unpatchify x", x, DType::kF32);
  if (z.empty()) return;
  LONGTAKE_DISPATCH(ctx, unpatchify, x, patch, z);
}

}  // namespace longtake
