#include "base/error.h"
#include "device_rows.h"

namespace longtake::testing_support {

Rows device_rows(Context&, const KvView&, int64_t, int64_t) {
  throw Error("pages of a GPU: expected a build with CUDA, found one without");
}

}  // namespace longtake::testing_support
