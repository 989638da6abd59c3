#include "autograd/optimizer.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "kernels/access.h"
#include "kernels/adamw.h"

namespace lightmoe {

ParameterRule no_decay_for_vectors(const Parameter& parameter) {
  return {.lr_scale = 1, .decay_scale = parameter.value.rank() < 2 ? 0.0 : 1.0};
}

Optimizer::Optimizer(std::vector<ParameterPtr> parameters, OptimizerOptions options)
    : parameters_(std::move(parameters)), options_(std::move(options)) {
  const auto& o = options_;
  check(o.beta1 >= 0 && o.beta1 < 1 && o.beta2 >= 0 && o.beta2 < 1, ErrorKind::kUsage,
        "--betas {} {}: expected numbers in [0, 1)", o.beta1, o.beta2);
  check(o.eps > 0 && std::isfinite(o.eps), ErrorKind::kUsage, "--eps {}: expected a number > 0", o.eps);
  check(o.weight_decay >= 0 && std::isfinite(o.weight_decay), ErrorKind::kUsage,
        "--weight-decay {}: expected a number >= 0", o.weight_decay);
  check(o.clip_norm >= 0 && !std::isnan(o.clip_norm), ErrorKind::kUsage, "--clip {}: expected a number >= 0 (0 = off)",
        o.clip_norm);
}

double Optimizer::gradient_norm() const {
  std::vector<Tensor> gradients;
  for (const ParameterPtr& p : parameters_) {
    if (p->trainable) gradients.push_back(p->ensure_grad());
  }
  return lightmoe::gradient_norm(gradients);
}

void Optimizer::step(double lr, double norm) {
  AdamW op{.beta1 = options_.beta1, .beta2 = options_.beta2, .eps = options_.eps, .step = ++updates_};
  if (options_.clip_norm > 0 && norm > options_.clip_norm) op.grad_scale = options_.clip_norm / norm;
  for (const ParameterPtr& p : parameters_) {
    if (!p->trainable) continue;
    const ParameterRule rule = options_.rule ? options_.rule(*p) : ParameterRule{};
    const Moments& moments = this->moments(*p);
    op.tensors.push_back({.w = moments.master.defined() ? moments.master : p->value,
                          .grad = p->ensure_grad(),
                          .m = moments.m,
                          .v = moments.v,
                          .lr = lr * rule.lr_scale,
                          .weight_decay = options_.weight_decay * rule.decay_scale});
  }
  run(op);
  for (const ParameterPtr& p : parameters_) {
    if (p->trainable && moments(*p).master.defined()) p->value.copy_from(moments(*p).master);
  }
}

void Optimizer::zero_grad() {
  for (const ParameterPtr& p : parameters_) {
    if (p->trainable) p->zero_grad();
  }
}

Optimizer::Moments& Optimizer::moments(const Parameter& parameter) {
  Moments& moments = moments_[&parameter];
  if (!moments.m.defined()) {
    const MemoryScope scope(MemoryCategory::kOptimizer);
    const DType dtype = accumulator_of(parameter.value.dtype());
    if (parameter.value.dtype() != dtype) moments.master = parameter.value.to(dtype);
    moments.m = Tensor::zeros(parameter.value.shape(), dtype, parameter.value.device());
    moments.v = Tensor::zeros(parameter.value.shape(), dtype, parameter.value.device());
  }
  return moments;
}

TrainingMemory training_memory(const std::vector<ParameterPtr>& parameters) {
  TrainingMemory memory;
  for (const ParameterPtr& p : parameters) {
    const int64_t count = p->value.numel();
    const DType accumulator = accumulator_of(p->value.dtype());
    const int64_t bytes = count * static_cast<int64_t>(size_of(accumulator));
    memory.parameters += count;
    memory.weight_bytes += p->value.bytes();
    if (!p->trainable) continue;
    memory.trainable += count;
    memory.gradient_bytes += bytes;
    memory.optimizer_bytes += (p->value.dtype() == accumulator ? 2 : 3) * bytes;
  }
  return memory;
}

}  // namespace lightmoe
