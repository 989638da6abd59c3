#include "autograd/schedule.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <numbers>

#include "runtime/error.h"

namespace lightmoe {
namespace {

constexpr ScheduleKind kKinds[] = {ScheduleKind::kConstant, ScheduleKind::kLinear, ScheduleKind::kCosine,
                                   ScheduleKind::kWsd};

// from_chars and not strtod: the decimal point must not depend on the locale.
double parse_number(const std::string& text, const std::string& whole) {
  double value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  check(error == std::errc() && end == text.data() + text.size() && std::isfinite(value) && value >= 0,
        ErrorKind::kUsage, "--warmup {}: expected steps (100), a ratio below 1 (0.03) or a percentage (3%)", whole);
  return value;
}

}  // namespace

std::string_view name_of(ScheduleKind kind) {
  switch (kind) {
    case ScheduleKind::kConstant:
      return "constant";
    case ScheduleKind::kLinear:
      return "linear";
    case ScheduleKind::kCosine:
      return "cosine";
    case ScheduleKind::kWsd:
      return "wsd";
  }
  return "?";
}

ScheduleKind parse_schedule_kind(const std::string& name) {
  for (const ScheduleKind kind : kKinds) {
    if (name == name_of(kind)) return kind;
  }
  fail(ErrorKind::kUsage, "--schedule {}: expected constant, linear, cosine or wsd", name);
}

void Schedule::check_valid() const {
  check(std::isfinite(peak_lr) && peak_lr >= 0, ErrorKind::kUsage, "--lr {}: expected a number >= 0", peak_lr);
  check(total_steps >= 1, ErrorKind::kUsage, "--steps {}: expected at least 1", total_steps);
  check(warmup_steps >= 0 && warmup_steps <= total_steps, ErrorKind::kUsage,
        "--warmup {}: expected 0 to {} (the number of steps)", warmup_steps, total_steps);
  check(min_ratio >= 0 && min_ratio <= 1, ErrorKind::kUsage, "--min-lr-ratio {}: expected 0 to 1", min_ratio);
  check(decay_fraction >= 0 && decay_fraction <= 1, ErrorKind::kUsage, "--decay-fraction {}: expected 0 to 1",
        decay_fraction);
}

double Schedule::lr(int64_t step) const {
  if (step <= warmup_steps) {
    return peak_lr * (static_cast<double>(std::max<int64_t>(step, 0)) / static_cast<double>(warmup_steps));
  }
  if (kind == ScheduleKind::kConstant) return peak_lr;
  int64_t start = std::max<int64_t>(warmup_steps, 1);  // last step at the full peak
  if (kind == ScheduleKind::kWsd) {
    const auto decay = std::llround(decay_fraction * static_cast<double>(total_steps));
    start = std::max(start, total_steps - static_cast<int64_t>(decay));
  }
  if (step <= start) return peak_lr;
  if (step > total_steps) return peak_lr * min_ratio;
  const double p = static_cast<double>(step - start) / static_cast<double>(total_steps + 1 - start);
  const double height = kind == ScheduleKind::kCosine ? 0.5 * (1 + std::cos(std::numbers::pi * p)) : 1 - p;
  return peak_lr * (min_ratio + (1 - min_ratio) * height);
}

int64_t parse_warmup(const std::string& text, int64_t total_steps) {
  const auto total = static_cast<double>(total_steps);
  if (!text.empty() && text.back() == '%') {
    const double percent = parse_number(text.substr(0, text.size() - 1), text);
    check(percent <= 100, ErrorKind::kUsage, "--warmup {}: more than 100%", text);
    return std::llround(percent / 100 * total);
  }
  const double value = parse_number(text, text);
  if (text.find('.') != std::string::npos && value < 1) return std::llround(value * total);
  check(value == std::floor(value) && value <= 9e15, ErrorKind::kUsage,
        "--warmup {}: steps must be whole; a ratio must be below 1", text);
  return static_cast<int64_t>(value);
}

}  // namespace lightmoe
