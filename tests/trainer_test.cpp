// The loop itself: normalisation, skipped updates, evaluation, hooks, the log. Checkpoints and signals: checkpoint_test.cpp.

#include "model/trainer.h"
#include "loaders/json.h"

#include <cmath>

#include "model/progress.h"
#include "tests/support/bigram.h"
#include "tests/support/files.h"
#include "tests/support/testing.h"

namespace lightmoe {
namespace {

using testing::Bigram;
using testing::fails_with;
using testing::TempDir;
using testing::uneven_documents;

constexpr int64_t kVocab = 17;

DataStream stream(int64_t rows = 2) {
  return DataStream(uneven_documents(23, 9, kVocab, 5), {.rows = rows, .length = 11, .pad_id = 3});
}

TrainerOptions options(int64_t steps) {
  TrainerOptions o;
  o.steps = steps;
  o.schedule = {.kind = ScheduleKind::kCosine, .peak_lr = 0.05, .warmup_steps = 3};
  o.optimizer.weight_decay = 0.01;
  o.progress.quiet = true;
  return o;
}

std::vector<Json> log_lines(const std::filesystem::path& file) {
  std::vector<Json> lines;
  const std::string text = testing::get_file(file);
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = text.find('\n', begin);
    lines.push_back(parse_json(text.substr(begin, end - begin), "json"));
    begin = end + 1;
  }
  return lines;
}

TEST(Trainer, TheLossFalls) {
  Bigram model(kVocab);
  DataStream data = stream();
  std::vector<double> losses;
  const TrainResult result =
      train(model, data, options(80), {.after_step = [&](const StepStats& s) { losses.push_back(s.loss); }});
  ASSERT_EQ(losses.size(), 80u);
  EXPECT_LT(losses.back(), losses.front() - 0.5);
  EXPECT_EQ(result.steps_done, 80);
  EXPECT_EQ(result.loss, losses.back());
  EXPECT_EQ(result.tokens, 80 * 22);
  EXPECT_EQ(result.stopped_by_signal, 0);
  EXPECT_FALSE(model.table->grad.defined());  // gradients are released
}

// One step over 4 rows, cut into 1, 2 or 4 micro-batches whose label counts differ: one loss, one gradient.
TEST(Trainer, AccumulationIsNormalisedOverTheWholeStep) {
  std::vector<double> whole_gradient;
  double whole_loss = 0;
  for (const int64_t accumulate : {1, 2, 4}) {
    Bigram model(kVocab);
    DataStream data = stream(4 / accumulate), again = stream(4 / accumulate);
    std::vector<double> per_micro_batch;
    int64_t labels = 0;
    for (int64_t i = 0; i < accumulate; ++i) {
      const TokenRows rows = again.next();
      Bigram alone(kVocab);
      per_micro_batch.push_back(alone.forward_backward(to_batch(rows), {}).ce_sum);
      labels += rows.num_labels;
    }
    double expected = 0;
    for (const double ce : per_micro_batch) expected += ce / static_cast<double>(labels);

    TrainerOptions o = options(1);
    o.accumulate = accumulate;
    o.aux_coef = 0.3;
    o.schedule.warmup_steps = 0;
    o.optimizer.clip_norm = 0;
    StepStats stats;
    std::vector<double> gradient;
    model.after_backward = [&](Bigram& m, TrainLosses&) { gradient = testing::to_doubles(m.table->grad); };
    train(model, data, o, {.after_step = [&](const StepStats& s) { stats = s; }});
    EXPECT_EQ(model.calls, accumulate);
    EXPECT_EQ(stats.labels, labels);
    EXPECT_NEAR(stats.loss, expected, 1e-12 * expected);
    if (accumulate == 1) {
      whole_gradient = gradient;
      whole_loss = stats.loss;
    }
    EXPECT_NEAR(stats.loss, whole_loss, 1e-12 * whole_loss);
    double largest = 0;
    for (const double g : whole_gradient) largest = std::max(largest, std::abs(g));
    // f32 gradients, at most 44 additions each in a different order.
    for (size_t i = 0; i < gradient.size(); ++i) EXPECT_NEAR(gradient[i], whole_gradient[i], 44 * 6e-8 * largest);
    EXPECT_NEAR(
        stats.aux,
        [&] {
          Bigram fresh(kVocab);
          double aux = 0;
          for (const double b : testing::to_doubles(fresh.bias->value)) aux += b * b;
          return aux;
        }(),
        1e-12);
  }
}

TEST(Trainer, AStepThatIsNotFiniteIsNotApplied) {
  for (const bool in_gradient : {false, true}) {
    Bigram model(kVocab);
    DataStream data = stream();
    Tensor before;
    std::vector<std::string> skipped;
    model.after_backward = [&](Bigram& m, TrainLosses& losses) {
      if (m.calls != 4 && m.calls != 5) return;
      if (in_gradient)
        m.table->grad.data<float>()[7] = INFINITY;
      else
        losses.ce_sum = NAN;
    };
    const TrainResult result =
        train(model, data, options(8),
              {.before_step = [&](int64_t) { before = model.table->value.clone(); },
               .after_step =
                   [&](const StepStats& s) {
                     skipped.push_back(s.skipped);
                     EXPECT_EQ(bool(testing::bits_equal(before, model.table->value)), !s.skipped.empty());
                   }});
    const std::string reason = in_gradient ? "gradient norm inf" : "loss nan";
    EXPECT_EQ(skipped, (std::vector<std::string>{"", "", "", reason, reason, "", "", ""}));
    EXPECT_EQ(result.skipped, 2);
    EXPECT_TRUE(std::isfinite(result.loss));
  }
}

TEST(Trainer, StopsAfterKSkipsInARow) {
  Bigram model(kVocab);
  DataStream data = stream();
  TempDir directory;
  TrainerOptions o = options(100);
  o.max_consecutive_skips = 3;
  o.checkpoint = {.directory = directory / "c", .save_every = 2};
  model.after_backward = [&](Bigram& m, TrainLosses& losses) {
    if (m.calls == 3 || m.calls > 7) losses.ce_sum = NAN;  // one alone does not count towards the three
  };
  EXPECT_TRUE(fails_with(ErrorKind::kNumeric, {"step 10", "loss nan", "3 updates", "step-00000008"},
                         [&] { train(model, data, o); }));
  for (const double w : testing::to_doubles(model.table->value)) ASSERT_TRUE(std::isfinite(w));
}

TEST(Trainer, SpikesAreSkippedWhenAsked) {
  for (const bool rule : {false, true}) {
    Bigram model(kVocab);
    DataStream data = stream();
    TrainerOptions o = options(30);
    if (rule) o.spike = {.window = 10, .max_zscore = 8};
    model.after_backward = [&](Bigram& m, TrainLosses& losses) {
      if (m.calls == 20) losses.ce_sum *= 50;
    };
    std::vector<int64_t> skipped;
    train(model, data, o, {.after_step = [&](const StepStats& s) {
            if (s.skipped == "loss spike") skipped.push_back(s.step);
          }});
    EXPECT_EQ(skipped, rule ? std::vector<int64_t>{20} : std::vector<int64_t>{});
  }
}

TEST(Trainer, EvaluatesOnTimeAndTracksTheBest) {
  Bigram model(kVocab);
  DataStream data = stream();
  TrainerOptions o = options(11);
  o.eval_every = 3;
  std::vector<int64_t> steps;
  const std::vector<double> losses = {3.0, 2.0, 2.5, 2.25};
  const TrainResult result = train(model, data, o, {.evaluate = [&](int64_t step) {
                                     steps.push_back(step);
                                     return EvalPoint{.loss = losses[steps.size() - 1]};
                                   }});
  EXPECT_EQ(steps, (std::vector<int64_t>{3, 6, 9, 11}));
  EXPECT_EQ(result.best_step, 6);
  EXPECT_EQ(result.best_eval_loss, 2.0);
  EXPECT_EQ(result.eval_loss, 2.25);
}

TEST(Trainer, TheLogHasALineAStepWithWhatHooksAdd) {
  TempDir directory;
  Bigram model(kVocab);
  DataStream data = stream();
  TrainerOptions o = options(4);
  o.progress.log_file = directory / "log.jsonl";
  o.eval_every = 2;
  std::vector<double> seen;
  train(model, data, o,
        {.after_step = [&](const StepStats& s) { seen.push_back(s.loss); },
         .evaluate =
             [](int64_t) {
               return EvalPoint{.loss = 1, .metrics = {{"accuracy", 0.5}}};
             },
         .log_fields =
             [](const StepStats& s) {
               return Json{{"beta", 1.0 / s.step}};
             }});
  std::vector<double> logged;
  int evaluations = 0;
  for (const Json& line : log_lines(directory / "log.jsonl")) {
    if (line.contains("event")) {
      evaluations += line["event"] == "eval" && line["accuracy"] == 0.5;
      continue;
    }
    logged.push_back(line["loss"]);
    EXPECT_EQ(line["beta"].get<double>(), 1.0 / line["step"].get<int>());
    EXPECT_EQ(line["lr"].get<double>(), [&] {
      Schedule s = o.schedule;
      s.total_steps = 4;
      return s.lr(line["step"]);
    }());
  }
  EXPECT_EQ(logged, seen);  // doubles survive the text exactly
  EXPECT_EQ(evaluations, 2);

  // A second run neither overwrites the log unasked nor touches what is no log.
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, {"log.jsonl", "--force"}, [&] { train(model, data, o); }));
  testing::put_file(directory / "data.jsonl", "{\"text\":\"precious\"}\n");
  o.progress.log_file = directory / "data.jsonl";
  o.checkpoint.overwrite = true;
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, {"data.jsonl"}, [&] { train(model, data, o); }));
  EXPECT_EQ(testing::get_file(directory / "data.jsonl"), "{\"text\":\"precious\"}\n");
  o.progress.log_file = directory / "log.jsonl";
  train(model, data, o);
}

