// The reader of PyTorch checkpoints: any bytes give tensors that can be read, or an Error.
#include <cstddef>
#include <cstdint>

#include "base/error.h"
#include "io/torch_file.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try {
    const auto tensors =
        longtake::parse_torch_file({reinterpret_cast<const std::byte*>(data), size}, "fuzz");
    for (const auto& tensor : tensors) {
      const longtake::Tensor copy(longtake::Device{}, tensor.dtype, tensor.shape);
      longtake::read_tensor(tensor, copy);
    }
  } catch (const longtake::Error&) {
  }
  return 0;
}
