#include "autograd/ops.h"
#include "kernels/cross_entropy.h"
#include "kernels/masked_mean.h"
#include "kernels/router.h"

namespace lightmoe {

double Loss::value() const { return sum.on(DeviceKind::kCpu).data<double>()[0] / scale; }

Loss lm_head_loss(Tape& tape, const Var& x, const ParameterPtr& w, const Tensor& labels, double scale,
                  GemmCompute compute) {
  const Tensor loss = Tensor::empty({1}, DType::kF64);
  require(scale > 0, "lm_head_loss: scale is {}, expected a positive number", scale);
  LmHeadCrossEntropy op{
      .x = x.value, .w = w->value, .labels = labels, .scale = scale, .compute = compute, .loss = loss};
  if (tape.recording()) {
    if (x.grad) op.dx = Tensor::empty(x.value.shape(), x.value.dtype());
    if (w->trainable) op.dw = w->ensure_grad();
  }
  run(op);
  if (op.dx.defined()) tape.record([dx = op.dx, slot = x.grad] { slot->add(dx); });
  return {loss, scale};
}

Loss load_balance_loss(Tape& tape, const std::vector<Var>& probs, const std::vector<Tensor>& slots, const Tensor& mask,
                       double scale) {
  std::vector<Tensor> values;
  bool needs = false;
  for (const Var& p : probs) {
    values.push_back(p.value);
    needs = needs || p.needs_grad();
  }
  const Tensor loss = Tensor::empty({1}, DType::kF64);
  run(LoadBalance{.probs = values, .slots = slots, .mask = mask, .loss = loss});
  if (needs) {
    tape.record([probs, values, slots, mask, scale] {
      std::vector<Tensor> gradients;
      for (const Tensor& p : values) gradients.push_back(Tensor::empty(p.shape(), p.dtype()));
      run(LoadBalanceBackward{.probs = values, .slots = slots, .mask = mask, .scale = scale, .dprobs = gradients});
      for (size_t l = 0; l < probs.size(); ++l) {
        if (probs[l].grad) probs[l].grad->add(gradients[l]);
      }
    });
  }
  return {loss};
}

Loss router_entropy_loss(Tape& tape, const std::vector<Var>& probs, const Tensor& mask, double scale) {
  RouterEntropy op{.probs = {}, .mask = mask, .scale = scale, .loss = Tensor::empty({1}, DType::kF64), .dprobs = {}};
  for (const Var& p : probs) {
    op.probs.push_back(p.value);
    op.dprobs.push_back(tape.recording() && p.grad ? Tensor::empty(p.value.shape(), p.value.dtype()) : Tensor());
  }
  run(op);
  tape.record([probs, gradients = op.dprobs] {
    for (size_t l = 0; l < probs.size(); ++l) {
      if (gradients[l].defined()) probs[l].grad->add(gradients[l]);
    }
  });
  return {op.loss};
}

double dot_loss(Tape& tape, const Var& y, const Tensor& weights) {
  require(y.value.dtype() == DType::kF64 && weights.dtype() == DType::kF64 && y.value.shape() == weights.shape(),
          "dot_loss: y is {} {}, weights {} {}, expected f64 of one shape", y.value.shape(), name_of(y.value.dtype()),
          weights.shape(), name_of(weights.dtype()));
  double sum = 0;
  for (int64_t i = 0; i < y.value.numel(); ++i) sum += y.value.data<double>()[i] * weights.data<double>()[i];
  if (y.needs_grad()) tape.record([slot = y.grad, weights] { slot->share(weights); });
  return sum;
}

}  // namespace lightmoe
