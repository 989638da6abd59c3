#include "autograd/gradcheck.h"

#include <algorithm>
#include <cmath>

namespace lightmoe {
namespace {

constexpr double kSmallestScale = 1e-3;

double value_of(const std::function<double(Tape&)>& loss) {
  Tape tape(false);
  return loss(tape);
}

void check_tensor(const std::function<double(Tape&)>& loss, const std::string& name, const Tensor& x,
                  const Tensor& gradient, int64_t max_elements, GradCheckReport* report) {
  double* values = x.data<double>();
  const auto analytic = [&](int64_t i) { return gradient.defined() ? gradient.data<double>()[i] : 0.0; };
  double scale = kSmallestScale;
  for (int64_t i = 0; i < x.numel(); ++i) scale = std::max(scale, std::abs(analytic(i)));
  const int64_t count = std::min(max_elements, x.numel());
  for (int64_t n = 0; n < count; ++n) {
    const int64_t i = n * x.numel() / count;
    const double kept = values[i], step = 1e-5 * std::max(1.0, std::abs(kept));
    values[i] = kept + step;
    const double above = value_of(loss);
    values[i] = kept - step;
    const double below = value_of(loss);
    values[i] = kept;
    const double numeric = (above - below) / (2 * step);
    const double error = std::abs(analytic(i) - numeric) / scale;
    ++report->checked;
    if (error > report->worst || std::isnan(error)) {
      report->worst = error;
      report->where = fmt::format("{}[{}]: analytic {}, numeric {}", name, i, analytic(i), numeric);
    }
  }
}

}  // namespace

GradCheckReport check_gradients(const std::function<double(Tape&)>& loss, const std::vector<Var>& inputs,
                                const std::vector<ParameterPtr>& parameters, int64_t max_per_tensor) {
  for (const Var& input : inputs) {
    if (input.grad) input.grad->take();
  }
  for (const ParameterPtr& p : parameters) p->zero_grad();
  Tape tape;
  loss(tape);
  tape.backward();
  GradCheckReport report;
  for (size_t i = 0; i < inputs.size(); ++i) {
    const Tensor gradient = inputs[i].grad->take();
    check_tensor(loss, fmt::format("input {}", i), inputs[i].value, gradient, max_per_tensor, &report);
  }
  for (const ParameterPtr& p : parameters) {
    if (p->trainable) check_tensor(loss, p->name, p->value, p->ensure_grad().clone(), max_per_tensor, &report);
  }
  return report;
}

}  // namespace lightmoe
