#include <cmath>

#include "autograd/ops.h"
#include "kernels/cross_entropy.h"
#include "kernels/router.h"

namespace lightmoe {

double Loss::value() const { return sum.on(DeviceKind::kCpu).data<double>()[0] / scale; }

Loss lm_head_loss(Tape& tape, const Var& x, const ParameterPtr& w, const Tensor& labels, double scale,
                  GemmCompute compute) {
  const Tensor loss = Tensor::empty({1}, DType::kF64);
  require(scale > 0, "lm_head_loss: scale is {}, expected a positive number", scale);
  LmHeadCrossEntropy op{
      .x = x.value, .w = w->value, .labels = labels, .scale = scale, .compute = compute, .loss = loss};
  if (tape.recording()) {
    if (x.grad) op.dx = Tensor::empty(x.value.shape(), x.value.dtype());
    if (w->trainable) op.dw = w->ensure_grad();
  }
  run(op);
  if (op.dx.defined()) tape.record([dx = op.dx, slot = x.grad] { slot->add(dx); });
  return {loss, scale};
}

Loss load_balance_loss(Tape& tape, const std::vector<Var>& probs, const std::vector<Tensor>& slots, const Tensor& mask,
                       double scale) {
  std::vector<Tensor> values;
  bool needs = false;
  for (const Var& p : probs) {
    values.push_back(p.value);
    needs = needs || p.needs_grad();
  }
  const Tensor loss = Tensor::empty({1}, DType::kF64);
  run(LoadBalance{.probs = values, .slots = slots, .mask = mask, .loss = loss});
  if (needs) {
    tape.record([probs, values, slots, mask, scale] {
      std::vector<Tensor> gradients;
      for (const Tensor& p : values) gradients.push_back(Tensor::empty(p.shape(), p.dtype()));
      run(LoadBalanceBackward{.probs = values, .slots = slots, .mask = mask, .scale = scale, .dprobs = gradients});
      for (size_t l = 0; l < probs.size(); ++l) {
        if (probs[l].grad) probs[l].grad->add(gradients[l]);
      }
    });
  }
  return {loss};
}

namespace {

// f(p [E] of a token, layer, token) for the tokens of every layer that the mask counts; returns their number.
template <class T, class F>
int64_t for_each_token(const std::vector<Tensor>& probs, const Tensor& mask, F&& f) {
  int64_t tokens = 0;
  for (size_t l = 0; l < probs.size(); ++l) {
    for (int64_t t = 0; t < probs[l].dim(0); ++t) {
      if (mask.defined() && mask.data<uint8_t>()[t] == 0) continue;
      ++tokens;
      f(probs[l].data<T>() + t * probs[l].dim(1), l, t);
    }
  }
  return tokens;
}

template <class T>
double router_entropy(Tape& tape, const std::vector<Var>& probs, const Tensor& mask, double scale) {
  std::vector<Tensor> values;
  for (const Var& p : probs) values.push_back(p.value);
  double sum = 0;
  const int64_t tokens = for_each_token<T>(values, mask, [&](const T* p, size_t l, int64_t) {
    for (int64_t e = 0; e < values[l].dim(1); ++e) {
      const auto v = static_cast<double>(p[e]);
      if (v > 0) sum -= v * std::log(v);
    }
  });
  if (tokens == 0) return 0;
  tape.record([probs, values, mask, factor = scale / static_cast<double>(tokens)] {
    std::vector<Tensor> gradients;
    for (const Tensor& p : values) gradients.push_back(Tensor::zeros(p.shape(), p.dtype()));
    for_each_token<T>(values, mask, [&](const T* p, size_t l, int64_t t) {
      T* d = gradients[l].data<T>() + t * values[l].dim(1);
      for (int64_t e = 0; e < values[l].dim(1); ++e) {
        const auto v = static_cast<double>(p[e]);
        d[e] = v > 0 ? static_cast<T>(-factor * (std::log(v) + 1)) : T(0);
      }
    });
    for (size_t l = 0; l < probs.size(); ++l) {
      if (probs[l].grad) probs[l].grad->add(gradients[l]);
    }
  });
  return sum / static_cast<double>(tokens);
}

}  // namespace

double router_entropy_loss(Tape& tape, const std::vector<Var>& probs, const Tensor& mask, double scale) {
  const Tensor& first = probs.front().value;
  check(is_host_memory(first.device()), ErrorKind::kDevice,
        "the router's entropy is trained on the CPU only, not on {}", name_of(first.device()));
  return first.dtype() == DType::kF64 ? router_entropy<double>(tape, probs, mask, scale)
                                      : router_entropy<float>(tape, probs, mask, scale);
}

double dot_loss(Tape& tape, const Var& y, const Tensor& weights) {
  require(y.value.dtype() == DType::kF64 && weights.dtype() == DType::kF64 && y.value.shape() == weights.shape(),
          "dot_loss: y is {} {}, weights {} {}, expected f64 of one shape", y.value.shape(), name_of(y.value.dtype()),
          weights.shape(), name_of(weights.dtype()));
  double sum = 0;
  for (int64_t i = 0; i < y.value.numel(); ++i) sum += y.value.data<double>()[i] * weights.data<double>()[i];
  if (y.needs_grad()) tape.record([slot = y.grad, weights] { slot->share(weights); });
  return sum;
}

}  // namespace lightmoe
