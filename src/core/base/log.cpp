#include "base/log.h"

#include <utility>

namespace longtake {
namespace {

LogHook& hook() {
  static LogHook instance;
  return instance;
}

}  // namespace

void set_log_hook(LogHook new_hook) {
  hook() = std::move(new_hook);
}

void log(LogLevel level, const std::string& message) {
  if (hook()) hook()(level, message);
}

}  // namespace longtake
