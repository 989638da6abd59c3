#include "tests/support/training_session.h"

#include <cmath>

#include "loaders/json.h"
#include "loaders/output.h"
#include "tests/support/files.h"

namespace fs = std::filesystem;

namespace lightmoe::testing {
namespace {
constexpr int64_t kVocab = 7;
}  // namespace

DataStream session_data(uint64_t seed) {
  return DataStream(uneven_documents(13, 6, kVocab, 5), {.rows = 2, .length = 8, .seed = seed});
}

TrainerOptions session_options(int64_t steps, const fs::path& directory) {
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

Session::Session() : model(kVocab) {
  hooks.before_step = [this](int64_t step) {
    this->step = step;
    counter = 0.75 * counter + 1.0 / static_cast<double>(step);
  };
  hooks.evaluate = [this](int64_t step) {
    return EvalPoint{.loss = std::abs(static_cast<double>(step) - 9) + counter};
  };
  hooks.save_extra = [this] { return Json{{"counter", counter}}; };
  hooks.load_extra = [this](const Json& extra) { counter = extra.at("counter"); };
  hooks.save_model = [](const fs::path& directory) { write_file_atomically(directory / "config.json", "{}"); };
  hooks.log_fields = [this](const StepStats&) { return Json{{"counter", counter}}; };
  model.after_backward = [this](Bigram&, TrainLosses& losses) {
    if (step == 5 || step == 10 || step == 11) losses.ce_sum = NAN;  // skipped updates on both sides of an interruption
  };
}

fs::path step_directory(const fs::path& directory, int64_t step) { return directory / fmt::format("step-{:08}", step); }

void expect_same_checkpoint(const fs::path& a, const fs::path& b) {
  for (const char* file : {"state.json", "optimizer.safetensors", "config.json"}) {
    ASSERT_TRUE(fs::exists(a / file)) << a;
    ASSERT_TRUE(fs::exists(b / file)) << b;
    EXPECT_EQ(get_file(a / file), get_file(b / file)) << a / file;
  }
}

std::string steps_of_log(const fs::path& file) {
  std::string all;
  const std::string text = get_file(file);
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = text.find('\n', begin);
    Json line = parse_json(text.substr(begin, end - begin), "json");
    begin = end + 1;
    if (line.contains("event")) continue;
    for (const char* key : {"seconds", "live_bytes", "peak_bytes"}) line.erase(key);
    all += line.dump() + "\n";
  }
  return all;
}

int exit_code_in_child(const std::function<int()>& body) {
  return in_child([&] {
    try {
      return body();
    } catch (const Error& error) {
      return error.exit_code();
    }
  });
}

}  // namespace lightmoe::testing
