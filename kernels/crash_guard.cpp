#include "kernels/crash_guard.h"

#include <unistd.h>

#include <cstring>
#include <utility>

#include "runtime/error.h"

namespace lightmoe {
namespace {

constexpr unsigned kSeconds = 30;
char line[512];  // written beforehand: a signal handler may not format

extern "C" void on_crash(int signal_number) {
  const char* what = signal_number == SIGALRM ? " (no answer in 30 s)\n" : " (crashed)\n";
  (void)!write(STDERR_FILENO, line, std::strlen(line));
  (void)!write(STDERR_FILENO, what, std::strlen(what));
  _exit(static_cast<int>(ErrorKind::kDevice));
}

}  // namespace

CrashGuard::CrashGuard(std::string name) : name_(std::move(name)) {
  struct sigaction action {};
  action.sa_handler = &on_crash;
  for (size_t i = 0; i < std::size(kSignals); ++i) sigaction(kSignals[i], &action, &before_[i]);
}

CrashGuard::~CrashGuard() {
  alarm(0);
  for (size_t i = 0; i < std::size(kSignals); ++i) sigaction(kSignals[i], &before_[i], nullptr);
}

void CrashGuard::next(const std::string& what) {
  const std::string text = fmt::format("error[E9] {}: {}", name_, what);
  std::strncpy(line, text.c_str(), sizeof line - 1);
  alarm(kSeconds);
}

}  // namespace lightmoe
