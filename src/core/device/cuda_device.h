// The CUDA side of Buffer, Context, Graph and StageClock, in plain C++: declared everywhere, there
// in CUDA builds.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

namespace longtake::cuda {

class Runtime;

// Stream, handles and scratch of one Context (device/cuda_runtime.h). Throws Error (kUsage) when
// there is no such GPU, its driver is too old, or it is older than compute capability 8.0.
std::shared_ptr<Runtime> make_runtime(int index);
void synchronize(Runtime& runtime);

// Device memory. Throws Error when it is short, naming the size.
std::byte* allocate(int index, size_t bytes);
void release(int index, std::byte* data) noexcept;
// Device memory that nobody has taken.
size_t free_bytes(int index);
// Host memory that the device reads and writes by itself.
std::byte* allocate_page_locked(size_t bytes);
void release_page_locked(std::byte* data) noexcept;

enum class Direction { kToDevice, kToHost, kOnDevice };

// On the runtime's stream.
void enqueue_bytes(Runtime& runtime, const void* from, void* to, size_t bytes, Direction direction);
// At once, without a stream: while models are loaded.
void copy_bytes_now(const void* from, void* to, size_t bytes, Direction direction);
void zero_bytes_now(void* data, size_t bytes);

// Points in time on the runtime's stream.
class Events {
 public:
  Events(Runtime& runtime, int count);
  ~Events();
  Events(const Events&) = delete;
  Events& operator=(const Events&) = delete;

  void record(int index);
  double ms(int begin, int end) const;

 private:
  Runtime& runtime_;
  std::vector<void*> events_;  // cudaEvent_t
};

// What Graph records.
class Recording {
 public:
  explicit Recording(Runtime& runtime) : runtime_(runtime) {}

  ~Recording();
  Recording(const Recording&) = delete;
  Recording& operator=(const Recording&) = delete;

  void begin();
  void end();
  // Gives up what begin() began.
  void abandon() noexcept;
  void launch();

 private:
  Runtime& runtime_;
  void* executable_ = nullptr;  // cudaGraphExec_t
};

}  // namespace longtake::cuda
