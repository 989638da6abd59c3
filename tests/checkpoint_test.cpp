// Stopping and going on: bit-exact whatever interrupts a run, and refused when it is not the same run.

#include "model/checkpoint.h"

#include <omp.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cmath>

#include "loaders/output.h"
#include "loaders/safetensors.h"
#include "tests/support/bigram.h"
#include "tests/support/files.h"
#include "tests/support/testing.h"

namespace fs = std::filesystem;

namespace lightmoe {
namespace {

using testing::Bigram;
using testing::fails_with;
using testing::get_file;
using testing::TempDir;
using testing::uneven_documents;

constexpr int64_t kVocab = 7;

DataStream stream(uint64_t seed = 1) {
  return DataStream(uneven_documents(13, 6, kVocab, 5), {.rows = 2, .length = 8, .seed = seed});
}

TrainerOptions options(int64_t steps, const fs::path& directory) {
  TrainerOptions o;
  o.steps = steps;
  o.accumulate = 2;
  o.schedule = {.kind = ScheduleKind::kWsd, .peak_lr = 0.05, .warmup_steps = 3};
  o.aux_coef = 0.01;
  o.spike = {.window = 4, .max_zscore = 50};
  o.eval_every = 4;
  o.checkpoint = {.directory = directory, .keep = 100, .save_last = true, .resume = "auto"};
  o.progress.quiet = true;
  o.progress.log_file = directory.string() + ".jsonl";
  return o;
}

// A run with everything that has state: the model, evaluation, a hook with a counter of its own.
struct Session {
  Bigram model{kVocab};
  DataStream data = stream();
  double counter = 1;
  TrainerHooks hooks;
  Session() {
    hooks.before_step = [this](int64_t step) { counter = 0.75 * counter + 1.0 / static_cast<double>(step); };
    hooks.evaluate = [this](int64_t step) {
      return EvalPoint{.loss = std::abs(static_cast<double>(step) - 9) + counter};
    };
    hooks.save_extra = [this] { return Json{{"counter", counter}}; };
    hooks.load_extra = [this](const Json& extra) { counter = extra.at("counter"); };
    hooks.save_model = [](const fs::path& directory) { write_file_atomically(directory / "config.json", "{}"); };
    hooks.log_fields = [this](const StepStats&) { return Json{{"counter", counter}}; };
    model.after_backward = [](Bigram& m, TrainLosses& losses) {
      if (m.table->value.data<float>()[0] > 1e9) losses.ce_sum = NAN;
    };
  }
  TrainResult operator()(const TrainerOptions& o) { return train(model, data, o, hooks); }
};

fs::path step_directory(const fs::path& directory, int64_t step) { return directory / fmt::format("step-{:08}", step); }

// The training state of two checkpoints, byte for byte.
void expect_same_checkpoint(const fs::path& a, const fs::path& b) {
  for (const char* file : {"state.json", "optimizer.safetensors", "config.json"}) {
    ASSERT_TRUE(fs::exists(a / file)) << a;
    ASSERT_TRUE(fs::exists(b / file)) << b;
    EXPECT_EQ(get_file(a / file), get_file(b / file)) << a / file;
  }
}

// The lines of steps, without what a clock or a machine puts in.
std::string steps_of_log(const fs::path& file) {
  std::string all;
  const std::string text = get_file(file);
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = text.find('\n', begin);
    Json line = Json::parse(text.substr(begin, end - begin));
    begin = end + 1;
    if (line.contains("event")) continue;
    for (const char* key : {"seconds", "live_bytes", "peak_bytes"}) line.erase(key);
    all += line.dump() + "\n";
  }
  return all;
}

int in_child(const std::function<int()>& body) {
  return testing::in_child([&] {
    try {
      return body();
    } catch (const Error& error) {
      return error.exit_code();
    }
  });
}

// Two threads that share a loaded core wait for each other longer than these steps take. It also shows that the number of threads
// does not matter: the reference run uses all of them.
class OneThread {
 public:
  OneThread() : before_(omp_get_max_threads()) { omp_set_num_threads(1); }
  ~OneThread() { omp_set_num_threads(before_); }

