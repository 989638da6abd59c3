#include "compress/unit_selector.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "autograd/extension_ops.h"
#include "autograd/optimizer.h"
#include "runtime/philox.h"

namespace lightmoe {
namespace {

ParameterPtr started(const char* name, int64_t rows, int64_t columns, uint64_t seed, uint64_t stream) {
  auto p = std::make_shared<Parameter>();
  p->name = name;
  p->value = Tensor::empty({rows, columns}, DType::kF32);
  fill_normal(p->value.data<float>(), p->value.numel(), 1 / std::sqrt(static_cast<float>(columns)), seed, stream);
  return p;
}

Var scores(Tape& tape, const Var& x, const ParameterPtr& in, const ParameterPtr& out) {
  const Var hidden = activate(tape, linear(tape, x, in, GemmCompute::kF32), Activation::kTanh);
  return linear(tape, hidden, out, GemmCompute::kF32);
}

// A root: mean over rows and blocks of binary cross-entropy of sigmoid(z) towards labels in [0,1].
void cross_entropy_towards(Tape& tape, const Var& z, const Tensor& labels) {
  const Tensor d = Tensor::empty(z.value.shape(), DType::kF32);
  for (int64_t i = 0; i < d.numel(); ++i) {
    const float p = 1 / (1 + std::exp(-z.value.data<float>()[i]));
    d.data<float>()[i] = (p - labels.data<float>()[i]) / static_cast<float>(d.numel());
  }
  tape.record([d, slot = z.grad] { slot->add(d); });
}

Tensor over_largest(const Tensor& contributions) {
  const Tensor labels = contributions.clone();
  const int64_t n = labels.dim(1);
  for (int64_t t = 0; t < labels.dim(0); ++t) {
    float* row = labels.data<float>() + t * n;
    const float largest = *std::max_element(row, row + n);
    for (int64_t b = 0; b < n; ++b) row[b] = largest > 0 ? row[b] / largest : 0;
  }
  return labels;
}

Tensor rows_of(const Tensor& x, const std::vector<int64_t>& order, size_t begin, size_t end) {
  const Tensor out = Tensor::empty({static_cast<int64_t>(end - begin), x.dim(1)}, DType::kF32);
  for (size_t i = begin; i < end; ++i) out.row(static_cast<int64_t>(i - begin)).copy_from(x.row(order[i]));
  return out;
}

}  // namespace

UnitSelector train_selector(const Tensor& x, const Tensor& contributions, const UnitSplitOptions& o, uint64_t seed) {
  const int64_t blocks = contributions.dim(1);
  const ParameterPtr in = started("in", blocks, x.dim(1), seed, 0), out = started("out", blocks, blocks, seed, 1);
  Optimizer adam({in, out}, {.beta1 = .9, .beta2 = .999, .weight_decay = 0, .clip_norm = 0, .rule = {}});
  const Tensor labels = over_largest(contributions);
  std::vector<int64_t> order(static_cast<size_t>(x.dim(0)));
  std::iota(order.begin(), order.end(), 0);
  Philox random(seed, 2);
  for (int64_t epoch = 0; epoch < o.epochs; ++epoch) {
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random.below(i)]);
    for (size_t begin = 0; begin < order.size(); begin += static_cast<size_t>(o.rows)) {
      const size_t end = std::min(begin + static_cast<size_t>(o.rows), order.size());
      Tape tape;
      cross_entropy_towards(tape, scores(tape, Tape::constant(rows_of(x, order, begin, end)), in, out),
                            rows_of(labels, order, begin, end));
      tape.backward();
      adam.step(o.lr, adam.gradient_norm());
      adam.zero_grad();
    }
  }
  return {.in = in->value, .out = out->value};
}

Tensor select_scores(const UnitSelector& selector, const Tensor& x) {
  const auto frozen = [](const Tensor& value) {
    auto p = std::make_shared<Parameter>();
    p->value = value, p->trainable = false;
    return p;
  };
  Tape tape(false);
  return scores(tape, Tape::constant(x), frozen(selector.in), frozen(selector.out)).value;
}

}  // namespace lightmoe
