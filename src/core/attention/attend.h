// Softmax attention over paged keys and values.
#pragma once

#include <cstdint>
#include <span>

#include "device/context.h"
#include "kv/page.h"
#include "tensor/tensor.h"

namespace longtake {

namespace cuda {
struct PageLists;
}

// For each head and each tile of `tile_queries` queries the pages to attend, as indices into the
// head's page list. Row (head * num_tiles + tile) is pages[offsets[row] .. offsets[row + 1]).
struct Selection {
  int64_t tile_queries = 0;
  std::span<const int32_t> offsets;  // [heads * num_tiles + 1]
  std::span<const int32_t> pages;
  // On CUDA the lists lie there, over tiles of the kernel's, and nothing stands above.
  const cuda::PageLists* device = nullptr;
};

// out = softmax(q k^T * scale + bias) v per head, one pass over the keys with running maximum and
// sum, f32 accumulation. q [L, N, D] in the pages' dtype, D a multiple of 16 and at most 256;
// out [L, N, D] f32 | bf16, on CUDA of q's dtype. A query without any key, or with every key
// masked, gives zeros. CUDA has 64 and 128 channels in bf16 (kv/device_pages.h); it reads the pages
// as the device knows them when its turn comes, so that a recorded call follows a cache that grows.
void attend(Context& ctx, View q, const KvView& kv, float scale, View out);

// The same over the selected pages. With every page selected, in order, and the same tiles it gives
// the same bits as attend.
void attend_blocks(Context& ctx, View q, const KvView& kv, const Selection& selection, float scale,
                   View out);

namespace cpu {
void attend(Context& ctx, View q, const KvView& kv, const Selection* selection, float scale,
            View out);
}

namespace cuda {
void attend(Context& ctx, View q, const KvView& kv, const Selection* selection, float scale,
            View out);
}

}  // namespace longtake