 private:
  int before_;
};

TEST(StepCheckpoint, AResumedRunEqualsAnUninterruptedOneBitForBit) {
  TempDir directory;
  Session whole;
  whole(options(20, directory / "whole"));
  const OneThread fast;
  for (const int64_t stop : {1, 4, 10, 19}) {
    const fs::path parts = directory / fmt::format("parts-{}", stop);
    Session first;
    first.hooks.after_step = [&](const StepStats& s) {
      if (s.step == stop) raise(SIGTERM);
    };
    const TrainResult stopped = first(options(20, parts));
    EXPECT_EQ(stopped.stopped_by_signal, SIGTERM);
    EXPECT_EQ(stopped.steps_done, stop);
    EXPECT_EQ(exit_code_of(stopped, false), 143);
    EXPECT_EQ(exit_code_of(stopped, true), 75);
    Session second;  // a new process would have the initial weights and position too
    const TrainResult resumed = second(options(20, parts));
    EXPECT_EQ(resumed.first_step, stop + 1);
    EXPECT_EQ(resumed.stopped_by_signal, 0);
    EXPECT_EQ(resumed.best_step, 8);
    expect_same_checkpoint(step_directory(parts, 20), step_directory(directory / "whole", 20));
    EXPECT_TRUE(testing::bits_equal(second.model.table->value, whole.model.table->value));
    EXPECT_TRUE(testing::bits_equal(second.model.bias->value, whole.model.bias->value));
    EXPECT_EQ(steps_of_log(parts.string() + ".jsonl"), steps_of_log((directory / "whole").string() + ".jsonl"));
  }
}

TEST(StepCheckpoint, AFinishedRunResumesToNothing) {
  TempDir directory;
  Session first, again;
  first(options(6, directory / "c"));
  again(options(6, directory / "c"));
  EXPECT_EQ(again.model.calls, 0);
  EXPECT_TRUE(testing::bits_equal(first.model.table->value, again.model.table->value));
}

TEST(StepCheckpoint, KeepsTheLastKAndTheBest) {
  TempDir directory;
  TrainerOptions o = options(20, directory / "c");
  o.checkpoint.save_every = 3;
  o.checkpoint.keep = 2;
  Session run;
  run(o);
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(directory / "c")) {
    if (entry.is_directory()) names.push_back(entry.path().filename());
  }
  std::sort(names.begin(), names.end());
  // Evaluations at 4, 8, 12, ...: 8 is the best (its loss is about |8 - 9|); last two: 18 and the end.
  EXPECT_EQ(names, (std::vector<std::string>{"step-00000008", "step-00000018", "step-00000020"}));
}

TEST(StepCheckpoint, ACorruptOneIsPassedOverWithAWarning) {
  const OneThread fast;
  for (const char* damage : {"truncated", "flipped", "unmarked", "state", "everything"}) {
    TempDir directory;
    TrainerOptions o = options(20, directory / "c");
    o.checkpoint.save_every = 5;
    Session whole, interrupted, resumed;
    whole(o);
    const fs::path reference = directory / "reference";
    fs::rename(step_directory(directory / "c", 20), reference);
    const fs::path newest = step_directory(directory / "c", 15), tensors = newest / "optimizer.safetensors";
    const std::string kind = damage;
    if (kind == "truncated") fs::resize_file(tensors, fs::file_size(tensors) - 1);
    if (kind == "flipped") {
      std::string bytes = get_file(tensors);
      bytes[bytes.size() - 5] ^= 1;
      testing::put_file(tensors, bytes);
    }
    if (kind == "unmarked") fs::remove(newest / ".complete");
    if (kind == "state") testing::put_file(newest / "state.json", "{}");
    if (kind == "everything") {
      for (const auto& entry : fs::directory_iterator(directory / "c")) {
        if (entry.is_directory()) testing::put_file(entry.path() / "state.json", "{");
      }
      EXPECT_TRUE(fails_with(ErrorKind::kResume, {"no good checkpoint", "state.json"}, [&] { resumed(o); }));
      continue;
    }
    ::testing::internal::CaptureStderr();
    const TrainResult result = resumed(o);
    const std::string warnings = ::testing::internal::GetCapturedStderr();
    EXPECT_NE(warnings.find("step-00000015 is not used"), std::string::npos) << warnings;
    EXPECT_EQ(result.first_step, 11) << damage;
    expect_same_checkpoint(step_directory(directory / "c", 20), reference);
    EXPECT_TRUE(fs::exists(newest.string() + ".abandoned")) << damage;
  }
}

