// What every command that plays needs first: a model, a dtype, a device, small files.
#pragma once

#include <cstddef>
#include <string>

#include "base/dtype.h"
#include "device/device.h"

namespace longtake::cli {

// models/world beside an installed binary, or in a folder above one that was built in its tree.
// Throws Error (kUsage) when there is none.
std::string find_embedded_model();

// "": bf16 where the CPU multiplies it. Throws Error (kUsage).
DType choose_dtype(const std::string& flag);
Device choose_device(const std::string& flag);

// The bytes of a file; throws Error (kInput) when there are more than max_bytes.
std::string read_small_file(const std::string& path, size_t max_bytes);

}  // namespace longtake::cli
