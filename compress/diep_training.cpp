#include "compress/diep_training.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <numeric>

#include "model/block.h"
#include "runtime/philox.h"

namespace lightmoe {
namespace {

using Matrix = std::vector<std::vector<double>>;

// Parameters of a model as they were when this began: while it lives nothing of the model trains.
class FrozenModel {
 public:
  explicit FrozenModel(const Olmoe& model) : parameters_(model.parameters()) {
    for (const ParameterPtr& p : parameters_) before_.push_back(p->trainable), p->trainable = false;
  }
  ~FrozenModel() {
    for (size_t i = 0; i < parameters_.size(); ++i) parameters_[i]->trainable = before_[i];
  }
  FrozenModel(const FrozenModel&) = delete;
  FrozenModel& operator=(const FrozenModel&) = delete;

 private:
  std::vector<ParameterPtr> parameters_;
  std::vector<bool> before_;
};

std::vector<double> softmax(const std::vector<double>& logits) {
  const double top = *std::max_element(logits.begin(), logits.end());
  std::vector<double> p;
  double sum = 0;
  for (const double z : logits) p.push_back(std::exp(z - top)), sum += p.back();
  for (double& v : p) v /= sum;
  return p;
}

ParameterPtr slot_weights(const std::vector<double>& alpha, double beta) {
  auto p = std::make_shared<Parameter>();
  p->name = "slot_weights";
  p->value = Tensor::empty({std::ssize(alpha)}, DType::kF32);
  const std::vector<double> shares = softmax(alpha);
  for (size_t e = 0; e < alpha.size(); ++e) {
    p->value.data<float>()[e] = static_cast<float>(beta * shares[e]);
  }
  p->zero_grad();
  p->ensure_grad();
  return p;
}

Var run_blocks(Tape& tape, const Olmoe& model, const Batch& batch, const std::vector<ParameterPtr>* weights) {
  BlockContext context{.config = model.config,
                       .positions = batch.positions,
                       .sequences = batch.sequences,
                       .cache_rows = {},
                       .slot_weights = weights};
  Residual state{embedding(tape, batch.ids, model.embedding), {}};
  for (size_t l = 0; l < model.blocks.size(); ++l) {
    context.layer = static_cast<int>(l);
    state = attention_half(tape, std::move(state), model.blocks[l], context);
    state = moe_half(tape, std::move(state), model.blocks[l], context, Recompute::kNone).out;
  }
  return final_norm(tape, state, model);
}

// lambda || h - original ||_F / || original ||_F; the gradient at distance 0 is taken as 0.
double add_distance(Tape& tape, const Var& h, const Tensor& original, double lambda) {
  double squares = 0, size = 0;
  const float *a = h.value.data<float>(), *b = original.data<float>();
  for (int64_t i = 0; i < original.numel(); ++i) {
    const double difference = static_cast<double>(a[i]) - static_cast<double>(b[i]);
    squares += difference * difference;
    size += static_cast<double>(b[i]) * static_cast<double>(b[i]);
  }
  lambda /= std::sqrt(size);
  const double distance = std::sqrt(squares);
  if (distance == 0 || !h.needs_grad()) return lambda * distance;
  tape.record([slot = h.grad, value = h.value, original, factor = lambda / distance] {
    const Tensor d = Tensor::empty(value.shape(), DType::kF32);
    for (int64_t i = 0; i < value.numel(); ++i) {
      d.data<float>()[i] =
          static_cast<float>(factor * (static_cast<double>(value.data<float>()[i]) - original.data<float>()[i]));
    }
    slot->add(d);
  });
  return lambda * distance;
}

// d loss / d alpha and beta from d loss / d (beta softmax(alpha)).
void through_softmax(const Tensor& dw, const std::vector<double>& alpha, double beta, std::vector<double>& dalpha,
                     double& dbeta) {
  const std::vector<double> shares = softmax(alpha);
  double mean = 0;
  for (size_t e = 0; e < alpha.size(); ++e) mean += shares[e] * static_cast<double>(dw.data<float>()[e]);
  dbeta = mean;
  for (size_t e = 0; e < alpha.size(); ++e) {
    dalpha.push_back(beta * shares[e] * (static_cast<double>(dw.data<float>()[e]) - mean));
  }
}

// Adam (betas 0.9 and 0.999) on a few numbers.
class Adam {
 public:
  explicit Adam(size_t count) : mean_(count, 0.0), square_(count, 0.0) {}
  void step(std::vector<double>& values, const std::vector<double>& gradient, double lr) {
    ++steps_;
    const double mean_left = 1 - std::pow(.9, steps_), square_left = 1 - std::pow(.999, steps_);
    for (size_t i = 0; i < values.size(); ++i) {
      mean_[i] = .9 * mean_[i] + .1 * gradient[i];
      square_[i] = .999 * square_[i] + .001 * gradient[i] * gradient[i];
      values[i] -= lr * mean_[i] / mean_left / (std::sqrt(square_[i] / square_left) + 1e-8);
    }
  }

