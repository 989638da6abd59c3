#include "compress/orthogonal.h"

#include <unordered_set>

#include "compress/linear_algebra.h"
#include "runtime/error.h"
#include "runtime/parallel.h"

namespace lightmoe {
namespace {

constexpr double kRidge = 1e-13;  // of the mean diagonal: twins among the experts would make the system singular

template <class A, class B>
double dot(const A* a, const B* b, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  return sum;
}

// values[i*n+j] = <a_i, b_j>.
std::vector<double> products(const std::vector<Tensor>& a, const std::vector<Tensor>& b) {
  const auto n = static_cast<int64_t>(a.size());
  std::vector<double> values(static_cast<size_t>(n * n));
  parallel_items(n * n, [&](int64_t at) {
    const Tensor &x = a[static_cast<size_t>(at / n)], &y = b[static_cast<size_t>(at % n)];
    values[static_cast<size_t>(at)] = x.dtype() == DType::kF64 ? dot(x.data<double>(), y.data<double>(), x.numel())
                                                               : dot(x.data<float>(), y.data<float>(), x.numel());
  });
  return values;
}

// c of the other experts for expert i.
std::vector<double> coefficients(const std::vector<double>& gram, const std::vector<double>& h, size_t i, size_t n) {
  const auto m = static_cast<int64_t>(n - 1);
  const Tensor a = Tensor::empty({m, m}, DType::kF64), b = Tensor::empty({m, 1}, DType::kF64);
  double* to = a.data<double>();
  for (size_t j = 0; j < n; ++j) {
    if (j == i) continue;
    b.data<double>()[j - (j > i ? 1 : 0)] = h[i * n + j];
    for (size_t k = 0; k < n; ++k) {
      if (k != i) *to++ = gram[j * n + k];
    }
  }
  const Tensor c = cholesky_solve(cholesky(with_ridge(a, kRidge)), b);
  return {c.data<double>(), c.data<double>() + m};
}

template <class T>
void subtract(const Tensor& from, double c, const Tensor& w) {
  T* g = from.data<T>();
  const T* v = w.data<T>();
  for (int64_t i = 0; i < from.numel(); ++i) g[i] = static_cast<T>(g[i] - c * v[i]);
}

void project(const std::vector<ParameterPtr>& experts) {
  const size_t n = experts.size();
  if (n < 2) return;
  std::vector<Tensor> weights, gradients;
  for (const ParameterPtr& p : experts) {
    const DType dtype = p->value.dtype() == DType::kF64 ? DType::kF64 : DType::kF32;
    weights.push_back(p->value.dtype() == dtype ? p->value : p->value.to(dtype));
    gradients.push_back(p->ensure_grad());
  }
  const std::vector<double> gram = products(weights, weights), h = products(gradients, weights);
  parallel_items(static_cast<int64_t>(n), [&](int64_t at) {
    const auto i = static_cast<size_t>(at);
    const std::vector<double> c = coefficients(gram, h, i, n);
    for (size_t j = 0, k = 0; j < n; ++j) {
      if (j == i) continue;
      if (gradients[i].dtype() == DType::kF64)
        subtract<double>(gradients[i], c[k++], weights[j]);
      else
        subtract<float>(gradients[i], c[k++], weights[j]);
    }
  });
}

}  // namespace

void project_expert_gradients(Olmoe& model) {
  for (Block& block : model.blocks) {
    std::vector<ParameterPtr> gate_up, down;
    std::unordered_set<const Parameter*> seen;
    for (const Expert& e : block.moe.experts) {
      if (e.gate_up == nullptr || !e.gate_up->trainable || !e.down->trainable || !seen.insert(e.down.get()).second)
        continue;
      gate_up.push_back(e.gate_up);
      down.push_back(e.down);
    }
    project(gate_up);
    project(down);
  }
}

OrthogonalOlmoe::OrthogonalOlmoe(Olmoe& model, int64_t every) : TrainableOlmoe(model), model_(model), every_(every) {
  check(every >= 1, ErrorKind::kUsage, "--orthogonal-every {}: expected at least 1", every);
}

TrainLosses OrthogonalOlmoe::forward_backward(const Batch& batch, const TrainOptions& options) {
  const TrainLosses losses = TrainableOlmoe::forward_backward(batch, options);
  if (projects_) project_expert_gradients(model_);
  return losses;
}

}  // namespace lightmoe
