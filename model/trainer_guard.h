#pragma once
// Decides whether a step's update is applied. Not finite: never. Spike (off unless window > 0): with a full window of accepted
// values, a value more than max_zscore standard deviations above their mean. The deviation is taken as at least 1e-3 of the
// mean, so that a flat curve does not turn noise into spikes. Refused values do not enter the windows.

#include <deque>
#include <string>

#include "model/trainer.h"

namespace lightmoe {

class StepGuard {
 public:
  explicit StepGuard(const SpikeRule& rule);
  // "" and remembers the values, or the reason for refusing them.
  std::string judge(double loss, double grad_norm);

  const std::deque<double>& losses() const { return losses_; }
  const std::deque<double>& norms() const { return norms_; }
  void restore(std::deque<double> losses, std::deque<double> norms);

 private:
  bool spikes(const std::deque<double>& window, double value) const;
  SpikeRule rule_;
  std::deque<double> losses_, norms_;
};

}  // namespace lightmoe
