// `longtake generate`: a prompt and actions become a video.
#pragma once

#include "command_line.h"

namespace longtake::cli {

// Exit code: 0, or 1 after an interruption. Throws Error for everything else.
int generate(const GenerateFlags& flags);

}  // namespace longtake::cli
