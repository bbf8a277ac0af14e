#include "device/branch_cuda.h"

#include "device/branch.h"
#include "device/cuda_check.h"

namespace longtake::cuda {
namespace {

class Branch {
 public:
  Branch() {
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "CUDA stream");
    check(cudaEventCreateWithFlags(&forked_, cudaEventDisableTiming), "CUDA event");
    check(cudaEventCreateWithFlags(&joined_, cudaEventDisableTiming), "CUDA event");
    check(cudaEventCreateWithFlags(&ahead_, cudaEventDisableTiming), "CUDA event");
  }

  ~Branch() {
    static_cast<void>(cudaEventDestroy(ahead_));
    static_cast<void>(cudaEventDestroy(joined_));
    static_cast<void>(cudaEventDestroy(forked_));
    static_cast<void>(cudaStreamDestroy(stream_));
  }

  Branch(const Branch&) = delete;
  Branch& operator=(const Branch&) = delete;

  cudaStream_t fork(cudaStream_t from) {
    check(cudaEventRecord(forked_, from), "CUDA event");
    check(cudaStreamWaitEvent(stream_, forked_), "CUDA event");
    is_forked_ = true;
    return stream_;
  }

  void join(cudaStream_t to) {
    if (!is_forked_) return;
    check(cudaEventRecord(joined_, stream_), "CUDA event");
    check(cudaStreamWaitEvent(to, joined_), "CUDA event");
    is_forked_ = false;
  }

  // Of what is on a stream now.
  void let_follow(cudaStream_t stream, cudaStream_t ahead) {
    check(cudaEventRecord(ahead_, ahead), "CUDA event");
    check(cudaStreamWaitEvent(stream, ahead_), "CUDA event");
  }

 private:
  cudaStream_t stream_ = nullptr;
  cudaEvent_t forked_ = nullptr, joined_ = nullptr, ahead_ = nullptr;
  bool is_forked_ = false;
};

Branch& branch_of(Runtime& runtime) {
  return *runtime.kept<std::unique_ptr<Branch>>(0, [] { return std::make_unique<Branch>(); });
}

}  // namespace

cudaStream_t fork_branch(Runtime& runtime) {
  return branch_of(runtime).fork(runtime.stream());
}

void join_branch(Runtime& runtime) {
  branch_of(runtime).join(runtime.stream());
}

void follow(Runtime& runtime, Runtime& ahead) {
  branch_of(ahead).let_follow(runtime.stream(), ahead.stream());
}

}  // namespace longtake::cuda
