// The one edge where failures become a line and an exit code: 0 done, 1 failed while running,
// 2 wrong usage, 3 bad input file.
#include <fmt/format.h>
#include <spdlog/sinks/stdout_color_sinks.h>
#include <spdlog/spdlog.h>

#include <exception>
#include <new>

#include "base/error.h"
#include "base/log.h"
#include "bench.h"
#include "calibrate.h"
#include "command_line.h"
#include "compare.h"
#include "generate.h"
#include "inspect.h"

namespace {

using longtake::ErrorKind;
using longtake::LogLevel;

constexpr int kFailed = 1;

int exit_code(ErrorKind kind) {
  switch (kind) {
    case ErrorKind::kUsage:
      return 2;
    case ErrorKind::kInput:
      return 3;
    case ErrorKind::kRuntime:
      break;
  }
  return kFailed;
}

void log_to_stderr() {
  spdlog::set_default_logger(spdlog::stderr_color_mt("longtake"));
  spdlog::set_pattern("%^%l%$: %v");
  longtake::set_log_hook([](LogLevel level, const std::string& message) {
    spdlog::log(level == LogLevel::kWarning ? spdlog::level::warn
                : level == LogLevel::kInfo  ? spdlog::level::info
                                            : spdlog::level::debug,
                message);
  });
}

int fail(const char* what, int code) {
  fmt::print(stderr, "longtake: {}\n", what);
  return code;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    log_to_stderr();
    const auto line = longtake::cli::parse_command_line(argc, argv);
    if (line.generate) return longtake::cli::generate(*line.generate);
    if (line.compare) return longtake::cli::compare(*line.compare);
    if (line.calibrate) longtake::cli::calibrate(*line.calibrate);
    if (line.bench) return longtake::cli::bench(*line.bench);
    if (line.inspect) longtake::cli::inspect(*line.inspect);
    return 0;
  } catch (const longtake::Error& error) {
    return fail(error.what(), exit_code(error.kind()));
  } catch (const std::bad_alloc&) {
    return fail("memory: expected more, found none left", kFailed);
  } catch (const std::exception& error) {
    return fail(error.what(), kFailed);
  }
}
