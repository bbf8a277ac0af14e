// The binary as a process: what it printed, how it ended, what it left.
#pragma once

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <filesystem>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "media/frame_reader.h"
#include "runtime_support.h"

namespace longtake::testing_support {

using Args = std::vector<std::string>;

struct Result {
  int code = -1;  // exit code, or -signal
  std::string out;
  std::string err;
};

// A running binary whose output goes to files.
class Process {
 public:
  Process(const Args& args, const std::string& out, const std::string& err,
          const std::function<void()>& before_exec = nullptr) {
    pid_ = fork();
    if (pid_ != 0) return;
    dup2(open(out.c_str(), O_CREAT | O_TRUNC | O_WRONLY, 0600), STDOUT_FILENO);
    dup2(open(err.c_str(), O_CREAT | O_TRUNC | O_WRONLY, 0600), STDERR_FILENO);
    if (before_exec) before_exec();
    std::vector<char*> argv = {const_cast<char*>("longtake")};
    for (const std::string& arg : args) argv.push_back(const_cast<char*>(arg.c_str()));
    argv.push_back(nullptr);
    execv(LONGTAKE_BINARY, argv.data());
    _exit(127);
  }

  void send(int signal) const { kill(pid_, signal); }

  int wait() const {
    int status = 0;
    waitpid(pid_, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
  }

 private:
  pid_t pid_ = -1;
};

// Runs the binary in a scratch folder of its own.
class CliTest : public testing::Test {
 protected:
  Result run(const Args& args, const std::function<void()>& before_exec = nullptr) const {
    const std::string out = scratch_ / "stdout";
    const std::string err = scratch_ / "stderr";
    Result result;
    result.code = Process(args, out, err, before_exec).wait();
    result.out = read_text(out);
    result.err = read_text(err);
    return result;
  }

  void expect_failure(const Args& args, int code, const std::string& part) const {
    const Result result = run(args);
    EXPECT_EQ(result.code, code) << result.err;
    EXPECT_NE(result.err.find(part), std::string::npos)
        << "wanted: " << part << "\nfound: " << result.err;
    EXPECT_EQ(std::count(result.err.begin(), result.err.end(), '\n'), 1) << result.err;
    EXPECT_EQ(result.err.rfind("longtake: ", 0), 0U) << result.err;
  }

  static int count_frames(const std::string& path, int width, int height) {
    const auto reader = open_frame_reader(path);
    Frame frame;
    int count = 0;
    while (reader->read(frame)) ++count;
    EXPECT_EQ(reader->width(), width);
    EXPECT_EQ(reader->height(), height);
    return count;
  }

  ScratchFolder scratch_;
};

// Waits until the run has made some frames, which the state of the output shows.
inline void wait_for_bytes(const std::string& path, size_t bytes) {
  using namespace std::chrono_literals;
  for (int i = 0; i < 600; ++i) {
    std::error_code error;
    if (std::filesystem::file_size(path, error) >= bytes && !error) return;
    std::this_thread::sleep_for(50ms);
  }
}

}  // namespace longtake::testing_support
