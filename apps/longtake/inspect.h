// `longtake inspect`: what is inside a model, a checkpoint or a saved state.
#pragma once

#include "command_line.h"

namespace longtake::cli {

// Prints to standard output. Throws Error.
void inspect(const InspectFlags& flags);

}  // namespace longtake::cli
