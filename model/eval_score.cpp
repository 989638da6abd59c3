#include "model/eval_score.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <span>

#include "kernels/combine.h"
#include "kernels/cross_entropy.h"
#include "kernels/labels.h"
#include "model/sampling.h"
#include "runtime/parallel.h"

namespace lightmoe {
namespace {

constexpr int64_t kMaxPassTokens = 16384;           // bounds the activations of a forward pass
constexpr int64_t kLogitBytes = int64_t{64} << 20;  // of each model, while two are compared

struct Pass {
  std::vector<int32_t> ids, positions, doc_begin, labels;  // labels of the labelled rows only
  std::vector<int32_t> rows;                               // which rows those are
  std::vector<size_t> owner;                               // sequence of each labelled row
};

Pass make_pass(const std::vector<ScoredSequence>& sequences, size_t begin, size_t end) {
  Pass pass;
  for (size_t s = begin; s < end; ++s) {
    pass.doc_begin.push_back(static_cast<int32_t>(pass.ids.size()));
    for (size_t t = 0; t < sequences[s].ids.size(); ++t) {
      if (sequences[s].labels[t] >= 0) {
        pass.rows.push_back(static_cast<int32_t>(pass.ids.size()));
        pass.owner.push_back(s);
        pass.labels.push_back(sequences[s].labels[t]);
      }
      pass.ids.push_back(sequences[s].ids[t]);
      pass.positions.push_back(static_cast<int32_t>(t));
    }
  }
  pass.doc_begin.push_back(static_cast<int32_t>(pass.ids.size()));
  return pass;
}

// Final hidden states of the labelled rows.
Tensor hidden_rows(const Olmoe& model, const Pass& pass, const ForwardOptions& options) {
  const Batch batch = make_packed_batch(pass.ids, {}, pass.positions, pass.doc_begin);
  const Tensor hidden = model.forward(batch, options);
  const auto count = static_cast<int64_t>(pass.rows.size());
  const Tensor rows = Tensor::empty({count, hidden.dim(1)}, hidden.dtype());
  run(ExpandPairs{.x = hidden, .pair_visit = Tensor::from(pass.rows, {count}), .y = rows});
  return rows;
}

struct RowScores {
  Tensor log_prob, argmax;
};
RowScores label_scores(const Olmoe& model, const Tensor& hidden, const Pass& pass, const EvalOptions& options) {
  const int64_t rows = hidden.dim(0);
  const RowScores scores{Tensor::empty({rows}, DType::kF64), Tensor::empty({rows}, DType::kI32)};
  run(LabelScores{.x = hidden,
                  .w = model.lm_head->value,
                  .labels = Tensor::from(pass.labels, {rows}),
                  .compute = options.compute,
                  .log_prob = scores.log_prob,
                  .argmax = scores.argmax});
  return {scores.log_prob.on(DeviceKind::kCpu), scores.argmax.on(DeviceKind::kCpu)};
}

double log_sum_exp(std::span<const float> logits) {
  const double largest = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (float l : logits) sum += std::exp(l - largest);
  return largest + std::log(sum);
}

double kl_divergence(std::span<const float> reference, std::span<const float> model) {
  const double lse_reference = log_sum_exp(reference), lse_model = log_sum_exp(model);
  double kl = 0;
  for (size_t i = 0; i < reference.size(); ++i) {
    const double log_p = reference[i] - lse_reference;
    kl += std::exp(log_p) * (log_p - (model[i] - lse_model));
  }
  return std::max(kl, 0.0);  // below zero only by rounding
}

// KL of every labelled row, in chunks so that the logits stay small.
std::vector<double> kl_rows(const Olmoe& model, const Tensor& hidden, const Tensor& reference_hidden,
                            const EvalOptions& options) {
  const int64_t rows = hidden.dim(0), vocabulary = model.config.vocab_size;
  const int64_t chunk = std::max<int64_t>(1, kLogitBytes / (vocabulary * 4));
  const ForwardOptions forward{.compute = options.compute};
  std::vector<double> kl(static_cast<size_t>(rows));
  for (int64_t begin = 0; begin < rows; begin += chunk) {
    const int64_t end = std::min(rows, begin + chunk);
    const Tensor ours = model.logits(hidden.slice(begin, end), forward).on(DeviceKind::kCpu);
    const Tensor theirs = options.reference->logits(reference_hidden.slice(begin, end), forward).on(DeviceKind::kCpu);
    parallel_for(0, end - begin, 1, [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) {
        const auto row = [&](const Tensor& logits) {
          return std::span<const float>(logits.data<float>() + r * vocabulary, static_cast<size_t>(vocabulary));
        };
        kl[static_cast<size_t>(begin + r)] = kl_divergence(row(theirs), row(ours));
      }
    });
  }
  return kl;
}

void score_pass(const Olmoe& model, const Pass& pass, const EvalOptions& options, bool with_reference,
                std::vector<SequenceScore>& scores) {
  if (pass.rows.empty()) return;
  const Tensor hidden = hidden_rows(model, pass, {.compute = options.compute, .routing = options.routing});
  const RowScores rows = label_scores(model, hidden, pass, options);
  for (size_t i = 0; i < pass.rows.size(); ++i) {
    SequenceScore& score = scores[pass.owner[i]];
    ++score.tokens;
    score.log_prob += rows.log_prob.data<double>()[i];
    score.greedy = score.greedy && rows.argmax.data<int32_t>()[i] == pass.labels[i];
  }
  if (!with_reference) return;
  const Tensor reference_hidden = hidden_rows(*options.reference, pass, {.compute = options.compute});
  const RowScores reference = label_scores(*options.reference, reference_hidden, pass, options);
  const std::vector<double> kl = kl_rows(model, hidden, reference_hidden, options);
  for (size_t i = 0; i < pass.rows.size(); ++i) {
    SequenceScore& score = scores[pass.owner[i]];
    score.reference_log_prob += reference.log_prob.data<double>()[i];
    score.kl.push_back(kl[i]);
    score.same_top1 += reference.argmax.data<int32_t>()[i] == rows.argmax.data<int32_t>()[i];
  }
}

}  // namespace