TEST(Trainer, BadOptionsAreUsageErrors) {
  const auto refuses = [](auto change) {
    Bigram model(kVocab);
    DataStream data = stream();
    TrainerOptions o = options(5);
    change(o, model);
    return fails_with(ErrorKind::kUsage, {}, [&] { train(model, data, o); });
  };
  EXPECT_TRUE(refuses([](auto& o, auto&) { o.steps = 0; }));
  EXPECT_TRUE(refuses([](auto& o, auto&) { o.accumulate = 0; }));
  EXPECT_TRUE(refuses([](auto& o, auto&) { o.schedule.warmup_steps = 6; }));
  EXPECT_TRUE(refuses([](auto& o, auto&) { o.max_consecutive_skips = 0; }));
  EXPECT_TRUE(refuses([](auto& o, auto&) { o.spike.window = 1; }));
  EXPECT_TRUE(refuses([](auto&, auto& model) { model.table->trainable = model.bias->trainable = false; }));
}

struct Screen {
  std::string text;
  double time = 0;
  ProgressLine::Sink sink(bool is_terminal, int width = 0) {
    return {[this](std::string_view s) { text += s; }, is_terminal, width, [this] { return time; }};
  }
};

TEST(Progress, RewritesOneLineOnATerminalAtMostTenTimesASecond) {
  Screen screen;
  {
    ProgressLine line({}, 1000, 1, screen.sink(true, 40));
    for (int64_t step = 1; step <= 100; ++step) {
      screen.time += 0.01;
      line.step({.step = step, .loss = 2, .tokens = 100, .seconds = 0.01});
    }
  }
  const auto draws = std::count(screen.text.begin(), screen.text.end(), '\r');
  EXPECT_GE(draws, 9);
  EXPECT_LE(draws, 11);
  EXPECT_EQ(std::count(screen.text.begin(), screen.text.end(), '\n'), 1);  // when it goes away
  for (size_t at = screen.text.find('\r'); at != std::string::npos;) {
    const size_t next = screen.text.find('\r', at + 1);
    EXPECT_LE(std::min(next, screen.text.size()) - at, 4 + 39 + 1u);
    at = next;
  }
}

