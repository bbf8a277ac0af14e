#include "device/cuda_runtime.h"

#include "base/error.h"
#include "device/cuda_device.h"

namespace longtake::cuda {
namespace {

constexpr size_t kBlasWorkspaceBytes = size_t{32} << 20;  // NVIDIA's advice for Hopper
constexpr int kOldestMajor = 8;                           // of compute capability

[[noreturn]] void refuse(int index, const std::string& found) {
  throw Error(ErrorKind::kUsage, str("device cuda:", index, ": expected an NVIDIA GPU of compute ",
                                     "capability 8.0 or later, found ", found));
}

cudaMemcpyKind kind_of(Direction direction) {
  switch (direction) {
    case Direction::kToDevice:
      return cudaMemcpyHostToDevice;
    case Direction::kToHost:
      return cudaMemcpyDeviceToHost;
    case Direction::kOnDevice:
      return cudaMemcpyDeviceToDevice;
  }
  return cudaMemcpyDefault;
}

}  // namespace

Runtime::Runtime(int index) : index_(index) {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) {
    static_cast<void>(cudaGetLastError());
    refuse(index, str("none: ", cudaGetErrorString(status)));
  }
  if (index < 0 || index >= count) refuse(index, str("only GPUs 0 to ", count - 1));
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, index), "GPU");
  if (properties.major < kOldestMajor)
    refuse(index, str(properties.name, ", which has ", properties.major, ".", properties.minor));
  check(cudaSetDevice(index), "GPU");
  num_multiprocessors_ = properties.multiProcessorCount;
  is_hopper_or_later_ = properties.major >= 9;
  most_shared_bytes_ = properties.sharedMemPerBlockOptin;
  check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "CUDA stream");
  if (cublasLtCreate(&blas_) != CUBLAS_STATUS_SUCCESS)
    throw Error("cuBLASLt: expected a handle, found a failing library");
  blas_workspace_ = DeviceArray<std::byte>(kBlasWorkspaceBytes);
}

Runtime::~Runtime() {
  static_cast<void>(cublasLtDestroy(blas_));
  static_cast<void>(cudaStreamDestroy(stream_));
}

std::shared_ptr<Runtime> make_runtime(int index) {
  return std::make_shared<Runtime>(index);
}

void synchronize(Runtime& runtime) {
  check(cudaStreamSynchronize(runtime.stream()), "GPU");
}

std::byte* allocate(int index, size_t bytes) {
  void* data = nullptr;
  check(cudaSetDevice(index), "GPU");
  if (cudaMalloc(&data, bytes) != cudaSuccess) {
    static_cast<void>(cudaGetLastError());
    throw Error(str("memory: expected ", bytes, " free bytes on cuda:", index, ", found ",
                    free_bytes(index)));
  }
  return static_cast<std::byte*>(data);
}

size_t free_bytes(int index) {
  size_t free = 0, total = 0;
  check(cudaSetDevice(index), "GPU");
  check(cudaMemGetInfo(&free, &total), "GPU memory");
  return free;
}

void release(int /*index*/, std::byte* data) noexcept {
  static_cast<void>(cudaFree(data));
}

std::byte* allocate_page_locked(size_t bytes) {
  void* data = nullptr;
  if (cudaMallocHost(&data, bytes) != cudaSuccess) {
    static_cast<void>(cudaGetLastError());
    throw Error(str("memory: expected ", bytes, " bytes that can be page-locked, found less"));
  }
  return static_cast<std::byte*>(data);
}

void release_page_locked(std::byte* data) noexcept {
  static_cast<void>(cudaFreeHost(data));
}

void enqueue_bytes(Runtime& runtime, const void* from, void* to, size_t bytes,
                   Direction direction) {
  check(cudaMemcpyAsync(to, from, bytes, kind_of(direction), runtime.stream()), "copy");
}

void copy_bytes_now(const void* from, void* to, size_t bytes, Direction direction) {
  // Our streams do not wait for the stream of this copy, nor it for them: before it, what they
  // still write is waited for; behind it, what is on its way to the GPU when cudaMemcpy returns.
  if (direction != Direction::kToDevice) check(cudaDeviceSynchronize(), "copy");
  check(cudaMemcpy(to, from, bytes, kind_of(direction)), "copy");
  if (direction != Direction::kToHost) check(cudaDeviceSynchronize(), "copy");
}

void zero_bytes_now(void* data, size_t bytes) {
  check(cudaMemset(data, 0, bytes), "clearing GPU memory");
  check(cudaDeviceSynchronize(), "clearing GPU memory");
}

Events::Events(Runtime& runtime, int count)
    : runtime_(runtime), events_(static_cast<size_t>(count), nullptr) {
  for (void*& event : events_) {
    cudaEvent_t created = nullptr;
    check(cudaEventCreate(&created), "CUDA event");
    event = created;
  }
}

Events::~Events() {
  for (void* event : events_) static_cast<void>(cudaEventDestroy(static_cast<cudaEvent_t>(event)));
}

void Events::record(int index) {
  check(cudaEventRecord(static_cast<cudaEvent_t>(events_[static_cast<size_t>(index)]),
                        runtime_.stream()),
        "CUDA event");
}

double Events::ms(int begin, int end) const {
  float out = 0;
  check(cudaEventElapsedTime(&out, static_cast<cudaEvent_t>(events_[static_cast<size_t>(begin)]),
                             static_cast<cudaEvent_t>(events_[static_cast<size_t>(end)])),
        "CUDA event");
  return out;
}

Recording::~Recording() {
  if (executable_ != nullptr)
    static_cast<void>(cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(executable_)));
}

void Recording::begin() {
  check(cudaStreamBeginCapture(runtime_.stream(), cudaStreamCaptureModeThreadLocal), "CUDA graph");
}

void Recording::end() {
  cudaGraph_t graph = nullptr;
  check(cudaStreamEndCapture(runtime_.stream(), &graph), "CUDA graph");
  cudaGraphExec_t executable = nullptr;
  const cudaError_t status = cudaGraphInstantiate(&executable, graph, 0);
  static_cast<void>(cudaGraphDestroy(graph));
  check(status, "CUDA graph");
  executable_ = executable;
}

void Recording::abandon() noexcept {
  cudaGraph_t graph = nullptr;
  static_cast<void>(cudaStreamEndCapture(runtime_.stream(), &graph));
  if (graph != nullptr) static_cast<void>(cudaGraphDestroy(graph));
  static_cast<void>(cudaGetLastError());
}

void Recording::launch() {
  check(cudaGraphLaunch(static_cast<cudaGraphExec_t>(executable_), runtime_.stream()),
        "CUDA graph");
}

}  // namespace longtake::cuda
