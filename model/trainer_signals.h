#pragma once
// While an instance lives, SIGTERM, SIGINT and SIGHUP ask the training loop to stop after the current step and a second one
// leaves the process at once with 128 + signal; SIGUSR1 asks for a checkpoint. Signals the process was started to ignore (nohup,
// background jobs of a shell) stay ignored. Handlers are put back at the end. One instance at a time.

#include <signal.h>

#include <array>

namespace lightmoe {

class TrainerSignals {
 public:
  TrainerSignals();
  ~TrainerSignals();
  TrainerSignals(const TrainerSignals&) = delete;
  TrainerSignals& operator=(const TrainerSignals&) = delete;

  int stop_signal() const;  // 0 = none came
  bool take_save_request();

 private:
  static constexpr std::array<int, 4> kSignals = {SIGTERM, SIGINT, SIGHUP, SIGUSR1};
  std::array<struct sigaction, kSignals.size()> previous_{};
};

}  // namespace lightmoe
