// Background: work that nobody waits for until the end, done by threads of its own while the caller
// goes on.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <deque>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace longtake {

class Background {
 public:
  // Without threads add() does the work itself.
  explicit Background(int threads);
  // Jobs that have not begun are dropped.
  ~Background();
  Background(const Background&) = delete;
  Background& operator=(const Background&) = delete;

  // From any thread, a job's own included. Where many jobs wait, as they hold memory, the caller
  // does one of them. After a job has thrown, later ones are dropped.
  void add(std::function<void()> job);

  // Until all is done. Throws what the first job that failed has thrown.
  void finish();

 private:
  void work();
  void run(const std::function<void()>& job);

  std::mutex mutex_;  // of everything below
  std::condition_variable changed_;
  std::deque<std::function<void()>> waiting_;
  size_t running_ = 0;
  bool stops_ = false;
  std::exception_ptr failure_;
  std::vector<std::thread> threads_;
};

}  // namespace longtake
