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

  // Gradient to accumulate into; allocated as zeros (category gradients) on first use.
  Tensor& ensure_grad();
};
using ParameterPtr = std::shared_ptr<Parameter>;

}  // namespace lightmoe
