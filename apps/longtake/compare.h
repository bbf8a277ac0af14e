// `longtake compare`: the same scenarios by several methods, every speed beside its error.
#pragma once

#include "command_line.h"

namespace longtake::cli {

// Exit code: 0, or 1 after an interruption. Throws Error for everything else.
int compare(const CompareFlags& flags);

}  // namespace longtake::cli
