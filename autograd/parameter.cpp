#include "autograd/parameter.h"

#include <algorithm>

namespace lightmoe {

void Parameter::allocate_grad() {
  require(trainable, "{}: gradient asked for a frozen parameter", name);
  if (grad.defined()) return;
  const MemoryScope scope(MemoryCategory::kGradients);
  grad = Tensor::empty(value.shape(), value.dtype() == DType::kF64 ? DType::kF64 : DType::kF32, value.device());
  is_stale_ = true;
}

Tensor& Parameter::ensure_grad() {
  allocate_grad();
  if (is_stale_) grad.fill_zero();
  is_stale_ = false;
  return grad;
}

double Parameter::grad_beta() {
  allocate_grad();
  const double beta = is_stale_ ? 0 : 1;
  is_stale_ = false;
  return beta;
}

double grad_beta_of(const std::vector<ParameterPtr>& parameters) {
  std::vector<Parameter*> fresh;
  bool any_added = false;
  for (const ParameterPtr& p : parameters) {
    if (p == nullptr || std::find(fresh.begin(), fresh.end(), p.get()) != fresh.end()) continue;
    if (p->grad_beta() == 0) {
      fresh.push_back(p.get());
    } else {
      any_added = true;
    }
  }
  if (!any_added) return 0;
  for (Parameter* p : fresh) p->grad.fill_zero();
  return 1;
}

}  // namespace lightmoe