 private:
  std::vector<double> mean_, square_;
  int steps_ = 0;
};

struct Sequence {
  std::vector<int32_t> ids, labels;
};

// The sequences of the token sample that have a label; in files without labels every next token is one.
std::vector<Sequence> sample_sequences(const Statistics& s) {
  std::vector<Sequence> sequences;
  const size_t n = s.sample_ids.size();
  for (size_t i = 0; i < n; ++i) {
    if (i == 0 || s.sample_sequence[i] != s.sample_sequence[i - 1]) sequences.emplace_back();
    const bool last = i + 1 == n || s.sample_sequence[i + 1] != s.sample_sequence[i];
    sequences.back().ids.push_back(s.sample_ids[i]);
    sequences.back().labels.push_back(!s.sample_labels.empty() ? s.sample_labels[i]
                                      : last                   ? -100
                                                               : s.sample_ids[i + 1]);
  }
  std::erase_if(sequences,
                [](const Sequence& q) { return std::ranges::all_of(q.labels, [](int32_t l) { return l < 0; }); });
  check(
      !sequences.empty(), ErrorKind::kInput,
      "no token of the calibration's sample has a next one that the data's loss counts; calibrate with longer samples");
  return sequences;
}

Batch batch_of(const std::vector<Sequence>& sequences, const std::vector<size_t>& order, size_t first, size_t count) {
  std::vector<int32_t> ids, labels, positions, begins;
  for (size_t i = first; i < std::min(first + count, order.size()); ++i) {
    const Sequence& sequence = sequences[order[i]];
    begins.push_back(static_cast<int32_t>(ids.size()));
    ids.insert(ids.end(), sequence.ids.begin(), sequence.ids.end());
    labels.insert(labels.end(), sequence.labels.begin(), sequence.labels.end());
    for (size_t t = 0; t < sequence.ids.size(); ++t) positions.push_back(static_cast<int32_t>(t));
  }
  begins.push_back(static_cast<int32_t>(ids.size()));
  return make_packed_batch(ids, labels, positions, begins);
}

}  // namespace

ImportanceGradient importance_gradient(const Olmoe& model, const Batch& batch, double lambda, const Matrix& alpha,
                                       const std::vector<double>& beta) {
  const FrozenModel frozen(model);
  std::vector<ParameterPtr> weights;
  for (size_t l = 0; l < alpha.size(); ++l) weights.push_back(slot_weights(alpha[l], beta[l]));
  Tensor original;
  {
    Tape quiet(false);
    original = run_blocks(quiet, model, batch, nullptr).value;
  }
  const int32_t* labels = batch.labels.data<int32_t>();
  const auto counted = std::count_if(labels, labels + batch.labels.numel(), [](int32_t label) { return label >= 0; });
  const double scale = 1 / static_cast<double>(counted);
  ImportanceGradient result;
  Tape tape;
  {
    const Var h = run_blocks(tape, model, batch, &weights);
    result.loss = scale * lm_head_loss(tape, h, model.lm_head, batch.labels, scale, GemmCompute::kF32).value();
    result.loss += add_distance(tape, h, original, lambda);
  }
  tape.backward();
  result.beta.resize(beta.size());
  for (size_t l = 0; l < alpha.size(); ++l) {
    through_softmax(weights[l]->grad, alpha[l], beta[l], result.alpha.emplace_back(), result.beta[l]);
  }
  return result;
}

ExpertImportance learn_importance(const Olmoe& model, const Statistics& sample, const DiepOptions& options) {
  const std::vector<Sequence> sequences = sample_sequences(sample);
  const auto layers = static_cast<size_t>(model.config.num_layers),
             slots = static_cast<size_t>(model.config.num_experts);
  const auto batch = static_cast<size_t>(options.batch);
  const size_t per_epoch = (sequences.size() + batch - 1) / batch;
  const auto steps = static_cast<int64_t>(per_epoch) * options.epochs;
  Matrix logits(layers, std::vector<double>(slots, 0.0));
  std::vector<double> scales(layers, 1.0);
  std::vector<size_t> order(sequences.size());
  std::iota(order.begin(), order.end(), size_t{0});
  Philox random(options.seed, 0xd1e9);
  std::vector<Adam> of_alpha(layers, Adam(slots));
  Adam of_beta(layers);
  ExpertImportance result;
  for (int64_t step = 0; step < steps; ++step) {
    const size_t at = static_cast<size_t>(step) % per_epoch;
    for (size_t i = order.size(); at == 0 && i > 1; --i) std::swap(order[i - 1], order[random.below(i)]);
    const ImportanceGradient g =
        importance_gradient(model, batch_of(sequences, order, at * batch, batch), options.lambda, logits, scales);
    check(std::isfinite(g.loss), ErrorKind::kNumeric, "diep: the loss of step {} is {}", step + 1, g.loss);
    if (step == 0) result.first_loss = g.loss;
    result.last_loss = g.loss;
    const double progress = static_cast<double>(step) / static_cast<double>(steps);
    const double lr = .5 * options.lr * (1 + std::cos(std::numbers::pi * progress));
    if (step % (options.alpha_steps + 1) < options.alpha_steps) {
      for (size_t l = 0; l < layers; ++l) of_alpha[l].step(logits[l], g.alpha[l], lr);
    } else {
      of_beta.step(scales, g.beta, lr);
    }
  }
  for (const std::vector<double>& layer : logits) result.alpha.push_back(softmax(layer));
  result.beta = scales;
  return result;
}

}  // namespace lightmoe
