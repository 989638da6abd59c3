#include "model/eval.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <numeric>

#include "model/eval_score.h"
#include "model/eval_text.h"
#include "model/generate.h"

namespace lightmoe {
namespace {

constexpr int64_t kSpareAnswerTokens = 8;  // a wrong answer may run this much longer than the longest reference

double quantile(const std::vector<double>& sorted, double q) {  // linear between order statistics
  const double at = q * static_cast<double>(sorted.size() - 1);
  const size_t low = static_cast<size_t>(at), high = std::min(low + 1, sorted.size() - 1);
  return sorted[low] + (at - static_cast<double>(low)) * (sorted[high] - sorted[low]);
}

class Evaluation {
 public:
  Evaluation(const Olmoe& model, const Tokenizer* tokenizer, const EvalOptions& options)
      : model_(model), tokenizer_(tokenizer), options_(options) {
    check(options.limit >= 0, ErrorKind::kUsage, "--limit {}: expected 0 (all) or more", options.limit);
    check(options.reference == nullptr || options.reference->config.vocab_size == model.config.vocab_size,
          ErrorKind::kUsage, "the reference model has {} ids, the model {}",
          options.reference == nullptr ? 0 : options.reference->config.vocab_size, model.config.vocab_size);
    result_.metric = options.metric;
  }

  void loss(std::vector<ScoredSequence> sequences, const std::string& what);
  void perplexity(const std::vector<std::vector<int32_t>>& documents, const std::vector<std::string>* texts);
  void exact_match(const std::vector<TextRecord>& records);
  void multiple_choice(const std::vector<TextRecord>& records);
  std::vector<ScoredSequence> answer_sequences(const std::vector<TextRecord>& records) const;
  EvalResult finish(EvalMetric metric, size_t records);

 private:
  void add(const std::string& name, double value, std::optional<double> std_error, bool higher_is_better = false) {
    result_.metrics.push_back({name, value, std_error, higher_is_better});
  }
  void add_mean(const std::string& name, const std::vector<double>& values);
  void add_exp(const std::string& name, const RatioOfSums& exponent);
  void add_comparison(const std::vector<SequenceScore>& scores);
  std::vector<SequenceScore> score(const std::vector<ScoredSequence>& sequences, bool with_reference);
  std::vector<Generation> answers(const std::vector<TextRecord>& records);
  std::vector<int32_t> encode_prompt(const TextRecord& record) const;