TEST(StepCheckpoint, AnotherRunIsRefusedWithTheDifference) {
  TempDir directory;
  const TrainerOptions base = options(8, directory / "c");
  Session first;
  first(base);
  const auto refused = [&](const std::vector<std::string>& pieces, auto change) {
    Session run;
    TrainerOptions o = base;
    change(run, o);
    const std::string before = get_file(step_directory(directory / "c", 8) / "state.json");
    const auto verdict = fails_with(ErrorKind::kResume, pieces, [&] { run(o); });
    EXPECT_EQ(before, get_file(step_directory(directory / "c", 8) / "state.json"));
    return verdict;
  };
  EXPECT_TRUE(refused({"step-00000008", "lr: 0.05, now 0.1"}, [](Session&, auto& o) { o.schedule.peak_lr = 0.1; }));
  EXPECT_TRUE(refused({"steps: 8, now 9"}, [](Session&, auto& o) { o.steps = 9; }));
  EXPECT_TRUE(refused({"accumulate: 2, now 3"}, [](Session&, auto& o) { o.accumulate = 3; }));
  EXPECT_TRUE(
      refused({"method: absent, now x", "--resume-anyway"}, [](Session&, auto& o) { o.fingerprint["method"] = "x"; }));
  EXPECT_TRUE(refused({"data: "}, [](Session& run, auto&) { run.data = stream(2); }));
  EXPECT_TRUE(
      refused({"frozen weights: "}, [](Session& run, auto&) { run.model.scale->value.template data<float>()[0] = 2; }));
  EXPECT_TRUE(refused({"trained parameters: "}, [](Session& run, auto&) { run.model.bias->trainable = false; }));
  Session anyway;
  TrainerOptions o = base;
  o.steps = 12;
  o.checkpoint.resume_anyway = true;
  EXPECT_EQ(anyway(o).first_step, 9);
  Session beyond;
  o.steps = 10;
  EXPECT_TRUE(fails_with(ErrorKind::kResume, {"step 12", "--steps 10"}, [&] { beyond(o); }));
}

TEST(StepCheckpoint, StartingAnewDoesNotTouchOldCheckpointsUnasked) {
  TempDir directory;
  TrainerOptions o = options(6, directory / "c");
  Session first;
  first(o);
  o.checkpoint.resume = "";
  Session second, third;
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, {"step 6", "--resume auto", "--force"}, [&] { second(o); }));
  o.checkpoint.overwrite = true;
  bool was_set_aside = false;
  third.hooks.before_step = [&](int64_t step) {
    if (step == 2) was_set_aside = fs::exists(step_directory(directory / "c", 6).string() + ".abandoned");
  };
  EXPECT_EQ(third(o).first_step, 1);
  EXPECT_TRUE(was_set_aside);  // until there was something in its place
  EXPECT_FALSE(fs::exists(step_directory(directory / "c", 6).string() + ".abandoned"));
  EXPECT_TRUE(is_complete(step_directory(directory / "c", 6), true));
}

