#pragma once
// How fast the originals fade (arXiv 2603.12645 eq. 8, 9). t counts finished steps, T all steps, tau = t / (eps T):
//   linear        beta = max(1 - tau, 0)
//   exponential   beta = max((e^{-gamma tau} - e^{-gamma}) / (1 - e^{-gamma}), 0)
//   adaptive      linear, but the clock slows down while the loss rises (not in the paper; AnnealingClock below)
// so the first step sees the original model (beta = 1) and eps = 0 is direct replacement (beta = 0 from the start).

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string_view>

#include "runtime/error.h"

namespace lightmoe {

enum class AnnealShape : uint8_t { kLinear, kExponential, kAdaptive };

struct Annealing {
  double eps = 0.2;  // share of the steps after which the originals are gone
  AnnealShape shape = AnnealShape::kLinear;
  double gamma = 3;  // exponential only; the paper tries 1, 3, 5

  void check_valid() const {
    check(eps >= 0 && eps <= 1, ErrorKind::kUsage, "--anneal {:g}: expected a share of the steps from 0 to 1", eps);
    check(shape != AnnealShape::kExponential || (gamma > 0 && gamma <= 100), ErrorKind::kUsage,
          "--anneal-gamma {:g}: expected a number above 0, at most 100", gamma);
  }
  // finished_steps need not be whole: an adaptive clock counts parts.
  double beta(double finished_steps, int64_t steps) const {
    const double end = eps * static_cast<double>(steps);
    if (finished_steps >= end) return 0;
    const double tau = finished_steps / end;
    if (shape != AnnealShape::kExponential) return 1 - tau;
    return (std::exp(-gamma * tau) - std::exp(-gamma)) / -std::expm1(-gamma);
  }
};

inline AnnealShape parse_anneal_shape(std::string_view name) {
  if (name == "linear") return AnnealShape::kLinear;
  if (name == "exponential") return AnnealShape::kExponential;
  if (name == "adaptive") return AnnealShape::kAdaptive;
  fail(ErrorKind::kUsage, "--anneal-shape {}: expected linear, exponential or adaptive", name);
}
inline const char* name_of(AnnealShape shape) {
  constexpr const char* kNames[] = {"linear", "exponential", "adaptive"};
  return kNames[static_cast<int>(shape)];
}

// How many steps annealing has come. Linear and exponential: those that are finished. Adaptive: a step counts 1 while the running mean of
// the training loss (weight 0.2 on the newest) is within 5 % of its lowest so far, else 1/4; yet never so little that the originals
// would stay longer than twice as long as eps says, or to the last step.
class AnnealingClock {
 public:
  AnnealingClock(const Annealing& annealing, int64_t steps) : annealing_(annealing), steps_(steps) {}
  struct State {
    double progress = 0, mean = -1, lowest = -1;  // -1: no step yet
  };
  double beta() const { return annealing_.beta(state_.progress, steps_); }
  // After step `finished` (1..steps); steps may be repeated or skipped by the caller only when the shape is not adaptive.
  void observe(int64_t finished, double loss) {
    if (annealing_.shape != AnnealShape::kAdaptive) {
      state_.progress = static_cast<double>(finished);
      return;
    }
    const double end = annealing_.eps * static_cast<double>(steps_);
    if (state_.progress >= end) return;
    if (std::isfinite(loss)) state_.mean = state_.mean < 0 ? loss : kOld * state_.mean + (1 - kOld) * loss;
    const bool rises = state_.lowest >= 0 && state_.mean > kRise * state_.lowest;
    if (state_.lowest < 0 || state_.mean < state_.lowest) state_.lowest = state_.mean;
    const double left = std::min(2 * end, static_cast<double>(steps_)) - static_cast<double>(finished);
    const double least = left > 0 ? (end - state_.progress) / (left + 1) : end;
    state_.progress = std::min(end, state_.progress + std::max(rises ? kSlow : 1.0, least));
  }
  const State& state() const { return state_; }
  void restore(const State& state) { state_ = state; }

 private:
  static constexpr double kOld = 0.8, kRise = 1.05, kSlow = 0.25;
  Annealing annealing_;
  int64_t steps_;
  State state_;
};

}  // namespace lightmoe
