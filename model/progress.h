#pragma once
// What a person sees of a run, and the log a program reads.
// ProgressLine: on a terminal one line rewritten in place at most ten times a second; elsewhere a plain line every n steps.
// Evaluations, saves, skipped steps and warnings always get a line of their own (quiet: warnings only). Numbers do not depend on
// the locale. A closed stderr is not an error.
// TrainingLog: one JSON object a line, appended; on resume the lines after the resumed step are cut off, so that the log of an
// interrupted run has each step once.

#include <chrono>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

#include "loaders/json_type.h"
#include "loaders/output.h"
#include "model/trainer.h"

namespace lightmoe {

std::string format_duration(double seconds);  // "42s", "3m07s", "2h05m"
std::string format_bytes(int64_t bytes);      // "812 B", "3.4 MB", "12.89 GB" (powers of 1000, as disks and papers)

class ProgressLine {
 public:
  struct Sink {
    std::function<void(std::string_view)> write;
    bool is_terminal = false;
    int width = 0;                // columns of the terminal, 0 = unknown
    std::function<double()> now;  // seconds, steady
  };
  static Sink standard_error();

  ProgressLine(const ProgressOptions& options, int64_t total_steps, int64_t first_step, Sink sink = standard_error());
  ~ProgressLine();  // leaves the terminal on a fresh line

  void step(const StepStats& stats);
  void evaluation(int64_t step, const EvalPoint& result, bool is_best);
  void note(const std::string& text);     // an event; not when quiet
  void warning(const std::string& text);  // always

 private:
  std::string describe(const StepStats& stats, double now);
  void print_line(const std::string& text);
  ProgressOptions options_;
  int64_t total_steps_, first_step_;
  Sink sink_;
  double start_, last_draw_ = -1;
  double tokens_per_second_ = 0;
  std::optional<double> eval_loss_;
  bool is_drawn_ = false;  // the terminal's last line is ours
};

class TrainingLog {
 public:
  // Empty path: every call is a no-op. resumed_step 0 starts a new file: Error(kUsage) if it exists and is not empty, unless
  // overwrite. A file that does not begin with a log's first line ({"event":"start", ...}) is never cut.
  TrainingLog(const std::filesystem::path& path, int64_t resumed_step, bool overwrite);
  // A failed write (disk full) must not end a training run: it returns the reason once and logging stops.
  std::optional<std::string> append(const Json& line);

 private:
  std::unique_ptr<OutputFile> file_;
};

}  // namespace lightmoe
