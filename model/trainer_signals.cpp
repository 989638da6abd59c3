#include "model/trainer_signals.h"

#include <unistd.h>

#include <atomic>

#include "model/trainer.h"

namespace lightmoe {
namespace {

// Written in a handler, so: lock-free atomics and nothing else.
std::atomic<int> stop{0};
std::atomic<bool> save{false};
static_assert(std::atomic<int>::is_always_lock_free && std::atomic<bool>::is_always_lock_free);

void on_stop(int signal) {
  int none = 0;
  if (!stop.compare_exchange_strong(none, signal)) _exit(128 + signal);
}
void on_save(int) { save = true; }

}  // namespace

TrainerSignals::TrainerSignals() {
  stop = 0;
  save = false;
  for (size_t i = 0; i < kSignals.size(); ++i) {
    struct sigaction action {};
    action.sa_handler = kSignals[i] == SIGUSR1 ? on_save : on_stop;
    action.sa_flags = SA_RESTART;  // a write of a checkpoint must not fail because a signal came
    sigemptyset(&action.sa_mask);
    sigaction(kSignals[i], nullptr, &previous_[i]);
    if (previous_[i].sa_handler != SIG_IGN) sigaction(kSignals[i], &action, nullptr);
  }
}

TrainerSignals::~TrainerSignals() {
  for (size_t i = 0; i < kSignals.size(); ++i) sigaction(kSignals[i], &previous_[i], nullptr);
  stop = 0;
}

int TrainerSignals::stop_signal() const { return stop; }
bool TrainerSignals::take_save_request() { return save.exchange(false); }

bool stop_requested() { return stop != 0; }

}  // namespace lightmoe
