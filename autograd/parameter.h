#pragma once
// A named weight and, while it trains, its gradient.
// A frozen parameter (trainable = false) never has gradient memory.

#include <memory>
#include <string>
#include <vector>

#include "runtime/tensor.h"

namespace lightmoe {

struct Parameter {
  std::string name;  // Hugging Face name, or the lightmoe name of a base or adapter (model/moe.h)
  Tensor value;
  Tensor grad;  // same shape, f32 (f64 for an f64 value); undefined until the first backward
  bool trainable = true;

  // Gradient to add to ('+='): allocated (category gradients) on first use, zero where nothing was added yet.
  Tensor& ensure_grad();
  // For products that can also write '=': 0 when nothing was added since zero_grad (grad then holds anything), else 1.
  double grad_beta();
  // The next contribution replaces the gradient; nothing is filled now. Until then grad must not be read; one pass of
  // Olmoe::forward_backward leaves every trainable gradient readable.
  void zero_grad() { is_stale_ = true; }

 private:
  void allocate_grad();
  bool is_stale_ = false;  // grad is to be taken as zero, whatever it holds
};
using ParameterPtr = std::shared_ptr<Parameter>;

// One beta for a product that writes the gradients of several parameters (null ones are skipped).
double grad_beta_of(const std::vector<ParameterPtr>& parameters);

}  // namespace lightmoe