  const Olmoe& model_;
  const Tokenizer* tokenizer_;
  const EvalOptions& options_;
  EvalResult result_;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

std::string line_of(const TextRecord& record) { return fmt::format("line {}", record.line); }

void Evaluation::add_mean(const std::string& name, const std::vector<double>& values) {
  RatioOfSums mean;
  for (double v : values) mean.add(v, 1);
  add(name, mean.value(), mean.std_error(), true);
}

void Evaluation::add_exp(const std::string& name, const RatioOfSums& exponent) {
  const double value = std::exp(exponent.value());
  std::optional<double> std_error = exponent.std_error();
  if (std_error) *std_error *= value;
  add(name, value, std_error);
}

std::vector<SequenceScore> Evaluation::score(const std::vector<ScoredSequence>& sequences, bool with_reference) {
  return score_sequences(model_, sequences, options_, with_reference, &result_.forward_tokens);
}

void Evaluation::add_comparison(const std::vector<SequenceScore>& scores) {
  if (options_.reference == nullptr) return;
  RatioOfSums kl, same, reference_loss, loss_gap;
  std::vector<double> all;
  for (const SequenceScore& s : scores) {
    const double tokens = static_cast<double>(s.tokens);
    kl.add(std::accumulate(s.kl.begin(), s.kl.end(), 0.0), tokens);
    same.add(static_cast<double>(s.same_top1), tokens);
    reference_loss.add(-s.reference_log_prob, tokens);
    loss_gap.add(s.reference_log_prob - s.log_prob, tokens);
    all.insert(all.end(), s.kl.begin(), s.kl.end());
  }
  std::sort(all.begin(), all.end());
  add("reference_loss", reference_loss.value(), reference_loss.std_error());
  add_exp("perplexity_ratio", loss_gap);
  add("kl_mean", kl.value(), kl.std_error());
  add("kl_median", quantile(all, 0.5), std::nullopt);
  add("kl_p99", quantile(all, 0.99), std::nullopt);
  add("same_top1", same.value(), same.std_error(), true);
}

void Evaluation::loss(std::vector<ScoredSequence> sequences, const std::string& what) {
  for (size_t i = 0; i < sequences.size(); ++i)
    result_.truncated += fit(sequences[i], model_, options_, fmt::format("{} {}", what, i + 1));
  const std::vector<SequenceScore> scores = score(sequences, options_.reference != nullptr);
  RatioOfSums loss;
  for (const SequenceScore& s : scores) {
    loss.add(-s.log_prob, static_cast<double>(s.tokens));
    result_.scored_tokens += s.tokens;
  }
  check(result_.scored_tokens > 0, ErrorKind::kInput, "no token to score in {} {}s", sequences.size(), what);
  add("loss", loss.value(), loss.std_error());
  add_comparison(scores);
}

// texts: for the measures per word and per byte.
void Evaluation::perplexity(const std::vector<std::vector<int32_t>>& documents, const std::vector<std::string>* texts) {
  std::vector<ScoredSequence> windows;
  std::vector<size_t> owner;
  for (size_t d = 0; d < documents.size(); ++d) {
    for (ScoredSequence& w : rolling_windows(documents[d], context_length(model_, options_), prefix_id(model_))) {
      windows.push_back(std::move(w));
      owner.push_back(d);
    }
  }
  std::vector<SequenceScore> scores(documents.size());
  const std::vector<SequenceScore> parts = score(windows, options_.reference != nullptr);
  for (size_t w = 0; w < parts.size(); ++w) {
    SequenceScore& whole = scores[owner[w]];
    whole.tokens += parts[w].tokens;
    whole.log_prob += parts[w].log_prob;
    whole.reference_log_prob += parts[w].reference_log_prob;
    whole.same_top1 += parts[w].same_top1;
    whole.kl.insert(whole.kl.end(), parts[w].kl.begin(), parts[w].kl.end());
  }
  RatioOfSums per_token, per_word, per_byte, bits;
  for (size_t d = 0; d < documents.size(); ++d) {
    result_.scored_tokens += scores[d].tokens;
    per_token.add(-scores[d].log_prob, static_cast<double>(scores[d].tokens));
    if (texts == nullptr) continue;
    const double bytes = static_cast<double>((*texts)[d].size());
    per_word.add(-scores[d].log_prob, static_cast<double>(count_words((*texts)[d])));
    per_byte.add(-scores[d].log_prob, bytes);
    bits.add(-scores[d].log_prob / std::log(2.0), bytes);
  }
  check(result_.scored_tokens > 0, ErrorKind::kInput, "no token to score in {} documents", documents.size());
  add_exp("perplexity", per_token);
  if (texts != nullptr) {
    add_exp("word_perplexity", per_word);
    add_exp("byte_perplexity", per_byte);
    add("bits_per_byte", bits.value(), bits.std_error());
  }
  add("loss", per_token.value(), per_token.std_error());
  add_comparison(scores);
}

std::vector<int32_t> Evaluation::encode_prompt(const TextRecord& record) const {
  std::vector<int32_t> ids;
  size_t last = 0;
  for (size_t i = 0; i < record.parts.size(); ++i) {
    if (record.parts[i].loss) last = i;
  }
  // Part by part, as training does (loaders/dataset.h tokenize).
  for (size_t i = 0; i < last; ++i) {
    const std::vector<int32_t> part = tokenizer_->encode(record.parts[i].text);
    ids.insert(ids.end(), part.begin(), part.end());
  }
  return ids;
}

std::vector<Generation> Evaluation::answers(const std::vector<TextRecord>& records) {
  const auto& eos = model_.config.eos_token_ids;
  check(!eos.empty(), ErrorKind::kInput, "exact_match needs an eos_token_id in config.json: answers end there");
  GenerateOptions options{.max_new_tokens = options_.max_new_tokens,
                          .eos_ids = {eos.begin(), eos.end()},
                          .tokenizer = tokenizer_,
                          .batch = options_.batch,
                          .truncate = options_.truncate,
                          .forward = {.compute = options_.compute, .routing = options_.routing}};
  std::vector<std::vector<int32_t>> prompts;
  int64_t longest = 0;
  for (const TextRecord& record : records) {
    prompts.push_back(encode_prompt(record));
    check(!prompts.back().empty(), ErrorKind::kInput, "{}: no prompt before the answer", line_of(record));
    longest = std::max<int64_t>(longest, static_cast<int64_t>(tokenizer_->encode(question_of(record).answer).size()));
  }
  if (options.max_new_tokens == 0) options.max_new_tokens = longest + kSpareAnswerTokens;
  const GemmBackendScope backend(options_.gemm);
  GenerateReport report;
  std::vector<Generation> generated = generate(model_, prompts, options, &report);
  result_.forward_tokens += report.prefill_tokens + report.decode_tokens;
  result_.truncated += report.truncated;
  return generated;
}

std::vector<ScoredSequence> Evaluation::answer_sequences(const std::vector<TextRecord>& records) const {
  const int32_t eos =
      model_.config.eos_token_ids.empty() ? -1 : static_cast<int32_t>(model_.config.eos_token_ids.front());
  std::vector<ScoredSequence> sequences;
  for (const TextRecord& record : records) {
    sequences.push_back(record.choices.empty() ? sequence_of(tokenize(record, *tokenizer_, eos))
                                               : continuation_sequence(question_of(record), *tokenizer_,
                                                                       prefix_id(model_), line_of(record)));
  }
  return sequences;
}

void Evaluation::exact_match(const std::vector<TextRecord>& records) {
  const std::vector<Generation> generated = answers(records);
  std::vector<double> correct;
  for (size_t i = 0; i < records.size(); ++i) {
    const std::string expected = question_of(records[i]).answer;
    const bool right = generated[i].finish == FinishReason::kEos && trimmed(generated[i].text) == trimmed(expected);
    correct.push_back(right);
    if (options_.keep_samples) result_.samples.push_back({records[i].line, generated[i].text, expected, right});
  }
  add_mean("exact_match", correct);
  loss(answer_sequences(records), "record");
}

void Evaluation::multiple_choice(const std::vector<TextRecord>& records) {
  std::vector<ScoredSequence> sequences;
  for (const TextRecord& record : records) {
    check(!record.choices.empty(), ErrorKind::kInput, "{}: multiple_choice needs choices and answer", line_of(record));
    for (const std::string& choice : record.choices) {
      sequences.push_back(
          continuation_sequence({text_of(record), choice}, *tokenizer_, prefix_id(model_), line_of(record)));
      result_.truncated += fit(sequences.back(), model_, options_, line_of(record));
    }
  }
  const std::vector<SequenceScore> scores = score(sequences, false);
  std::vector<double> acc, acc_norm;
  size_t at = 0;
  for (const TextRecord& record : records) {
    size_t best = 0, best_norm = 0;
    double best_score = -INFINITY, best_norm_score = -INFINITY;
    for (size_t c = 0; c < record.choices.size(); ++c) {
      const double log_prob = scores[at++].log_prob;
      const double characters = static_cast<double>(std::max<int64_t>(1, count_characters(trimmed(record.choices[c]))));
      if (log_prob > best_score) best_score = log_prob, best = c;
      if (log_prob / characters > best_norm_score) best_norm_score = log_prob / characters, best_norm = c;
    }
    const size_t answer = static_cast<size_t>(record.answer);
    acc.push_back(best == answer);
    acc_norm.push_back(best_norm == answer);
    if (options_.keep_samples)
      result_.samples.push_back({record.line, record.choices[best], record.choices[answer], best == answer});
  }
  add_mean("acc", acc);
  add_mean("acc_norm", acc_norm);
  loss(answer_sequences(records), "record");
}

EvalResult Evaluation::finish(EvalMetric metric, size_t records) {
  result_.metric = metric;
  result_.records = static_cast<int64_t>(records);
  result_.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  for (const MetricValue& m : result_.metrics) {
    check(std::isfinite(m.value) || m.name.find("perplexity") != std::string::npos, ErrorKind::kNumeric,
          "{} is {}: the model's outputs are not finite", m.name, m.value);
  }
  return std::move(result_);
}

EvalMetric choose_metric(const std::vector<TextRecord>& records) {
  if (!records.front().choices.empty()) return EvalMetric::kMultipleChoice;
  for (const TextRecord::Part& part : records.front().parts) {
    if (!part.loss) return EvalMetric::kExactMatch;
  }
  return EvalMetric::kPerplexity;
}

template <class T>
std::vector<T> limited(const std::vector<T>& items, const EvalOptions& options, const char* what) {
  check(!items.empty(), ErrorKind::kInput, "no {} to evaluate", what);
  const size_t count = options.limit == 0 ? items.size() : std::min(items.size(), static_cast<size_t>(options.limit));
  return {items.begin(), items.begin() + static_cast<int64_t>(count)};
}

constexpr std::pair<EvalMetric, const char*> kMetricNames[] = {{EvalMetric::kAuto, "auto"},
                                                               {EvalMetric::kLoss, "loss"},
                                                               {EvalMetric::kPerplexity, "perplexity"},
                                                               {EvalMetric::kExactMatch, "exact_match"},
                                                               {EvalMetric::kMultipleChoice, "multiple_choice"}};

}  // namespace

EvalMetric parse_eval_metric(std::string_view name) {
  std::string names;
  for (const auto& [metric, known] : kMetricNames) {
    if (name == known) return metric;
    names += (names.empty() ? "" : ", ") + std::string(known);
  }
  fail(ErrorKind::kUsage, "--metric {}: expected one of {}", name, names);
}

const char* name_of(EvalMetric metric) {
  for (const auto& [known, name] : kMetricNames) {
    if (metric == known) return name;
  }
  return "";
}

EvalResult evaluate(const Olmoe& model, const Tokenizer& tokenizer, const std::vector<TextRecord>& all,
                    const EvalOptions& options) {
  const std::vector<TextRecord> records = limited(all, options, "records");
  Evaluation evaluation(model, &tokenizer, options);
  const EvalMetric metric = options.metric == EvalMetric::kAuto ? choose_metric(records) : options.metric;
  if (metric == EvalMetric::kExactMatch) evaluation.exact_match(records);
  if (metric == EvalMetric::kMultipleChoice) evaluation.multiple_choice(records);
  if (metric == EvalMetric::kLoss) evaluation.loss(evaluation.answer_sequences(records), "record");
  if (metric == EvalMetric::kPerplexity) {
    std::vector<std::string> texts;
    std::vector<std::vector<int32_t>> ids;
    for (const TextRecord& record : records) {
      texts.push_back(text_of(record));
      ids.push_back(tokenizer.encode(texts.back()));
    }
    evaluation.perplexity(ids, &texts);
  }
  return evaluation.finish(metric, records.size());
}

EvalResult evaluate_documents(const Olmoe& model, const std::vector<Document>& all, const EvalOptions& options) {
  std::vector<ScoredSequence> sequences;
  for (const Document& document : limited(all, options, "documents")) sequences.push_back(sequence_of(document));
  Evaluation evaluation(model, nullptr, options);
  const size_t count = sequences.size();
  evaluation.loss(std::move(sequences), "document");
  return evaluation.finish(EvalMetric::kLoss, count);
}

EvalResult evaluate_tokens(const Olmoe& model, const std::vector<std::vector<int32_t>>& all,
                           const EvalOptions& options) {
  const std::vector<std::vector<int32_t>> rows = limited(all, options, "rows");
  for (size_t r = 0; r < rows.size(); ++r) {
    for (int32_t id : rows[r]) {
      check(id >= 0 && id < model.config.vocab_size, ErrorKind::kInput, "input_ids row {}: id {}, expected 0 to {}", r,
            id, model.config.vocab_size - 1);
    }
  }
  Evaluation evaluation(model, nullptr, options);
  evaluation.perplexity(rows, nullptr);
  return evaluation.finish(EvalMetric::kPerplexity, rows.size());
}

}  // namespace lightmoe
