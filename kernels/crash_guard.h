#pragma once
// Foreign code (a plug-in) that crashes or hangs ends the process with one line and exit code 9 instead of a core dump or nothing.
// While a CrashGuard lives, SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT and 30 s without a call of next() print
// "error[E9] NAME: WHAT (crashed)" and leave. One at a time.

#include <signal.h>

#include <string>

namespace lightmoe {

class CrashGuard {
 public:
  explicit CrashGuard(std::string name);
  ~CrashGuard();
  CrashGuard(const CrashGuard&) = delete;
  CrashGuard& operator=(const CrashGuard&) = delete;
  void next(const std::string& what);  // what is about to run; the 30 s begin again

 private:
  static constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGALRM};
  std::string name_;
  struct sigaction before_[6];
};

}  // namespace lightmoe
