// Where things lie in a page. Private to kernels.
#pragma once

#include "kv/device_pages.h"

namespace longtake::cuda {

// Bytes from a page's keys to the chunk of 8 channels, `chunk` < D/8, of key `row`; values alike.
__device__ inline int chunk_offset(int row, int chunk) {
  return (chunk >> 3) * (kPageKeys * 128) + row * 128 + (((chunk & 7) ^ (row & 7)) << 4);
}

}  // namespace longtake::cuda
