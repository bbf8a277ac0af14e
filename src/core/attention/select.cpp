#include "attention/select.h"

#include "base/error.h"
#include "device/dispatch.h"

namespace longtake {

std::unique_ptr<PageSelector> make_page_selector(Context& ctx, int64_t num_heads, int64_t head_dim,
                                                 const SelectOptions& options) {
  if (!(options.density >= 0) || !(options.density <= 1))
    throw Error(ErrorKind::kUsage, str("density: expected 0..1, found ", options.density));
  if (options.tile_queries < 1)
    throw Error(ErrorKind::kUsage,
                str("tile of queries: expected 1 or more, found ", options.tile_queries));
  LONGTAKE_DISPATCH(ctx, make_page_selector, num_heads, head_dim, options);
}

}  // namespace longtake
