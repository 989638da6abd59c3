#pragma once
// How fast the originals fade (arXiv 2603.12645 eq. 8, 9). t counts finished steps, T all steps, tau = t / (eps T):
//   linear        beta = max(1 - tau, 0)
//   exponential   beta = max((e^{-gamma tau} - e^{-gamma}) / (1 - e^{-gamma}), 0)
// so the first step sees the original model (beta = 1) and eps = 0 is direct replacement (beta = 0 from the start).

#include <cmath>
#include <cstdint>
#include <string_view>

#include "runtime/error.h"

namespace lightmoe {

enum class AnnealShape : uint8_t { kLinear, kExponential };

struct Annealing {
  double eps = 0.2;  // share of the steps after which the originals are gone
  AnnealShape shape = AnnealShape::kLinear;
  double gamma = 3;  // exponential only; the paper tries 1, 3, 5

  void check_valid() const {
    check(eps >= 0 && eps <= 1, ErrorKind::kUsage, "--anneal {:g}: expected a share of the steps from 0 to 1", eps);
    check(shape == AnnealShape::kLinear || (gamma > 0 && gamma <= 100), ErrorKind::kUsage,
          "--anneal-gamma {:g}: expected a number above 0, at most 100", gamma);
  }
  double beta(int64_t finished_steps, int64_t steps) const {
    const double end = eps * static_cast<double>(steps);
    const auto t = static_cast<double>(finished_steps);
    if (t >= end) return 0;
    const double tau = t / end;
    if (shape == AnnealShape::kLinear) return 1 - tau;
    return (std::exp(-gamma * tau) - std::exp(-gamma)) / -std::expm1(-gamma);
  }
};

inline AnnealShape parse_anneal_shape(std::string_view name) {
  if (name == "linear") return AnnealShape::kLinear;
  if (name == "exponential") return AnnealShape::kExponential;
  fail(ErrorKind::kUsage, "--anneal-shape {}: expected linear or exponential", name);
}

}  // namespace lightmoe
