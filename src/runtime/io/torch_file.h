// Checkpoints of torch.save: a zip archive with a pickle that describes the tensors and one entry
// per storage. Nothing in the pickle is executed, see io/pickle.h.
#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <vector>

#include "io/stored_tensor.h"

namespace longtake {

// The tensors of a dictionary, and those of dictionaries in it, under their key as group. Other
// values, and what lies deeper, are passed over. A file that is one tensor gives one without a
// name. The tensors borrow `file`. `what` names the file in errors. Throws Error (kInput).
std::vector<StoredTensor> parse_torch_file(std::span<const std::byte> file,
                                           const std::string& what);

}  // namespace longtake
