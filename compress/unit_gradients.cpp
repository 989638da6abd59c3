#include "compress/unit_gradients.h"

#include <cmath>
#include <numeric>
#include <unordered_set>

#include "runtime/parallel.h"

namespace lightmoe {
namespace {

// Only experts train while this lives.
class ExpertsAlone {
 public:
  explicit ExpertsAlone(const Olmoe& model) : parameters_(model.parameters()) {
    std::unordered_set<const Parameter*> experts;
    for (const Block& block : model.blocks) {
      for (const Expert& expert : block.moe.experts) experts.insert({expert.gate_up.get(), expert.down.get()});
    }
    for (const ParameterPtr& p : parameters_) {
      before_.push_back(p->trainable);
      p->trainable = experts.contains(p.get());
    }
  }
  ~ExpertsAlone() {
    for (size_t i = 0; i < parameters_.size(); ++i) {
      parameters_[i]->trainable = before_[i];
      parameters_[i]->grad.reset();
    }
  }
  ExpertsAlone(const ExpertsAlone&) = delete;
  ExpertsAlone& operator=(const ExpertsAlone&) = delete;
  void zero_grad() const {
    for (const ParameterPtr& p : parameters_) p->zero_grad();
  }

 private:
  std::vector<ParameterPtr> parameters_;
  std::vector<bool> before_;
};

Batch batch_of(const std::vector<int32_t>& ids, const std::vector<int32_t>& labels) {
  const auto count = static_cast<int32_t>(ids.size());
  std::vector<int32_t> positions(ids.size());
  std::iota(positions.begin(), positions.end(), 0);
  return make_packed_batch(ids, labels, positions, {0, count});
}

double square(float v) { return static_cast<double>(v) * static_cast<double>(v); }

// One expert's squared gradients into score [F].
void add_squares(const Expert& expert, double* score) {
  const Tensor &gate_up = expert.gate_up->grad, &down = expert.down->grad;
  const int64_t d = gate_up.dim(1), f = down.dim(1);
  const float *rows = gate_up.data<float>(), *columns = down.data<float>();
  const double scale = 1 / static_cast<double>(d);
  for (int64_t j = 0; j < f; ++j) {
    double sum = 0;
    for (int64_t k = 0; k < d; ++k) sum += square(rows[j * d + k]) + square(rows[(f + j) * d + k]);
    score[j] += scale * sum;
  }
  for (int64_t k = 0; k < d; ++k) {
    for (int64_t j = 0; j < f; ++j) score[j] += scale * square(columns[k * f + j]);
  }
}

double first_order_change(const Parameter& down) {
  const Tensor w = down.value.to(DType::kF32);
  double sum = 0;
  for (int64_t i = 0; i < w.numel(); ++i)
    sum += static_cast<double>(w.data<float>()[i]) * static_cast<double>(down.grad.data<float>()[i]);
  return std::abs(sum);
}

}  // namespace

void add_unit_gradients(const Olmoe& model, const std::vector<std::vector<int32_t>>& sequences,
                        const std::vector<std::vector<int32_t>>& labels, GemmCompute compute, Statistics& statistics) {
  const auto units = static_cast<size_t>(model.config.num_experts * model.config.intermediate_size);
  for (LayerStatistics& layer : statistics.layers) {
    layer.unit_gradient2.resize(units, 0.0);
    layer.taylor.resize(static_cast<size_t>(model.config.num_experts), 0.0);
  }
  const ExpertsAlone experts_alone(model);
  Olmoe trained = model;  // the same parameters
  for (size_t i = 0; i < sequences.size(); ++i) {
    const auto counted = std::ranges::count_if(labels[i], [](int32_t label) { return label >= 0; });
    if (counted == 0) continue;
    experts_alone.zero_grad();
    trained.forward_backward(batch_of(sequences[i], labels[i]),
                             {.compute = compute, .loss_scale = 1 / static_cast<double>(counted)});
    for (size_t l = 0; l < model.blocks.size(); ++l) {
      const std::vector<Expert>& experts = model.blocks[l].moe.experts;
      double *scores = statistics.layers[l].unit_gradient2.data(), *taylor = statistics.layers[l].taylor.data();
      parallel_items(static_cast<int64_t>(experts.size()), [&](int64_t e) {
        add_squares(experts[static_cast<size_t>(e)], scores + e * model.config.intermediate_size);
        taylor[e] += first_order_change(*experts[static_cast<size_t>(e)].down);
      });
    }
  }
  for (size_t l = 0; l < statistics.layers.size(); ++l) {
    for (const double score : statistics.layers[l].unit_gradient2) {
      check(std::isfinite(score), ErrorKind::kNumeric,
            "layer {}: gradients of the experts are not finite; calibration stops", l);
    }
  }
}

}  // namespace lightmoe
