#include "model/progress.h"

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <fstream>

#include "loaders/json.h"
#include "runtime/memory.h"

namespace fs = std::filesystem;

namespace lightmoe {
namespace {

constexpr double kRedrawSeconds = 0.1;
constexpr double kSpeedMemory = 0.9;  // weight of the past in the displayed tokens/s
constexpr int64_t kMaxLogLineBytes = int64_t{1} << 20;

struct LogPrefix {
  bool is_log = false;  // starts as this program's logs start
  uint64_t end = 0;  // of the last line that belongs to a step up to the given one; a half-written tail is not counted
};
LogPrefix read_log(const fs::path& path, int64_t step) {
  std::ifstream in(path, std::ios::binary);
  std::string line;
  LogPrefix prefix;
  while (std::getline(in, line) && !in.eof()) {
    try {
      const Json json = parse_json(line, path.string(), {.max_bytes = kMaxLogLineBytes});
      if (prefix.end == 0 && json.at("event") != "start") break;
      prefix.is_log = true;
      if (json.at("step").get<int64_t>() > step) break;
    } catch (const std::exception&) {
      break;
    }
    prefix.end += line.size() + 1;
  }
  return prefix;
}

}  // namespace

std::string format_duration(double seconds) {
  const auto s = std::llround(std::clamp(seconds, 0.0, 1e9));
  if (s < 60) return fmt::format("{}s", s);
  if (s < 3600) return fmt::format("{}m{:02}s", s / 60, s % 60);
  return fmt::format("{}h{:02}m", s / 3600, s / 60 % 60);
}

std::string format_bytes(int64_t bytes) {
  const auto b = static_cast<double>(bytes);
  if (bytes >= 10'000'000'000) return fmt::format("{:.2f} GB", b * 1e-9);
  if (bytes >= 1'000'000'000) return fmt::format("{:.3f} GB", b * 1e-9);
  if (bytes >= 1'000'000) return fmt::format("{:.1f} MB", b * 1e-6);
  if (bytes >= 1000) return fmt::format("{:.1f} kB", b * 1e-3);
  return fmt::format("{} B", bytes);
}

ProgressLine::Sink ProgressLine::standard_error() {
  Sink sink;
  sink.write = [](std::string_view text) {
    while (!text.empty()) {
      const ssize_t done = ::write(STDERR_FILENO, text.data(), text.size());
      if (done <= 0) return;  // nobody listens; training goes on
      text.remove_prefix(static_cast<size_t>(done));
    }
  };
  sink.is_terminal = ::isatty(STDERR_FILENO) == 1;
  winsize size{};
  if (sink.is_terminal && ::ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0) sink.width = size.ws_col;
  sink.now = [] { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); };
  return sink;
}

ProgressLine::ProgressLine(const ProgressOptions& options, int64_t total_steps, int64_t first_step, Sink sink)
    : options_(options),
      total_steps_(total_steps),
      first_step_(first_step),
      sink_(std::move(sink)),
      start_(sink_.now()) {}

ProgressLine::~ProgressLine() {
  if (is_drawn_) sink_.write("\n");
}

void ProgressLine::step(const StepStats& stats) {
  const double speed = static_cast<double>(stats.tokens) / std::max(stats.seconds, 1e-9);
  tokens_per_second_ =
      stats.step == first_step_ ? speed : kSpeedMemory * tokens_per_second_ + (1 - kSpeedMemory) * speed;
  if (!stats.skipped.empty()) warning(fmt::format("step {}: {}, update skipped", stats.step, stats.skipped));
  if (options_.quiet) return;
  const double now = sink_.now();
  const bool is_last = stats.step == total_steps_;
  if (!sink_.is_terminal) {
    const int64_t every = std::max<int64_t>(options_.print_every, 1);
    if (stats.step % every == 0 || stats.step == first_step_ || is_last) print_line(describe(stats, now));
    return;
  }
  if (is_drawn_ && !is_last && now - last_draw_ < kRedrawSeconds) return;
  std::string text = describe(stats, now);
  if (sink_.width > 1) text.resize(std::min<size_t>(text.size(), static_cast<size_t>(sink_.width - 1)));
  sink_.write("\r\x1b[K" + text);
  is_drawn_ = true;
  last_draw_ = now;
}

std::string ProgressLine::describe(const StepStats& stats, double now) {
  const MemoryUse memory = memory_use_total();
  const double per_step =
      (now - start_) / static_cast<double>(stats.step - first_step_ + 1);  // with evaluations and saves
  std::string text = fmt::format("step {}/{}  loss {:.4f}", stats.step, total_steps_, stats.loss);
  if (eval_loss_) text += fmt::format("  eval {:.4f}", *eval_loss_);
  text += fmt::format("  grad {:.3g}  lr {:.3g}  {:.0f} tokens/s  memory {} (peak {})  left {}", stats.grad_norm,
                      stats.lr, tokens_per_second_, format_bytes(memory.live_bytes), format_bytes(memory.peak_bytes),
                      format_duration(per_step * static_cast<double>(total_steps_ - stats.step)));
  return text;
}

void ProgressLine::evaluation(int64_t step, const EvalPoint& result, bool is_best) {
  eval_loss_ = result.loss;
  std::string text = fmt::format("step {}: eval loss {:.4f}", step, result.loss);
  for (const auto& [name, value] : result.metrics) text += fmt::format("  {} {:.4g}", name, value);
  note(text + (is_best ? "  (best)" : ""));
}

void ProgressLine::note(const std::string& text) {
  if (!options_.quiet) print_line(text);
}

void ProgressLine::warning(const std::string& text) { print_line("warning: " + text); }

void ProgressLine::print_line(const std::string& text) {
  sink_.write((is_drawn_ ? "\r\x1b[K" : "") + text + "\n");
  is_drawn_ = false;
}

TrainingLog::TrainingLog(const fs::path& path, int64_t resumed_step, bool overwrite) {
  if (path.empty()) return;
  std::error_code error;
  const bool exists = fs::exists(path, error) && fs::file_size(path, error) > 0;
  if (exists) {
    check(resumed_step > 0 || overwrite, ErrorKind::kUsage, "{}: the log exists; choose another place, or --force",
          path.string());
    const LogPrefix prefix = fs::is_regular_file(path) ? read_log(path, resumed_step) : LogPrefix{};
    check(prefix.is_log, ErrorKind::kUsage, "{}: is not a training log of this program; it is not touched",
          path.string());
    fs::resize_file(path, resumed_step > 0 ? prefix.end : 0, error);
    check(!error, ErrorKind::kIo, "{}: cannot cut the log: {}", path.string(), error.message());
  }
  file_ = std::make_unique<OutputFile>(path, OutputFile::Mode::kAppend);
}

std::optional<std::string> TrainingLog::append(const Json& line) {
  if (!file_) return std::nullopt;
  try {
    file_->write(line.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n");
  } catch (const Error& error) {
    file_.reset();
    return fmt::format("the log stops here: {}", error.what());
  }
  return std::nullopt;
}

}  // namespace lightmoe
