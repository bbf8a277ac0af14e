#include "ops/copy.h"

#include <cstring>

#include "build_config.h"
#include "device/cuda_device.h"
#include "ops/expect.h"

namespace longtake {

void copy(Context& ctx, View from, View to) {
  expect_dtype("copy", to, from.dtype());
  if (from.numel() != to.numel())
    throw Error(str("copy: expected ", from.numel(), " elements, found ", to.numel()));
  if (from.empty()) return;
  const bool from_host = from.device().kind == DeviceKind::kCpu;
  const bool to_host = to.device().kind == DeviceKind::kCpu;
  if (from_host && to_host) {
    std::memcpy(to.raw(), from.raw(), from.bytes());
  } else if constexpr (kHasCuda) {
    cuda::copy_bytes(*ctx.cuda(), from.raw(), to.raw(), from.bytes(),
                     from_host ? cuda::Direction::kToDevice
                     : to_host ? cuda::Direction::kToHost
                               : cuda::Direction::kOnDevice);
  }
}

}  // namespace longtake
