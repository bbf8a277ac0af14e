#include "signals.h"

#include <csignal>
#include <initializer_list>

namespace longtake::cli {
namespace {

volatile std::sig_atomic_t requested = 0;

void request_stop(int signal) {
  requested = signal;
}

}  // namespace

void catch_stop_signals() {
  struct sigaction action {};

  action.sa_handler = request_stop;
  action.sa_flags = SA_RESTART | static_cast<int>(SA_RESETHAND);  // the second signal kills
  for (const int signal : {SIGINT, SIGTERM}) sigaction(signal, &action, nullptr);
  std::signal(SIGPIPE, SIG_IGN);
  std::signal(SIGXFSZ, SIG_IGN);
}

int stop_signal() {
  return requested;
}

}  // namespace longtake::cli
