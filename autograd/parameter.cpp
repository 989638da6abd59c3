#include "autograd/parameter.h"

namespace lightmoe {

Tensor& Parameter::ensure_grad() {
  require(trainable, "{}: gradient asked for a frozen parameter", name);
  if (!grad.defined()) {
    const MemoryScope scope(MemoryCategory::kGradients);
    grad = Tensor::zeros(value.shape(), value.dtype() == DType::kF64 ? DType::kF64 : DType::kF32, value.device());
  }
  return grad;
}

}  // namespace lightmoe
