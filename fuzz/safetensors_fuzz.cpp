// The safetensors parser: any bytes give an index whose tensors lie within the file, or an Error.
#include <cstddef>
#include <cstdint>
#include <cstdlib>

#include "base/error.h"
#include "io/safetensors.h"
#include "pipeline/saved_session.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try {
    const auto index =
        longtake::parse_safetensors({reinterpret_cast<const std::byte*>(data), size}, "fuzz");
    for (const auto& info : index.tensors) {
      if (info.begin > info.end || info.end > size) std::abort();
    }
    longtake::SavedSession::from_metadata(index.metadata, "fuzz");
  } catch (const longtake::Error&) {
  }
  return 0;
}
