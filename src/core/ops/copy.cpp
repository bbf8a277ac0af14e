#include "ops/copy.h"

#include <cstring>

#include "build_config.h"
#include "device/cuda_device.h"
#include "ops/expect.h"

namespace longtake {

namespace {

bool is_on_cpu(View x) {
  return x.device().kind == DeviceKind::kCpu;
}

}  // namespace

void copy(Context& ctx, View from, View to) {
  enqueue_copy(ctx, from, to);
  if (is_on_cpu(to) && !is_on_cpu(from)) ctx.synchronize();
}

void enqueue_copy(Context& ctx, View from, View to) {
  expect_dtype("copy", to, from.dtype());
  if (from.numel() != to.numel())
    throw Error(str("copy: expected ", from.numel(), " elements, found ", to.numel()));
  if (from.empty()) return;
  if (is_on_cpu(from) && is_on_cpu(to)) {
    std::memcpy(to.raw(), from.raw(), from.bytes());
  } else if constexpr (kHasCuda) {
    cuda::enqueue_bytes(*ctx.cuda(), from.raw(), to.raw(), from.bytes(),
                        is_on_cpu(from) ? cuda::Direction::kToDevice
                        : is_on_cpu(to) ? cuda::Direction::kToHost
                                        : cuda::Direction::kOnDevice);
  }
}

}  // namespace longtake