std::vector<SequenceScore> score_sequences(const Olmoe& model, const std::vector<ScoredSequence>& sequences,
                                           const EvalOptions& options, bool with_reference, int64_t* forward_tokens) {
  check(options.batch >= 1, ErrorKind::kUsage, "--batch {}: expected 1 or more", options.batch);
  const GemmBackendScope backend(options.gemm);
  std::vector<SequenceScore> scores(sequences.size());
  for (size_t begin = 0; begin < sequences.size();) {
    size_t end = begin;
    int64_t tokens = 0;
    while (end < sequences.size() && end - begin < static_cast<size_t>(options.batch)) {
      tokens += static_cast<int64_t>(sequences[end].ids.size());
      if (end > begin && tokens > kMaxPassTokens) break;
      ++end;
    }
    const Pass pass = make_pass(sequences, begin, end);
    score_pass(model, pass, options, with_reference, scores);
    *forward_tokens += static_cast<int64_t>(pass.ids.size());
    begin = end;
  }
  return scores;
}

int64_t context_length(const Olmoe& model, const EvalOptions& options) {
  const int64_t limit = model.config.max_position_embeddings;
  check(options.context >= 0 && options.context <= limit, ErrorKind::kUsage,
        "--context {}: expected 1 to {}, or 0 for all", options.context, limit);
  return options.context == 0 ? limit : options.context;
}

int32_t prefix_id(const Olmoe& model) {
  if (model.config.bos_token_id) return static_cast<int32_t>(*model.config.bos_token_id);
  return model.config.eos_token_ids.empty() ? -1 : static_cast<int32_t>(model.config.eos_token_ids.front());
}

ScoredSequence sequence_of(const Document& document) {
  ScoredSequence sequence;
  for (size_t t = 0; t + 1 < document.ids.size(); ++t) {
    sequence.ids.push_back(document.ids[t]);
    sequence.labels.push_back(document.loss[t + 1] != 0 ? document.ids[t + 1] : kIgnoredLabel);
  }
  return sequence;
}

bool fit(ScoredSequence& sequence, const Olmoe& model, const EvalOptions& options, const std::string& what) {
  const int64_t context = context_length(model, options), excess = static_cast<int64_t>(sequence.ids.size()) - context;
  if (excess <= 0) return false;
  check(options.truncate, ErrorKind::kInput, "{} has {} tokens, the context {}; --truncate drops the oldest", what,
        sequence.ids.size() + 1, context);
  sequence.ids.erase(sequence.ids.begin(), sequence.ids.begin() + excess);
  sequence.labels.erase(sequence.labels.begin(), sequence.labels.begin() + excess);
  return true;
}

std::vector<ScoredSequence> rolling_windows(const std::vector<int32_t>& ids, int64_t context, int32_t prefix) {
  std::vector<int32_t> all;
  if (prefix >= 0) all.push_back(prefix);
  all.insert(all.end(), ids.begin(), ids.end());
  const int64_t labels = static_cast<int64_t>(all.size()) - 1;  // label i is all[i + 1]
  std::vector<ScoredSequence> windows;
  for (int64_t scored = 0; scored < labels;) {
    const int64_t end = std::min(labels, scored + context), begin = std::max<int64_t>(0, end - context);
    ScoredSequence window{.ids = {all.begin() + begin, all.begin() + end}, .labels = {}};
    for (int64_t i = begin; i < end; ++i)
      window.labels.push_back(i >= scored ? all[static_cast<size_t>(i) + 1] : kIgnoredLabel);
    windows.push_back(std::move(window));
    scored = end;
  }
  return windows;
}

double RatioOfSums::value() const {
  return std::accumulate(ys_.begin(), ys_.end(), 0.0) / std::accumulate(xs_.begin(), xs_.end(), 0.0);
}

std::optional<double> RatioOfSums::std_error() const {
  const double n = static_cast<double>(xs_.size()), ratio = value();
  if (xs_.size() < 2) return std::nullopt;
  double squares = 0;
  for (size_t i = 0; i < xs_.size(); ++i) squares += (ys_[i] - ratio * xs_[i]) * (ys_[i] - ratio * xs_[i]);
  return std::sqrt(squares * n / (n - 1)) / std::accumulate(xs_.begin(), xs_.end(), 0.0);
}

}  // namespace lightmoe
