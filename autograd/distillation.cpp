#include "autograd/distillation.h"

#include "kernels/distillation.h"

namespace lightmoe {

double DistillationLoss::ce_sum() const { return sums.on(DeviceKind::kCpu).data<double>()[0]; }
double DistillationLoss::kl_sum() const { return sums.on(DeviceKind::kCpu).data<double>()[1]; }

DistillationLoss distillation_loss(Tape& tape, const Var& x, const ParameterPtr& w, const Tensor& labels,
                                   const Distillation& d, const LossScale& scale) {
  check(!w->trainable, ErrorKind::kUsage, "distillation: {} trains, but both models read it", w->name);
  LmHeadDistillation op{.x = x.value,
                        .w = w->value,
                        .teacher = d.teacher,
                        .teacher_w = d.head.defined() ? d.head : w->value,
                        .labels = labels,
                        .weight = d.weight,
                        .temperature = d.temperature,
                        .scale = scale.scale,
                        .compute = scale.compute,
                        .losses = Tensor::empty({2}, DType::kF64)};
  if (tape.recording() && x.grad) op.dx = Tensor::empty(x.value.shape(), x.value.dtype());
  run(op);
  if (op.dx.defined()) tape.record([dx = op.dx, slot = x.grad] { slot->add(dx); });
  return {op.losses};
}

}  // namespace lightmoe