TEST(Progress, PlainLinesElsewhereAndOnlyWarningsWhenQuiet) {
  Screen plain, quiet;
  ProgressLine a({.print_every = 10}, 100, 1, plain.sink(false)), b({.quiet = true}, 100, 1, quiet.sink(false));
  for (ProgressLine* line : {&a, &b}) {
    for (int64_t step = 1; step <= 100; ++step) {
      plain.time += 0.5;
      line->step({.step = step,
                  .loss = 2.5,
                  .grad_norm = 0.5,
                  .lr = 1e-3,
                  .tokens = 100,
                  .seconds = 0.5,
                  .skipped = step == 7 ? "loss nan" : ""});
    }
    line->evaluation(100, {.loss = 1.5, .metrics = {{"accuracy", 0.25}}}, true);
  }
  EXPECT_EQ(std::count(plain.text.begin(), plain.text.end(), '\n'), 1 + 10 + 1 + 1);
  EXPECT_EQ(plain.text.find('\r'), std::string::npos);
  EXPECT_NE(plain.text.find("step 50/100  loss 2.5000  grad 0.5  lr 0.001  200 tokens/s  memory "), std::string::npos)
      << plain.text;
  EXPECT_NE(plain.text.find("left 25s"), std::string::npos) << plain.text;
  EXPECT_NE(plain.text.find("step 100: eval loss 1.5000  accuracy 0.25  (best)"), std::string::npos);
  EXPECT_EQ(quiet.text, "warning: step 7: loss nan, update skipped\n");
}

TEST(Progress, DurationsAndBytes) {
  EXPECT_EQ(format_duration(0), "0s");
  EXPECT_EQ(format_duration(59.4), "59s");
  EXPECT_EQ(format_duration(187), "3m07s");
  EXPECT_EQ(format_duration(7500), "2h05m");
  EXPECT_EQ(format_duration(-3), "0s");
  EXPECT_EQ(format_bytes(812), "812 B");
  EXPECT_EQ(format_bytes(3'400'000), "3.4 MB");
  EXPECT_EQ(format_bytes(12'890'000'000), "12.89 GB");
}

}  // namespace
}  // namespace lightmoe
