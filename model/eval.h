#pragma once
// What a model knows, in numbers that are the same whatever the batch size: rows of the `native` products and of attention do not
// depend on their neighbours, and sums run over documents in file order in double. Definitions (lm-evaluation-harness where named):
//   loss             mean of -log p over the tokens the loss falls on (answers with their EOS)
//   perplexity       exp of that over all tokens of each document, in rolling windows of `context` tokens whose scored parts are
//                    disjoint; the first token is predicted from BOS (else EOS). word_perplexity = exp(-ll / words split at
//                    white space), byte_perplexity, bits_per_byte = -ll / bytes / ln 2 (lm-eval loglikelihood_rolling)
//   exact_match      greedy generation ends by itself (EOS) with the reference text, white space at both ends ignored
//   acc, acc_norm    choice with the largest log-likelihood; the same divided by the choice's characters. Context and choice are
//                    encoded together and split at the context's length, the context's trailing spaces go to the choice (lm-eval)
//   against a reference model, over the scored tokens: KL(reference || model) mean, median, p99; share of equal argmax;
//                    perplexity ratio = exp(loss - loss of the reference)
// Standard errors: sample standard error of the mean over documents; for ratios of sums (loss, perplexities) the linearised one.

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "loaders/dataset.h"
#include "loaders/json_type.h"
#include "loaders/tokenizer.h"
#include "model/olmoe.h"

namespace lightmoe {

enum class EvalMetric : uint8_t { kAuto, kLoss, kPerplexity, kExactMatch, kMultipleChoice };
EvalMetric parse_eval_metric(std::string_view name);  // Error(kUsage) listing the names
const char* name_of(EvalMetric metric);

struct EvalOptions {
  EvalMetric metric =
      EvalMetric::kAuto;       // choices -> multiple_choice; a part without loss -> exact_match; else perplexity
  int64_t batch = 32;          // sequences per forward pass
  int64_t limit = 0;           // first records only, 0 = all
  int64_t context = 0;         // 0 = max_position_embeddings
  bool truncate = false;       // longer records: drop the oldest context instead of Error(kInput)
  int64_t max_new_tokens = 0;  // exact_match; 0 = longest reference of the task + 8 tokens
  GemmCompute compute = GemmCompute::kF32;
  std::string gemm = "native";              // backend during evaluation; another one may give up batch invariance
  const Olmoe* reference = nullptr;         // same vocabulary
  const RoutingOptions* routing = nullptr;  // of the model, not of the reference
  bool keep_samples = false;
};

struct MetricValue {
  std::string name;
  double value = 0;
  std::optional<double> std_error;  // absent for fewer than two documents, and for order statistics
  bool higher_is_better = false;
};
struct EvalSample {  // one record, for the reader of a result file
  int64_t line = 0;
  std::string output, expected;
  bool correct = false;
};
struct EvalResult {
  EvalMetric metric = EvalMetric::kAuto;  // never kAuto after evaluation
  int64_t records = 0, scored_tokens = 0, forward_tokens = 0;
  int64_t truncated = 0;             // sequences of which the oldest tokens were dropped
  std::vector<MetricValue> metrics;  // the main one first
  std::vector<EvalSample> samples;
  double seconds = 0;

  const MetricValue& main() const { return metrics.front(); }
  const MetricValue* find(std::string_view name) const;
  double value(std::string_view name) const;  // Error(kInternal) when absent
};

EvalResult evaluate(const Olmoe& model, const Tokenizer& tokenizer, const std::vector<TextRecord>& records,
                    const EvalOptions& options);
// Tokenized documents, e.g. a trainer's validation split: loss (and the comparison with a reference).
EvalResult evaluate_documents(const Olmoe& model, const std::vector<Document>& documents, const EvalOptions& options);
// Rows of ids for models without a tokenizer: perplexity over every id of a row.
EvalResult evaluate_tokens(const Olmoe& model, const std::vector<std::vector<int32_t>>& rows,
                           const EvalOptions& options);

// {"metric", "records", "scored_tokens", "metrics": {name: {"value", "stderr"}}, ...}; samples when kept. Non-finite values are null.
Json to_json(const EvalResult& result);
// Columns Task, Metric, Value, +-Stderr, n; one line per metric.
std::string to_table(const std::string& task, const EvalResult& result);

}  // namespace lightmoe
