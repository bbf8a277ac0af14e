#include "base/error.h"

namespace longtake {

void fail_check(const char* condition, const char* file, int line, const std::string& detail) {
  throw InternalError(
      str(file, ":", line, ": check failed: ", condition, detail.empty() ? "" : ": ", detail));
}

}  // namespace longtake
