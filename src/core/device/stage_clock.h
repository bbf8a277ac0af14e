// How long the stages of a step took where they ran.
#pragma once

#include <chrono>
#include <memory>
#include <vector>

#include "device/context.h"
#include "device/cuda_device.h"

namespace longtake {

// On the CPU the host's clock. On CUDA events on the stream, so that nothing waits for a stage to
// end; read ms() after Context::synchronize().
class StageClock {
 public:
  StageClock(Context& ctx, int num_marks);

  // The end of one stage and the beginning of the next.
  void mark(int index);

  // From mark `begin` to mark `end`, milliseconds.
  double ms(int begin, int end) const;

 private:
  std::vector<std::chrono::steady_clock::time_point> host_;
  std::shared_ptr<cuda::Events> events_;  // null on the CPU
};

}  // namespace longtake
