// The action grammar: any text gives actions that print and read back the same, or an Error.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "base/error.h"
#include "overworld/actions.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  constexpr size_t kMostActions = 100000;  // keeps one input fast; larger counts are a unit test's
  namespace world = longtake::overworld;
  try {
    const auto actions = world::parse_actions({reinterpret_cast<const char*>(data), size});
    if (actions.size() > kMostActions) return 0;
    if (world::parse_actions(world::format_actions(actions)) != actions) std::abort();
  } catch (const longtake::Error&) {
  }
  return 0;
}
