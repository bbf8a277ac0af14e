#include "media/frame_writer.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstring>
#include <exception>
#include <filesystem>
#include <mutex>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "base/error.h"
#include "media/frame.h"
#include "media/frame_sink.h"

namespace longtake {
namespace {

// Enough to ride out a keyframe; few, since a slow disk should be felt by the producer soon.
constexpr size_t kQueueFrames = 4;

// FFmpeg's colour conversion may read a little past the last pixel.
constexpr size_t kReadPadding = 64;

// The queue is a ring of slots: the producer owns the free ones, the thread the filled ones, so
// pixels are copied and encoded outside the lock.
class QueuedWriter final : public FrameWriter {
 public:
  QueuedWriter(std::unique_ptr<FrameSink> sink, size_t frame_bytes)
      : frame_bytes_(frame_bytes), sink_(std::move(sink)) {
    for (auto& slot : slots_) slot.resize(frame_bytes_ + kReadPadding);
    thread_ = std::thread([this] { run(); });
  }

  ~QueuedWriter() override { stop(); }

  void write(const uint8_t* rgb) override {
    size_t slot = 0;
    {
      std::unique_lock lock(mutex_);
      LONGTAKE_CHECK(!closing_, "write() after close()");
      changed_.wait(lock, [this] { return filled_ < kQueueFrames || failure_; });
      rethrow_failure();
      slot = (first_ + filled_) % kQueueFrames;
    }
    std::memcpy(slots_[slot].data(), rgb, frame_bytes_);
    {
      std::lock_guard lock(mutex_);
      ++filled_;
    }
    changed_.notify_all();
  }

  void close() override {
    stop();
    if (!failure_reported_) rethrow_failure();
  }

  int64_t frames_written() const override { return frames_kept_; }

 private:
  void stop() {
    if (!thread_.joinable()) return;
    {
      std::lock_guard lock(mutex_);
      closing_ = true;
    }
    changed_.notify_all();
    thread_.join();
  }

  void rethrow_failure() {
    if (!failure_) return;
    failure_reported_ = true;
    std::rethrow_exception(failure_);
  }

  void run() {
    try {
      while (encode_next()) frames_kept_ = sink_->frames_kept();
      sink_->finish();
      frames_kept_ = sink_->frames_kept();
    } catch (...) {
      frames_kept_ = sink_->frames_kept();
      std::lock_guard lock(mutex_);
      failure_ = std::current_exception();
    }
    sink_.reset();  // the file is closed when close() returns, also after a failure
    changed_.notify_all();
  }

  // False when the writer is closing and the queue is empty.
  bool encode_next() {
    {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [this] { return filled_ > 0 || closing_; });
      if (filled_ == 0) return false;
    }
    sink_->encode(slots_[first_].data());
    {
      std::lock_guard lock(mutex_);
      first_ = (first_ + 1) % kQueueFrames;
      --filled_;
    }
    changed_.notify_all();
    return true;
  }

  const size_t frame_bytes_;
  std::unique_ptr<FrameSink> sink_;  // the thread's alone
  std::array<std::vector<uint8_t>, kQueueFrames> slots_;
  std::atomic<int64_t> frames_kept_ = 0;
  bool failure_reported_ = false;  // the producer's alone

  std::mutex mutex_;  // guards what follows
  std::condition_variable changed_;
  size_t first_ = 0;   // the oldest filled slot
  size_t filled_ = 0;  // slots that wait for the thread
  bool closing_ = false;
  std::exception_ptr failure_;

  std::thread thread_;
};

std::string lower_extension(const std::string& path) {
  std::string extension = std::filesystem::path(path).extension().string();
  std::transform(extension.begin(), extension.end(), extension.begin(),
                 [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  return extension;
}

// A folder called `clip.webm` is hardly what was meant.
bool names_another_format(const std::string& path, std::string_view extension) {
  constexpr std::array<std::string_view, 9> kOthers = {".avi", ".gif", ".jpeg", ".jpg", ".m4v",
                                                       ".mkv", ".mov", ".png",  ".webm"};
  return std::find(kOthers.begin(), kOthers.end(), extension) != kOthers.end() &&
         !std::filesystem::is_directory(path);
}

}  // namespace

std::unique_ptr<FrameWriter> open_frame_writer(const std::string& path, int width, int height,
                                               double fps) {
  if (width < 1 || height < 1 || width > kMaxFrameSide || height > kMaxFrameSide) {
    throw Error(ErrorKind::kUsage, str("frame size: expected 1 to ", kMaxFrameSide,
                                       " pixels a side, found ", width, "x", height));
  }
  if (!(fps > 0 && fps <= 1000)) {
    throw Error(ErrorKind::kUsage,
                str("frame rate: expected more than 0 and at most 1000 frames/s, found ", fps));
  }
  const std::string extension = lower_extension(path);
  if (path.empty() || names_another_format(path, extension)) {
    throw Error(ErrorKind::kUsage,
                str("output: expected a file *.mp4 or a folder for PNGs, found '", path, "'"));
  }
  auto sink = extension == ".mp4" ? open_mp4_sink(path, width, height, fps)
                                  : open_png_sink(path, width, height);
  return std::make_unique<QueuedWriter>(std::move(sink), frame_bytes(width, height));
}

}  // namespace longtake
