// Ctrl-C and SIGTERM ask for a stop; the frame in work is finished first.
#pragma once

namespace longtake::cli {

// Also ignores SIGPIPE and SIGXFSZ, so that a failing write is an error and not the end.
void catch_stop_signals();

// 0, or the number of the signal that asked. A second one ends the process at once.
int stop_signal();

}  // namespace longtake::cli
