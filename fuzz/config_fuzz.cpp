// The configuration reader: any bytes give sizes that fit together, or an Error.
#include <cstddef>
#include <cstdint>
#include <cstdlib>

#include "base/error.h"
#include "models/world/config.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try {
    const auto config =
        longtake::world::parse_config({reinterpret_cast<const std::byte*>(data), size}, "fuzz");
    const auto& t = config.transformer;
    if (t.frame_tokens() <= 0 || t.dim != t.num_heads * t.head_dim) std::abort();
  } catch (const longtake::Error&) {
  }
  return 0;
}
