#include "progress.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>

namespace longtake::cli {
namespace {

using std::chrono::duration;

constexpr int kBarWidth = 24;
constexpr double kTerminalSeconds = 0.1;  // between two drawings
constexpr double kPlainSeconds = 10;      // between two lines

// "1:02:03", "4:05".
std::string clock_text(double seconds) {
  const auto s = static_cast<int64_t>(seconds);
  return s >= 3600 ? fmt::format("{}:{:02}:{:02}", s / 3600, s / 60 % 60, s % 60)
                   : fmt::format("{}:{:02}", s / 60, s % 60);
}

}  // namespace

std::string bytes_text(double bytes) {
  const char* const units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  size_t unit = 0;
  for (; bytes >= 1024 && unit + 1 < std::size(units); ++unit) bytes /= 1024;
  const int digits = unit == 0 || bytes >= 100 ? 0 : 1;
  return fmt::format("{:.{}f} {}", bytes, digits, units[unit]);
}

Progress::Progress(int64_t total_frames, bool quiet)
    : total_(total_frames), quiet_(quiet), terminal_(isatty(STDERR_FILENO) == 1) {}

Progress::~Progress() {
  if (bar_open_) std::fputc('\n', stderr);
}

void Progress::show(int64_t done, const ChunkStats& chunk) {
  const auto now = Clock::now();
  const bool due =
      duration<double>(now - shown_).count() >= (terminal_ ? kTerminalSeconds : kPlainSeconds);
  if (quiet_ || !(due || done == 1 || done == total_)) return;
  shown_ = now;
  const double seconds = duration<double>(now - start_).count();
  const double speed = seconds > 0 ? static_cast<double>(done) / seconds : 0;
  const double left = speed > 0 ? static_cast<double>(total_ - done) / speed : 0;
  const std::string line =
      fmt::format("frame {}/{}  {:.1f} frames/s  {} left  cache {} entries, {}", done, total_,
                  speed, clock_text(left), chunk.cache_entries,
                  bytes_text(static_cast<double>(chunk.cache_bytes_used)));
  if (!terminal_) {
    fmt::print(stderr, "{}\n", line);
    return;
  }
  const auto filled = static_cast<size_t>(kBarWidth * done / std::max<int64_t>(1, total_));
  fmt::print(stderr, "\r[{}{}] {}\x1b[K", std::string(filled, '#'),
             std::string(kBarWidth - filled, '.'), line);
  std::fflush(stderr);
  bar_open_ = true;
}

}  // namespace longtake::cli
