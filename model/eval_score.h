#pragma once
// Log-probabilities of labelled tokens, sequence by sequence: the one place where evaluation runs a model over given text.
// Sequences are packed into forward passes in their order, without padding; each one's result depends on itself alone.

#include <cstdint>
#include <vector>

#include "model/eval.h"

namespace lightmoe {

struct ScoredSequence {
  std::vector<int32_t> ids, labels;  // labels[t] is the id to predict after ids[t], or -100
};
struct SequenceScore {
  int64_t tokens = 0;             // labelled
  double log_prob = 0;            // sum over them
  bool greedy = true;             // every label is the argmax
  double reference_log_prob = 0;  // the rest only with a reference model
  std::vector<double> kl;         // per labelled token, KL(reference || model)
  int64_t same_top1 = 0;
};

// options: batch, compute, gemm, reference. Appends the ids fed to *forward_tokens.
std::vector<SequenceScore> score_sequences(const Olmoe& model, const std::vector<ScoredSequence>& sequences,
                                           const EvalOptions& options, bool with_reference, int64_t* forward_tokens);

// Window of the model that evaluation uses, and the id that stands before a first token (-1: none).
int64_t context_length(const Olmoe& model, const EvalOptions& options);
int32_t prefix_id(const Olmoe& model);

// A document as the trainer sees it: the first token is given, the loss falls where it says.
ScoredSequence sequence_of(const Document& document);
// The last `context` inputs, for sequences that are longer; Error(kInput) naming `what` unless options.truncate. True: cut.
bool fit(ScoredSequence& sequence, const Olmoe& model, const EvalOptions& options, const std::string& what);
// All tokens in windows of at most `context` inputs; every id is a label exactly once. The first window starts with `prefix`
// (without one, the first id is given); each later one has as much context as it holds beside its new tokens, one id at least.
std::vector<ScoredSequence> rolling_windows(const std::vector<int32_t>& ids, int64_t context, int32_t prefix);

// sum(y) / sum(x) over documents with its linearised standard error.
class RatioOfSums {
 public:
  void add(double y, double x) { ys_.push_back(y), xs_.push_back(x); }
  double value() const;
  std::optional<double> std_error() const;

 private:
  std::vector<double> ys_, xs_;
};

}  // namespace lightmoe
