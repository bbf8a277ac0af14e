// The library never prints: it hands messages to a hook that an application may set. Default:
// silence.
#pragma once

#include <functional>
#include <string>

namespace longtake {

enum class LogLevel { kDebug, kInfo, kWarning };

using LogHook = std::function<void(LogLevel, const std::string&)>;

// Set once at start-up, before other threads log.
void set_log_hook(LogHook hook);
void log(LogLevel level, const std::string& message);

}  // namespace longtake