TEST(StepCheckpoint, ResumesFromANamedCheckpointAndSetsLaterOnesAside) {
  const OneThread fast;
  TempDir directory;
  TrainerOptions o = options(20, directory / "c");
  o.checkpoint.save_every = 5;
  Session whole, again, elsewhere;
  whole(o);
  const fs::path reference = directory / "reference";
  fs::copy(step_directory(directory / "c", 20), reference);
  o.checkpoint.resume = step_directory(directory / "c", 10);
  EXPECT_EQ(again(o).first_step, 11);
  expect_same_checkpoint(step_directory(directory / "c", 20), reference);
  EXPECT_TRUE(fs::exists(step_directory(directory / "c", 15).string() + ".abandoned"));
  o.checkpoint.directory = directory / "d";
  o.progress.log_file.clear();
  EXPECT_EQ(elsewhere(o).first_step, 11);
  expect_same_checkpoint(step_directory(directory / "d", 20), reference);
  o.checkpoint.resume = directory / "nowhere";
  Session lost;
  EXPECT_TRUE(fails_with(ErrorKind::kResume, {"nowhere"}, [&] { lost(o); }));
}

TEST(StepCheckpoint, ARunThatSavesNothingLeavesNoDirectory) {
  TempDir directory;
  TrainerOptions o = options(3, directory / "c");
  o.checkpoint.save_last = o.checkpoint.save_best = false;
  Session run;
  run(o);
  EXPECT_FALSE(fs::exists(directory / "c"));
}

TEST(StepCheckpoint, OneProcessADirectory) {
  TempDir directory;
  const CheckpointStore first({.directory = directory / "c"}, {});
  EXPECT_TRUE(
      fails_with(ErrorKind::kUsage, {"another process"}, [&] { CheckpointStore({.directory = directory / "c"}, {}); }));
  EXPECT_TRUE(
      fails_with(ErrorKind::kUsage, {"missing"}, [&] { CheckpointStore({.directory = directory / "missing/c"}, {}); }));
}

