#include "attention/attend.h"
#include "attention/paged_attention.h"
#include "device/cuda_runtime.h"
#include "ops/expect.h"

namespace longtake::cuda {

void attend(Context& ctx, View q, const KvView& kv, const Selection* selection, float scale,
            View out) {
  LONGTAKE_CHECK(kv.device != nullptr);
  const DevicePages& pages = *kv.device;
  expect_dtype("attend out", out, q.dtype());
  LONGTAKE_CHECK((pages.format == PageFormat::kF32) == (q.dtype() == DType::kF32));
  const auto heads = static_cast<int32_t>(kv.num_heads());
  const auto tiles = static_cast<int32_t>((q.dim(0) + kTileQueries - 1) / kTileQueries);
  const auto head_dim = static_cast<int>(kv.head_dim);
  auto& attention = ctx.cuda()->kept<PagedAttention>(
      static_cast<int64_t>(pages.format) << 32 | head_dim,
      [&] { return PagedAttention(head_dim, AttentionKernel::kBest, pages.format); });
  LONGTAKE_CHECK(selection == nullptr || selection->device != nullptr);
  // Dense: all tiles of a head read all of its pages.
  const PageLists lists =
      selection != nullptr
          ? *selection->device
          : PageLists{
                heads, tiles, pages.max_pages_per_head, 0, pages.heads.begin, pages.heads.pages};
  attention.run(q.raw(), q.dim(0), heads, pages.store, lists, scale, out.raw(), stream_of(ctx));
}

}  // namespace longtake::cuda
