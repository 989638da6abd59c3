#pragma once
// AdamW with decoupled weight decay and bias correction (Loshchilov & Hutter, arXiv 1711.05101; torch.optim.AdamW), over many
// tensors in one call:  g = grad_scale * grad;  w *= 1 - lr wd;  m = b1 m + (1-b1) g;  v = b2 v + (1-b2) g^2;
//   w -= lr * (m / (1 - b1^step)) / (sqrt(v / (1 - b2^step)) + eps),   step counts from 1.
// dtypes: w f32/bf16/f64, grad of w's type or f32, m and v f32 (f64 for f64). In place. Deterministic. 28 bytes a parameter in f32.
// GradientNorm: norm = sqrt of the sum of squares of all gradients, in f64 and in a fixed order (each device its own); undefined
//   tensors are skipped; norm f64 [1] '='. gradient_norm brings it to the host, which waits for a GPU.

#include <vector>

#include "runtime/dispatch.h"
#include "runtime/tensor.h"

namespace lightmoe {

struct AdamWTensor {
  Tensor w, grad, m, v;
  double lr = 0, weight_decay = 0;
};
struct AdamW {
  std::vector<AdamWTensor> tensors;
  double beta1 = 0.9, beta2 = 0.95, eps = 1e-8, grad_scale = 1;
  int64_t step = 1;
};
struct GradientNorm {
  std::vector<Tensor> gradients;
  Tensor norm;
};
void run(const AdamW& op);
void run(const GradientNorm& op);

double gradient_norm(const std::vector<Tensor>& gradients);

}  // namespace lightmoe
