#pragma once
// A root of backward (autograd/ops.h): the loss of a model that also learns another one's output.

#include "autograd/tape.h"
#include "kernels/gemm.h"

namespace lightmoe {

// Towards another model's output: over labelled rows, scale * sum of (1 - weight) CE + weight T^2 KL(softmax(t / T) || softmax(z / T)), z and
// t the logits that a frozen LM head makes of x and of the teacher's final states (kernels/distillation.h). w [V,D] must be frozen
// (Error(kUsage)).
struct Distillation {
  Tensor teacher;  // [T,D], of x's type
  Tensor head;     // the teacher's own [V,D]; undefined: w
  double weight = 0.5, temperature = 1;
};
struct LossScale {
  double scale = 1;
  GemmCompute compute = GemmCompute::kF32;
};
struct DistillationLoss {  // over labelled rows, not scaled; of a GPU's loss the host waits for what it asks
  Tensor sums;             // f64 [2]
  double ce_sum() const;
  double kl_sum() const;
};
DistillationLoss distillation_loss(Tape& tape, const Var& x, const ParameterPtr& w, const Tensor& labels,
                                   const Distillation& distillation, const LossScale& scale);

}  // namespace lightmoe
