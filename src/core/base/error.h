// The two kinds of failure. `Error`: the caller's or a file's fault, one line that names the thing,
// what was expected and what was found. `InternalError`: our own bug, with file and line. The
// library throws; each edge translates once.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace longtake {

// What went wrong, as far as an edge (CLI, server, C ABI) must tell cases apart.
enum class ErrorKind {
  kRuntime,  // failed while running: disk full, out of memory
  kUsage,    // wrong option, action or prompt
  kInput,    // bad file: missing, truncated, hostile, of another model
};

class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string& what) : std::runtime_error(what), kind_(kind) {}

  explicit Error(const std::string& what) : Error(ErrorKind::kRuntime, what) {}

  ErrorKind kind() const { return kind_; }

 private:
  ErrorKind kind_;
};

class InternalError : public std::logic_error {
 public:
  using std::logic_error::logic_error;
};

// str("page ", 3, " of ", 7) == "page 3 of 7".
template <typename... Args>
std::string str(const Args&... args) {
  std::ostringstream out;
  static_cast<void>((out << ... << args));
  return out.str();
}

[[noreturn]] void fail_check(const char* condition, const char* file, int line,
                             const std::string& detail);

}  // namespace longtake

// Our own invariants: always on. DCHECK: hot loops, debug builds only.
#define LONGTAKE_CHECK(cond, ...)                                                                 \
  do {                                                                                            \
    if (!(cond)) ::longtake::fail_check(#cond, __FILE__, __LINE__, ::longtake::str(__VA_ARGS__)); \
  } while (false)

#ifdef NDEBUG
#define LONGTAKE_DCHECK(cond, ...) static_cast<void>(0)
#else
#define LONGTAKE_DCHECK(cond, ...) LONGTAKE_CHECK(cond, __VA_ARGS__)
#endif