// The process stops at the n-th change of the file system, for every n; the run then goes on and ends as if nothing had happened.
TEST(StepCheckpoint, CrashLoop) {
  TempDir directory;
  const auto configured = [&](const fs::path& where) {
    TrainerOptions o = options(4, where);
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
    const int code = in_child([&] {
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
TEST(StepCheckpoint, AFailedSaveKeepsTheOldOne) {
  const OneThread fast;
  TempDir directory;
  TrainerOptions o = options(4, directory / "c");
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

TEST(StepCheckpoint, FileSizeLimit) {
  TempDir directory;
  const int code = in_child([&] {
    TrainerOptions o = options(4, directory / "c");
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

TEST(StepCheckpoint, SignalsSaveAndStop) {
  for (const auto& [signal, code] : {SignalCase{SIGTERM, 143}, {SIGINT, 130}, {SIGHUP, 129}}) {
    TempDir directory;
    TrainerOptions o = options(1000000, directory / "c");
    o.checkpoint.save_best = false;
    const int actual = in_child([&] {
      struct sigaction action {};
      action.sa_handler = SIG_DFL;  // a test runner may ignore some
      sigaction(signal, &action, nullptr);
      Session run;
      run.model.during = [&] {
        if (run.model.calls == 7) kill(getpid(), signal);  // in the middle of step 4 (two micro-batches a step)
      };
      return exit_code_of(run(o), false);
    });
    EXPECT_EQ(actual, code);
    EXPECT_TRUE(is_complete(step_directory(directory / "c", 4), true));
  }
}

TEST(StepCheckpoint, ASecondSignalExitsAtOnce) {
  TempDir directory;
  const int code = in_child([&] {
    Session run;
    run.model.during = [&] {
      if (run.model.calls != 3) return;
      raise(SIGTERM);
      raise(SIGTERM);
      _exit(1);  // not reached
    };
    run(options(1000, directory / "c"));
    return 2;
  });
  EXPECT_EQ(code, 143);
  EXPECT_FALSE(fs::exists(step_directory(directory / "c", 2)));
}

TEST(StepCheckpoint, UserSignalSavesAndGoesOn) {
  TempDir directory;
  Session run;
  run.hooks.after_step = [](const StepStats& s) {
    if (s.step == 3) raise(SIGUSR1);
  };
  TrainerOptions o = options(6, directory / "c");
  o.eval_every = 0;
  run(o);
  EXPECT_TRUE(is_complete(step_directory(directory / "c", 3), true));
  EXPECT_TRUE(is_complete(step_directory(directory / "c", 6), true));
}

TEST(StepCheckpoint, IgnoredSignalsStayIgnoredAndHandlersComeBack) {
  struct sigaction ignore {
  }, before{}, after{};
  ignore.sa_handler = SIG_IGN;
  sigaction(SIGHUP, &ignore, &before);
  Session run;
  run.hooks.after_step = [](const StepStats&) { raise(SIGHUP); };
  TempDir directory;
  EXPECT_EQ(run(options(3, directory / "c")).steps_done, 3);
  sigaction(SIGHUP, &before, &after);
  EXPECT_EQ(after.sa_handler, SIG_IGN);
  sigaction(SIGTERM, nullptr, &after);
  EXPECT_EQ(after.sa_handler, SIG_DFL);
}

TEST(StepCheckpoint, StateSurvivesItsTextExactly) {
  TrainingState state;
  state.step = 12;
  state.updates = 10;
  state.skipped = 2;
  state.consecutive_skips = 1;
  state.evaluated_step = 8;
  state.eval_loss = 0.1 + 0.2;
  state.best_eval_loss = 1.0 / 3;
  state.best_step = 4;
  state.loss = 1e-300;
  state.data = {.epoch = 3, .next_document = 1ull << 40, .offset = 5};
  state.losses = {1.0 / 7, 2e22};
  state.norms = {5e-324};
  state.fingerprint = {{"lr", "0.1"}, {"data", "ab\"c\n"}};
  state.extra = {{"beta", 0.1}};
  const std::string text = state_to_json(state);
  const TrainingState read = parse_state(text, "state.json");
  EXPECT_EQ(state_to_json(read), text);
  EXPECT_EQ(read.losses, state.losses);
  EXPECT_EQ(read.data, state.data);
  EXPECT_EQ(read.fingerprint, state.fingerprint);
}

TEST(StepCheckpoint, BadStateIsNamed) {
  TrainingState state;
  state.step = 3;
  state.extra = Json::object();
  const Json good = Json::parse(state_to_json(state));
  for (const auto& [key, value] : good.items()) {
    Json missing = good, wrong = good;
    missing.erase(key);
    EXPECT_TRUE(fails_with(ErrorKind::kInput, {"s.json", key}, [&] { parse_state(missing.dump(), "s.json"); }));
    if (key == "extra") continue;
    wrong[key] = key == "eval_loss" || key == "best_eval_loss" ? Json("x") : Json(nullptr);
    EXPECT_TRUE(fails_with(ErrorKind::kInput, {"s.json"}, [&] { parse_state(wrong.dump(), "s.json"); })) << key;
  }
  for (const char* bad : {"-1", "1.5", "1e3", "18446744073709551615", "\"3\"", "[3]"}) {
    Json wrong = good;
    wrong["step"] = Json::parse(bad);
    EXPECT_TRUE(fails_with(ErrorKind::kInput, {"s.json", "step"}, [&] { parse_state(wrong.dump(), "s.json"); })) << bad;
  }
  for (const char* bad : {"", "{", "[]", "null", "{\"format\":\"other\"}"}) {
    EXPECT_TRUE(fails_with(ErrorKind::kInput, {"s.json"}, [&] { parse_state(bad, "s.json"); })) << bad;
  }
}

}  // namespace
}  // namespace lightmoe
