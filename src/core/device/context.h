// Context: device, threads and scratch memory of one session. First argument of every op; there are
// no hidden globals.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "base/shape.h"
#include "device/buffer.h"
#include "device/device.h"
#include "tensor/tensor.h"

namespace longtake {

namespace cuda {
class Runtime;
}

// Scratch memory as a stack. It grows while the first step runs and stays: a steady step allocates
// nothing. Take memory inside a Scope; leaving the scope gives it back.
class Workspace {
 public:
  explicit Workspace(Device device) : device_(device) {}

  // Uninitialised, 64-byte aligned, valid until the enclosing Scope ends.
  View take(DType dtype, const Shape& shape);

  size_t bytes_reserved() const;

  class Scope {
   public:
    explicit Scope(Workspace& workspace)
        : workspace_(workspace), block_(workspace.block_), used_(workspace.used_) {}

    ~Scope() {
      workspace_.block_ = block_;
      workspace_.used_ = used_;
    }

    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    Workspace& workspace_;
    size_t block_;
    size_t used_;
  };

 private:
  Device device_;
  std::vector<Buffer>
      blocks_;  // filled in order; blocks never move, so views stay valid while others are taken
  size_t block_ = 0;  // index of the block being filled
  size_t used_ = 0;   // bytes used of it
};

class Context {
 public:
  // threads = 0: as many as the machine has. Throws Error (kUsage) when the device is not there.
  explicit Context(Device device = {}, int threads = 0);

  Device device() const { return device_; }

  int threads() const { return threads_; }

  Workspace& workspace() { return workspace_; }

  const Workspace& workspace() const { return workspace_; }

  // What the CUDA twins share (device/cuda_runtime.h); null on the CPU.
  cuda::Runtime* cuda() const { return cuda_.get(); }

  // Ops on CUDA are only enqueued, in order; this waits until all have run.
  void synchronize();

 private:
  Device device_;
  int threads_;
  std::shared_ptr<cuda::Runtime> cuda_;
  Workspace workspace_;
};

}  // namespace longtake
