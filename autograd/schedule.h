#pragma once
// Learning rate of each optimizer step. Steps count from 1 to T = total_steps; W = warmup_steps.
//   warm-up   s <= W:  peak * s / W            (step 1 already moves; step W has exactly the peak)
//   constant  peak
//   linear    peak * (1 - (1 - m) p),          p = (s - s0) / (T + 1 - s0),  s0 = max(W, 1),  m = min_ratio
//   cosine    peak * (m + (1 - m) (1 + cos(pi p)) / 2)      (SGDR, arXiv 1608.03983, one period)
//   wsd       peak until the last round(decay_fraction T) steps, which fall linearly to m     (arXiv 2404.06395)
// The floor m * peak belongs to step T + 1, so that with m = 0 the last step still moves; steps past T have the floor.

#include <cstdint>
#include <string>
#include <string_view>

namespace lightmoe {

enum class ScheduleKind : uint8_t { kConstant, kLinear, kCosine, kWsd };
std::string_view name_of(ScheduleKind kind);                // "constant", "linear", "cosine", "wsd"
ScheduleKind parse_schedule_kind(const std::string& name);  // Error(kUsage) listing the names

struct Schedule {
  ScheduleKind kind = ScheduleKind::kCosine;
  double peak_lr = 1e-4;
  int64_t total_steps = 0;
  int64_t warmup_steps = 0;
  double min_ratio = 0;
  double decay_fraction = 0.2;  // wsd only

  void check_valid() const;  // Error(kUsage) naming the flag
  double lr(int64_t step) const;
};

// "100" = steps, "0.03" or "3%" = part of total_steps (rounded to the nearest step). A value below 1 with a point is a ratio.
int64_t parse_warmup(const std::string& text, int64_t total_steps);

}  // namespace lightmoe
