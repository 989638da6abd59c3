#include "model/trainer_guard.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace lightmoe {
namespace {

std::string not_finite(const char* what, double value) {
  if (std::isfinite(value)) return "";
  return std::string(what) + (std::isnan(value) ? " nan" : " inf");
}

void remember(std::deque<double>& window, double value, int64_t limit) {
  window.push_back(value);
  while (static_cast<int64_t>(window.size()) > limit) window.pop_front();
}

}  // namespace

StepGuard::StepGuard(const SpikeRule& rule) : rule_(rule) {
  check(rule.window >= 0 && rule.window != 1, ErrorKind::kUsage, "--spike-window {}: expected 0 (off) or at least 2",
        rule.window);
  check(rule.max_zscore > 0, ErrorKind::kUsage, "--spike-zscore {}: expected a number > 0", rule.max_zscore);
}

std::string StepGuard::judge(double loss, double grad_norm) {
  if (std::string reason = not_finite("loss", loss); !reason.empty()) return reason;
  if (std::string reason = not_finite("gradient norm", grad_norm); !reason.empty()) return reason;
  if (rule_.window == 0) return "";
  if (spikes(losses_, loss)) return "loss spike";
  if (spikes(norms_, grad_norm)) return "gradient norm spike";
  remember(losses_, loss, rule_.window);
  remember(norms_, grad_norm, rule_.window);
  return "";
}

bool StepGuard::spikes(const std::deque<double>& window, double value) const {
  if (static_cast<int64_t>(window.size()) < rule_.window) return false;
  const auto n = static_cast<double>(window.size());
  double mean = 0, squares = 0;
  for (const double x : window) mean += x / n;
  for (const double x : window) squares += (x - mean) * (x - mean);
  const double deviation = std::max(std::sqrt(squares / (n - 1)), 1e-3 * std::abs(mean));
  return deviation > 0 && value - mean > rule_.max_zscore * deviation;
}

void StepGuard::restore(std::deque<double> losses, std::deque<double> norms) {
  losses_ = std::move(losses);
  norms_ = std::move(norms);
}

}  // namespace lightmoe
