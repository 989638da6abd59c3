// Training interrupted by crashes at every write, full disks and signals: what is left is good, and the run goes on bit for bit.

#include <signal.h>
#include <sys/resource.h>
#include <unistd.h>

#include "loaders/output.h"
#include "tests/support/files.h"
#include "tests/support/training_session.h"

namespace fs = std::filesystem;

namespace lightmoe {
namespace {

using testing::exit_code_in_child;
using testing::expect_same_checkpoint;
using testing::OneThread;
using testing::Session;
using testing::session_options;
using testing::step_directory;
using testing::steps_of_log;
using testing::TempDir;

// The process stops at the n-th change of the file system, for every n; the run then goes on and ends as if nothing had happened.
TEST(TrainerFaults, CrashLoop) {
  TempDir directory;
  const auto configured = [&](const fs::path& where) {
    TrainerOptions o = session_options(4, where);
    o.checkpoint.save_every = 2;
    o.checkpoint.keep = 1;
    return o;
  };
  Session whole;
  whole(configured(directory / "whole"));
  const OneThread fast;
  int64_t crashes = 0;
  for (int64_t n = 1;; ++n) {
    const fs::path where = directory / fmt::format("crash-{}", n);
    const int code = exit_code_in_child([&] {
      set_write_fault([&](int64_t number) {
        if (number == n) _exit(77);
      });
      Session run;
      run(configured(where));
      return 0;
    });
    if (code == 0) break;
    ASSERT_EQ(code, 77);
    ++crashes;
    Session resumed;
    resumed(configured(where));
    expect_same_checkpoint(step_directory(where, 4), step_directory(directory / "whole", 4));
    EXPECT_EQ(steps_of_log(where.string() + ".jsonl"), steps_of_log((directory / "whole").string() + ".jsonl"));
    for (const auto& entry : fs::directory_iterator(where)) {
      EXPECT_NE(entry.path().filename().string().rfind(".step-", 0), 0u) << "left over: " << entry.path();
    }
    fs::remove_all(where);
  }
  EXPECT_GT(crashes, 20);
}

// The n-th write fails (a full disk): Error(kIo), and what was saved before is still good.
TEST(TrainerFaults, AFailedSaveKeepsTheOldOne) {
  const OneThread fast;
  TempDir directory;
  TrainerOptions o = session_options(4, directory / "c");
  o.progress.log_file.clear();
  o.checkpoint.save_every = 2;
  int64_t failures = 0;
  for (int64_t n = 1;; ++n) {
    fs::remove_all(directory / "c");
    Session run;
    bool saved_two = false;
    run.hooks.before_step = [&](int64_t step) {
      if (step != 3) return;
      saved_two = true;
      set_write_fault([&](int64_t number) {
        if (number == n) fail(ErrorKind::kIo, "no space left");
      });
    };
    bool failed = false;
    try {
      run(o);
    } catch (const Error& error) {
      failed = true;
      EXPECT_EQ(error.kind(), ErrorKind::kIo);
    }
    set_write_fault({});
    ASSERT_TRUE(saved_two);
    if (!failed) break;
    ++failures;
    EXPECT_TRUE(is_complete(step_directory(directory / "c", 2), true) ||
                is_complete(step_directory(directory / "c", 4), true));
    EXPECT_FALSE(fs::exists(directory / "c/.step-00000004.partial"));
  }
  EXPECT_GT(failures, 5);
}

TEST(TrainerFaults, FileSizeLimit) {
  TempDir directory;
  const int code = exit_code_in_child([&] {
    TrainerOptions o = session_options(4, directory / "c");
    o.checkpoint.save_every = 2;
    Session run;
    run.hooks.before_step = [&](int64_t step) {
      const rlimit limit{600, 600};  // bytes; a checkpoint needs more
      if (step == 3) setrlimit(RLIMIT_FSIZE, &limit);
    };
    run(o);
    return 0;
  });
  EXPECT_EQ(code, 4);
  EXPECT_TRUE(is_complete(step_directory(directory / "c", 2), true));
  EXPECT_FALSE(fs::exists(step_directory(directory / "c", 4)));
}

struct SignalCase {
  int signal, code;
};

TEST(TrainerFaults, SignalsSaveAndStop) {
  for (const SignalCase& test : {SignalCase{SIGTERM, 143}, {SIGINT, 130}, {SIGHUP, 129}}) {
    TempDir directory;
    TrainerOptions o = session_options(1000000, directory / "c");
    o.checkpoint.save_best = false;
    const int actual = exit_code_in_child([&] {
      struct sigaction action {};
      action.sa_handler = SIG_DFL;  // a test runner may ignore some
      sigaction(test.signal, &action, nullptr);
      Session run;
      run.model.during = [&] {
        if (run.model.calls == 7) kill(getpid(), test.signal);  // in the middle of step 4 (two micro-batches a step)
      };
      return exit_code_of(run(o), false);
    });
    EXPECT_EQ(actual, test.code);
    EXPECT_TRUE(is_complete(step_directory(directory / "c", 4), true));
  }
}

TEST(TrainerFaults, ASecondSignalExitsAtOnce) {
  TempDir directory;
  const int code = exit_code_in_child([&] {
    Session run;
    run.model.during = [&] {
      if (run.model.calls != 3) return;
      raise(SIGTERM);
      raise(SIGTERM);
      _exit(1);  // not reached
    };
    run(session_options(1000, directory / "c"));
    return 2;
  });
  EXPECT_EQ(code, 143);
  EXPECT_FALSE(fs::exists(step_directory(directory / "c", 2)));
}

TEST(TrainerFaults, AnEvaluationThatASignalMetIsRepeatedAndNoOther) {
  TempDir directory;
  Session whole, stopped, resumed;
  whole(session_options(8, directory / "whole"));
  stopped.hooks.evaluate = [&](int64_t step) {
    raise(SIGTERM);
    EXPECT_TRUE(stop_requested());
    EXPECT_EQ(step, 4);
    return EvalPoint{.loss = -1000};  // half an evaluation: must not count
  };
  EXPECT_EQ(stopped(session_options(8, directory / "parts")).steps_done, 4);
  std::vector<int64_t> evaluated;
  const auto real = resumed.hooks.evaluate;
  resumed.hooks.evaluate = [&](int64_t step) {
    evaluated.push_back(step);
    return real(step);
  };
  resumed(session_options(8, directory / "parts"));
  EXPECT_EQ(evaluated, (std::vector<int64_t>{4, 8}));
  expect_same_checkpoint(step_directory(directory / "parts", 8), step_directory(directory / "whole", 8));
  evaluated.clear();
  Session again;
  again.hooks.evaluate = resumed.hooks.evaluate;
  again(session_options(8, directory / "parts"));  // finished: nothing is evaluated a second time
  EXPECT_TRUE(evaluated.empty());
}

TEST(TrainerFaults, UserSignalSavesAndGoesOn) {
  TempDir directory;
  Session run;
  run.hooks.after_step = [](const StepStats& s) {
    if (s.step == 3) raise(SIGUSR1);
  };
  TrainerOptions o = session_options(6, directory / "c");
  o.eval_every = 0;
  run(o);
  EXPECT_TRUE(is_complete(step_directory(directory / "c", 3), true));
  EXPECT_TRUE(is_complete(step_directory(directory / "c", 6), true));
}

TEST(TrainerFaults, IgnoredSignalsStayIgnoredAndHandlersComeBack) {
  struct sigaction ignore {
  }, before{}, after{};
  ignore.sa_handler = SIG_IGN;
  sigaction(SIGHUP, &ignore, &before);
  Session run;
  run.hooks.after_step = [](const StepStats&) { raise(SIGHUP); };
  TempDir directory;
  EXPECT_EQ(run(session_options(3, directory / "c")).steps_done, 3);
  sigaction(SIGHUP, &before, &after);
  EXPECT_EQ(after.sa_handler, SIG_IGN);
  sigaction(SIGTERM, nullptr, &after);
  EXPECT_EQ(after.sa_handler, SIG_DFL);
}

}  // namespace
}  // namespace lightmoe
