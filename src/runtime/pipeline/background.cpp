#include "pipeline/background.h"

#include <utility>

namespace longtake {
namespace {

constexpr size_t kMostWaiting = 64;

}  // namespace

Background::Background(int threads) {
  for (int i = 0; i < threads; ++i) threads_.emplace_back([this] { work(); });
}

Background::~Background() {
  {
    const std::lock_guard lock(mutex_);
    waiting_.clear();
    stops_ = true;
  }
  changed_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void Background::add(std::function<void()> job) {
  {
    const std::lock_guard lock(mutex_);
    if (failure_) return;
    if (!threads_.empty()) {
      waiting_.push_back(std::move(job));
      job = nullptr;
      if (waiting_.size() > kMostWaiting) {
        job = std::move(waiting_.front());
        waiting_.pop_front();
      }
    }
    if (job) ++running_;
  }
  changed_.notify_all();
  if (job) run(job);
}

void Background::finish() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return waiting_.empty() && running_ == 0; });
  if (failure_) std::rethrow_exception(failure_);
}

void Background::work() {
  std::unique_lock lock(mutex_);
  for (;;) {
    changed_.wait(lock, [&] { return stops_ || !waiting_.empty(); });
    if (waiting_.empty()) return;
    const std::function<void()> job = std::move(waiting_.front());
    waiting_.pop_front();
    ++running_;
    lock.unlock();
    run(job);
    lock.lock();
  }
}

// A job that counts as running.
void Background::run(const std::function<void()>& job) {
  std::exception_ptr failure;
  try {
    job();
  } catch (...) {
    failure = std::current_exception();
  }
  const std::lock_guard lock(mutex_);
  --running_;
  if (failure && !failure_) {
    failure_ = failure;
    waiting_.clear();
  }
  changed_.notify_all();
}

}  // namespace longtake
