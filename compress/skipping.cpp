#include "compress/skipping.h"

#include <algorithm>
#include <cmath>

#include "kernels/gemm.h"
#include "kernels/router.h"
#include "model/moe_op.h"
#include "runtime/device.h"

namespace lightmoe {
namespace {

void check_fits(const Statistics& s, const Olmoe& model) {
  const OlmoeConfig& c = model.config;
  check(s.num_layers == c.num_layers && s.num_slots == c.num_experts && s.hidden == c.hidden_size, ErrorKind::kInput,
        "skipping: statistics of {} layers, {} experts, hidden {}; the model has {}, {}, {}", s.num_layers, s.num_slots,
        s.hidden, c.num_layers, c.num_experts, c.hidden_size);
  check(s.sample_size() > 0, ErrorKind::kInput,
        "skipping: the statistics have no token sample; calibrate with --sample-tokens above 0");
}

// Probabilities over the slots that are not masked; 0 for the others.
std::vector<double> probabilities(const float* logits, const std::vector<Slot>& slots) {
  double top = -INFINITY, sum = 0;
  for (size_t e = 0; e < slots.size(); ++e) {
    if (slots[e].kind != SlotKind::kRemoved) top = std::max(top, static_cast<double>(logits[e]));
  }
  std::vector<double> p(slots.size(), 0.0);
  for (size_t e = 0; e < slots.size(); ++e) {
    if (slots[e].kind != SlotKind::kRemoved) p[e] = std::exp(static_cast<double>(logits[e]) - top);
    sum += p[e];
  }
  for (double& v : p) v /= sum;
  return p;
}

// What a slot gives for every row of x.
Tensor slot_output(const MoeLayer& layer, int32_t slot, const Tensor& x) {
  const int64_t rows = x.dim(0);
  const Tensor slots = Tensor::from(std::vector<int32_t>(static_cast<size_t>(rows), slot), {rows, 1});
  const Tensor gates = Tensor::from(std::vector<float>(static_cast<size_t>(rows), 1.0F), {rows, 1});
  Tape tape(false);
  return moe_experts(tape, Tape::constant(x.on(default_device())), layer, slots, Tape::constant(gates),
                     GemmCompute::kF32)
      .value;
}

// Products of the centred rows, [n,n] in f64, divided by their Frobenius norm (0 where all rows are alike).
Tensor unit_gram(const Tensor& y) {
  const Tensor centred = y.on(DeviceKind::kCpu).to(DType::kF64);
  const int64_t n = y.dim(0), d = y.dim(1);
  double* v = centred.data<double>();
  for (int64_t j = 0; j < d; ++j) {
    double mean = 0;
    for (int64_t i = 0; i < n; ++i) mean += v[i * d + j];
    for (int64_t i = 0; i < n; ++i) v[i * d + j] -= mean / static_cast<double>(n);
  }
  const Tensor gram = Tensor::empty({n, n}, DType::kF64, DeviceKind::kCpu);
  run(Gemm{.a = centred, .b = centred, .c = gram, .trans_b = true});
  double squares = 0;
  for (int64_t i = 0; i < n * n; ++i) squares += gram.data<double>()[i] * gram.data<double>()[i];
  for (int64_t i = 0; squares > 0 && i < n * n; ++i) gram.data<double>()[i] /= std::sqrt(squares);
  return gram;
}

std::vector<double> layer_factors(const MoeLayer& layer, const Tensor& x) {
  const size_t slots = layer.slots.size();
  std::vector<Tensor> grams;
  for (size_t e = 0; e < slots; ++e) {
    const bool masked = layer.slots[e].kind == SlotKind::kRemoved;
    grams.push_back(masked ? Tensor() : unit_gram(slot_output(layer, static_cast<int32_t>(e), x)));
  }
  std::vector<double> cka(slots * slots, 0.0);
  double sum = 0, pairs = 0;
  for (size_t i = 0; i < slots; ++i) {
    for (size_t j = 0; j < i; ++j) {
      if (!grams[i].defined() || !grams[j].defined()) continue;
      double product = 0;
      for (int64_t k = 0; k < grams[i].numel(); ++k) product += grams[i].data<double>()[k] * grams[j].data<double>()[k];
      cka[i * slots + j] = cka[j * slots + i] = product;
      sum += product, pairs += 1;
    }
  }
  for (double& v : cka) v = sum > 0 ? v * pairs / sum : 1;
  return cka;
}

}  // namespace

std::vector<double> skip_thresholds(const Statistics& s, const Olmoe& model, double quantile) {
  check(quantile >= 0 && quantile <= 1, ErrorKind::kUsage, "skip quantile {:g}: expected 0 to 1", quantile);
  check_fits(s, model);
  const auto top_k = static_cast<size_t>(model.config.num_experts_per_token);
  std::vector<double> thresholds;
  for (size_t l = 0; l < s.layers.size(); ++l) {
    std::vector<double> ratios;
    for (int64_t t = 0; t < s.sample_size(); ++t) {
      std::vector<double> p =
          probabilities(s.layers[l].sample_logits.data() + t * s.num_slots, model.blocks[l].moe.slots);
      std::partial_sort(p.begin(), p.begin() + static_cast<std::ptrdiff_t>(top_k), p.end(), std::greater<>());
      for (size_t k = 1; k < top_k; ++k) ratios.push_back(p[k] / p[0]);
    }
    if (ratios.empty()) ratios.push_back(0);  // top 1: nothing to skip
    const auto at = static_cast<std::ptrdiff_t>(quantile * static_cast<double>(ratios.size() - 1));
    std::nth_element(ratios.begin(), ratios.begin() + at, ratios.end());
    thresholds.push_back(ratios[static_cast<size_t>(at)]);
  }
  return thresholds;
}

std::vector<std::vector<double>> skip_factors(const Statistics& s, const Olmoe& model) {
  check_fits(s, model);
  std::vector<std::vector<double>> factors;
  for (size_t l = 0; l < s.layers.size(); ++l) {
    const std::vector<float>& inputs = s.layers[l].sample_inputs;
    check(!inputs.empty(), ErrorKind::kInput,
          "skipping by likeness: the statistics have no sample of inputs; calibrate with --sample-inputs");
    const int64_t all = s.sample_size(), count = std::min(all, kCkaTokens);
    const Tensor x = Tensor::empty({count, s.hidden}, DType::kF32, DeviceKind::kCpu);
    for (int64_t i = 0; i < count; ++i) {
      const float* row = inputs.data() + i * all / count * s.hidden;
      std::copy(row, row + s.hidden, x.data<float>() + i * s.hidden);
    }
    factors.push_back(layer_factors(model.blocks[l].moe, x));
  }
  return factors;
}

}  // namespace lightmoe
