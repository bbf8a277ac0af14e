// A sequence of steps that is recorded once and replayed: on CUDA one launch instead of a thousand.
#pragma once

#include <functional>
#include <memory>

#include "device/context.h"
#include "device/cuda_device.h"

namespace longtake {

// The first run() calls `steps`, so that workspaces reach their size; the second records them (they
// must allocate nothing, wait for nothing and depend on nothing of the host that changes); later
// ones replay the record and call nothing. On the CPU every run() calls `steps`.
class Graph {
 public:
  void run(Context& ctx, const std::function<void()>& steps);

  // The next run() is a first one again.
  void reset();

  bool is_recorded() const { return recording_ != nullptr; }

 private:
  std::shared_ptr<cuda::Recording> recording_;
  bool has_run_ = false;
};

}  // namespace longtake
