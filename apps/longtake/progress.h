// How a run is going, on stderr: a bar on a terminal, a plain line now and then elsewhere.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>

#include "pipeline/stats.h"

namespace longtake::cli {

class Progress {
 public:
  Progress(int64_t total_frames, bool quiet);
  ~Progress();  // leaves the terminal on a fresh line
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  void show(int64_t done, const ChunkStats& chunk);

 private:
  using Clock = std::chrono::steady_clock;

  int64_t total_;
  bool quiet_;
  bool terminal_;
  bool bar_open_ = false;
  Clock::time_point start_ = Clock::now();
  Clock::time_point shown_ = start_;
};

// "1.5 GiB", "300 B".
std::string bytes_text(double bytes);

}  // namespace longtake::cli
