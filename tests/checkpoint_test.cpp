// Stopping and going on: bit-exact, and refused when it is not the same run. Crashes, full disks and signals: trainer_faults_test.cpp.

#include "model/checkpoint.h"
#include "loaders/json.h"

#include <signal.h>

#include <cmath>

#include "loaders/output.h"
#include "tests/support/files.h"
#include "tests/support/testing.h"
#include "tests/support/training_session.h"

namespace fs = std::filesystem;

namespace lightmoe {
namespace {

using testing::expect_same_checkpoint;
using testing::fails_with;
using testing::get_file;
using testing::OneThread;
using testing::Session;
using testing::session_data;
using testing::session_options;
using testing::step_directory;
using testing::steps_of_log;
using testing::TempDir;

TEST(StepCheckpoint, AResumedRunEqualsAnUninterruptedOneBitForBit) {
  TempDir directory;
  Session whole;
  whole(session_options(20, directory / "whole"));
  const OneThread fast;
  for (const int64_t stop : {1, 4, 10, 19}) {
    const fs::path parts = directory / fmt::format("parts-{}", stop);
    Session first;
    first.hooks.after_step = [&](const StepStats& s) {
      if (s.step == stop) raise(SIGTERM);
    };
    const TrainResult stopped = first(session_options(20, parts));
    EXPECT_EQ(stopped.stopped_by_signal, SIGTERM);
    EXPECT_EQ(stopped.steps_done, stop);
    EXPECT_EQ(exit_code_of(stopped, false), 143);
    EXPECT_EQ(exit_code_of(stopped, true), 75);
    Session second;  // a new process would have the initial weights and position too
    const TrainResult resumed = second(session_options(20, parts));
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
  first(session_options(6, directory / "c"));
  again(session_options(6, directory / "c"));
  EXPECT_EQ(again.model.calls, 0);
  EXPECT_TRUE(testing::bits_equal(first.model.table->value, again.model.table->value));
}

TEST(StepCheckpoint, KeepsTheLastKAndTheBest) {
  TempDir directory;
  TrainerOptions o = session_options(20, directory / "c");
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
    TrainerOptions o = session_options(20, directory / "c");
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
  const TrainerOptions base = session_options(8, directory / "c");
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
  EXPECT_TRUE(refused({"data: "}, [](Session& run, auto&) { run.data = session_data(2); }));
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
  TrainerOptions o = session_options(6, directory / "c");
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
  TrainerOptions o = session_options(20, directory / "c");
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
  TrainerOptions o = session_options(3, directory / "c");
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
  const Json good = parse_json(state_to_json(state), "json");
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
    wrong["step"] = parse_json(bad, "json");
    EXPECT_TRUE(fails_with(ErrorKind::kInput, {"s.json", "step"}, [&] { parse_state(wrong.dump(), "s.json"); })) << bad;
  }
  for (const char* bad : {"", "{", "[]", "null", "{\"format\":\"other\"}"}) {
    EXPECT_TRUE(fails_with(ErrorKind::kInput, {"s.json"}, [&] { parse_state(bad, "s.json"); })) << bad;
  }
}

}  // namespace
}  // namespace lightmoe
