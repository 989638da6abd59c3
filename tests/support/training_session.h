#pragma once
// A training run with everything that has state (the bigram model, evaluation, a hook with a counter of its own), and what tests of
// interrupted runs compare.

#include <omp.h>

#include <filesystem>

#include "model/checkpoint.h"
#include "tests/support/bigram.h"

namespace lightmoe::testing {

DataStream session_data(uint64_t seed = 1);
TrainerOptions session_options(int64_t steps, const std::filesystem::path& directory);

struct Session {
  Bigram model;
  DataStream data = session_data();
  double counter = 1;
  int64_t step = 0;
  TrainerHooks hooks;
  Session();
  TrainResult operator()(const TrainerOptions& o) { return train(model, data, o, hooks); }
};

std::filesystem::path step_directory(const std::filesystem::path& directory, int64_t step);
// The training state of two checkpoints, byte for byte.
void expect_same_checkpoint(const std::filesystem::path& a, const std::filesystem::path& b);
// The lines of steps, without what a clock or a machine puts in.
std::string steps_of_log(const std::filesystem::path& file);
// As in_child; an Error ends the child with its exit code.
int exit_code_in_child(const std::function<int()>& body);

// Two threads that share a loaded core wait for each other longer than these steps take. It also shows that the number of threads
// does not matter: the reference run uses all of them.
class OneThread {
 public:
  OneThread() : before_(omp_get_max_threads()) { omp_set_num_threads(1); }
  ~OneThread() { omp_set_num_threads(before_); }

 private:
  int before_;
};

}  // namespace lightmoe::testing
