#include "attention/attend.h"

#include "device/dispatch.h"
#include "ops/expect.h"

namespace longtake {
namespace {

constexpr int64_t kHeadDimMultiple = 16;
constexpr int64_t kMaxHeadDim = 256;

void check(View q, const KvView& kv, View out) {
  expect_rank("attend q", q, 3);
  expect_dtype("attend q", q, kv.dtype);
  expect_shape("attend q", q, {q.dim(0), kv.num_heads(), kv.head_dim});
  expect_shape("attend out", out, q.shape());
  expect_float("attend out", out);
  if (kv.head_dim % kHeadDimMultiple != 0 || kv.head_dim > kMaxHeadDim)
    throw Error(str("attend head_dim: expected a multiple of 16 up to 256, found ", kv.head_dim));
}

void check_selection(const KvView& kv, int64_t queries, const Selection& selection) {
  if (selection.tile_queries <= 0)
    throw Error(
        str("selection: expected tiles of 1 query or more, found ", selection.tile_queries));
  const int64_t tiles = (queries + selection.tile_queries - 1) / selection.tile_queries;
  const int64_t rows = kv.num_heads() * tiles;
  if (static_cast<int64_t>(selection.offsets.size()) != rows + 1)
    throw Error(
        str("selection: expected ", rows + 1, " offsets, found ", selection.offsets.size()));
  LONGTAKE_CHECK(selection.offsets.back() == static_cast<int64_t>(selection.pages.size()));
}

}  // namespace

void attend(Context& ctx, View q, const KvView& kv, float scale, View out) {
  check(q, kv, out);
  if (q.empty()) return;
  LONGTAKE_DISPATCH(ctx, attend, q, kv, nullptr, scale, out);
}

void attend_blocks(Context& ctx, View q, const KvView& kv, const Selection& selection, float scale,
                   View out) {
  check(q, kv, out);
  if (q.empty()) return;
  if (selection.device == nullptr) check_selection(kv, q.dim(0), selection);
  LONGTAKE_DISPATCH(ctx, attend, q, kv, &selection, scale, out);
}

}  // namespace longtake
