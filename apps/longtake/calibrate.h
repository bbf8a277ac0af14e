// `longtake calibrate`: which layers and steps of a model should stay dense, as a file beside it.
#pragma once

#include "command_line.h"

namespace longtake::cli {

// Throws Error for everything that goes wrong; a run that is interrupted writes nothing.
void calibrate(const CalibrateFlags& flags);

}  // namespace longtake::cli
