// The calibration reader: any bytes give what writes and reads back alike, or an Error.
#include <cstddef>
#include <cstdint>
#include <cstdlib>

#include "base/error.h"
#include "pipeline/calibration.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using longtake::parse_calibration;
  constexpr uint64_t kFingerprint = 0x123456789abcdef0;
  longtake::world::TransformerConfig sizes;
  sizes.num_layers = 2;
  sizes.num_heads = 1;
  try {
    const auto found = parse_calibration({reinterpret_cast<const std::byte*>(data), size}, "fuzz",
                                         sizes, kFingerprint);
    const std::string text = found.to_json();
    const auto again =
        parse_calibration({reinterpret_cast<const std::byte*>(text.data()), text.size()}, "fuzz",
                          sizes, kFingerprint);
    if (again.to_json() != text) std::abort();
  } catch (const longtake::Error&) {
  }
  return 0;
}
