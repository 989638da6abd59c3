#include "model/eval.h"
#include "loaders/json.h"

#include <cmath>
#include <limits>

#include "kernels/gemm.h"
#include "model/eval_score.h"
#include "model/eval_text.h"
#include "model/generate.h"
#include "tests/support/files.h"
#include "tests/support/testing.h"

namespace lightmoe {
namespace {

using testing::fails_with;
using testing::TempDir;

constexpr int64_t kVocabulary = 300;

std::unique_ptr<Olmoe> make_model(uint64_t seed) {
  OlmoeConfig config;
  config.vocab_size = kVocabulary, config.hidden_size = 32, config.intermediate_size = 24, config.num_layers = 2;
  config.num_heads = config.num_kv_heads = 2, config.num_experts = 8, config.num_experts_per_token = 3;
  config.max_position_embeddings = 64, config.eos_token_ids = {0};
  config.initializer_range = 0.3;  // far from uniform outputs
  return random_model(config, DType::kF32, seed);
}
const Olmoe& model() {
  static const std::unique_ptr<Olmoe> m = make_model(5);
  return *m;
}
const Olmoe& other_model() {
  static const std::unique_ptr<Olmoe> m = make_model(6);
  return *m;
}

const std::vector<std::string>& corpus() {
  static const std::vector<std::string> texts = {
      "the cat sat on the mat", "a dog and a cat", "Saluton, mondo: ĉu vi vidas la katon?", "one two three\nfour",
      "the end of the story is near the end of the day, and the story goes on and on until the end"};
  return texts;
}
const Tokenizer& tokenizer() {
  static const TempDir directory;
  static const Tokenizer t = [] {
    testing::put_file(directory / "tokenizer.json",
                      train_bpe(corpus(), {.vocab_size = 290, .special_tokens = {"<|end|>"}}));
    return Tokenizer::load(directory.path());
  }();
  return t;
}

TextRecord text_record(const std::string& text) { return {.parts = {{text, true}}, .line = 1}; }
TextRecord question(const std::string& prompt, const std::string& answer) {
  return {.parts = {{prompt, false}, {answer, true}}, .line = 1};
}
TextRecord choice(const std::string& prompt, const std::vector<std::string>& choices, int64_t answer) {
  return {.parts = {{prompt, false}}, .choices = choices, .answer = answer, .line = 1};
}
std::vector<TextRecord> text_records() {
  std::vector<TextRecord> records;
  for (const std::string& text : corpus()) records.push_back(text_record(text));
  return records;
}
std::vector<TextRecord> questions() {
  return {question("the cat", " sat"), question("a dog", " and a cat"), question("one two", " three\nfour"),
          question("Saluton,", " mondo"), question("the end of", " the day")};
}
std::vector<TextRecord> choices() {
  return {choice("the cat sat on", {" the mat", " a dog", " the end of the story"}, 0),
          choice("a dog ", {"and a cat", "goes on"}, 1), choice("one two", {" three", " four", " near", " mondo"}, 2)};
}

// log p of each label, straight from the logits of a forward pass over this sequence alone.
std::vector<double> oracle_log_probs(const Olmoe& m, const ScoredSequence& s) {
  const Tensor hidden = m.forward(make_batch(s.ids, 1, static_cast<int64_t>(s.ids.size())), {});
  const std::vector<double> logits = testing::to_doubles(m.logits(hidden, {}));
  std::vector<double> log_probs;
  for (size_t t = 0; t < s.ids.size(); ++t) {
    if (s.labels[t] < 0) continue;
    const double* row = logits.data() + t * kVocabulary;
    double sum = 0;
    for (int64_t v = 0; v < kVocabulary; ++v) sum += std::exp(row[v]);
    log_probs.push_back(row[s.labels[t]] - std::log(sum));
  }
  return log_probs;
}
double sum(const std::vector<double>& values) {
  double total = 0;
  for (double v : values) total += v;
  return total;
}

// --- text -------------------------------------------------------------------------------------------------------------------

TEST(EvalText, WordsCharactersAndSpaces) {
  EXPECT_EQ(count_words("a b  c"), 3);
  EXPECT_EQ(count_words(""), 1);                              // as len(re.split(r"\s+", ""))
  EXPECT_EQ(count_words(" a\n"), 3);                          // ['', 'a', '']
  EXPECT_EQ(count_words("a\u00a0b\u2003\u3000c\u200bd"), 3);  // zero-width space is none
  EXPECT_EQ(count_characters("ĉeval\U0001f600"), 6);
  EXPECT_EQ(trimmed(" \t a b\r\n"), "a b");
  EXPECT_EQ(trimmed(" \n"), "");
}

TEST(EvalText, ContinuationIsEncodedWithItsContext) {
  const Tokenizer& t = tokenizer();
  for (const std::string context : {"the cat sat on", "the cat sat on ", "the cat sat on \n"}) {
    const ScoredSequence s = continuation_sequence({context, "the mat"}, t, 0, "x");
    const std::vector<int32_t> all = t.encode(context + "the mat");
    const size_t given = t.encode("the cat sat on").size();
    ASSERT_EQ(s.ids, std::vector<int32_t>(all.begin(), all.end() - 1));
    for (size_t i = 0; i < s.labels.size(); ++i) EXPECT_EQ(s.labels[i], i + 1 < given ? -100 : all[i + 1]);
  }
  const ScoredSequence bare = continuation_sequence({"", "the mat"}, t, 0, "x");
  EXPECT_EQ(bare.ids.front(), 0);
  EXPECT_EQ(bare.labels, t.encode("the mat"));
  EXPECT_TRUE(fails_with(ErrorKind::kInput, {"line 7", "BOS"}, [&] {
    continuation_sequence({"", "a"}, t, -1, "line 7");
  }));
  EXPECT_TRUE(fails_with(ErrorKind::kInput, {"line 7"}, [&] { continuation_sequence({"a", ""}, t, 0, "line 7"); }));
}

// --- windows and statistics -------------------------------------------------------------------------------------------------

TEST(EvalWindows, EveryTokenOnceWithTheContextThatFits) {
  const std::vector<int32_t> ids = {10, 11, 12, 13, 14, 15, 16, 17, 18, 19};
  const std::vector<ScoredSequence> w = rolling_windows(ids, 4, 0);
  ASSERT_EQ(w.size(), 3u);
  EXPECT_EQ(w[0].ids, (std::vector<int32_t>{0, 10, 11, 12}));
  EXPECT_EQ(w[0].labels, (std::vector<int32_t>{10, 11, 12, 13}));
  EXPECT_EQ(w[1].ids, (std::vector<int32_t>{13, 14, 15, 16}));
  EXPECT_EQ(w[1].labels, (std::vector<int32_t>{14, 15, 16, 17}));
  EXPECT_EQ(w[2].ids, (std::vector<int32_t>{15, 16, 17, 18}));  // the last window is filled with context
  EXPECT_EQ(w[2].labels, (std::vector<int32_t>{-100, -100, 18, 19}));

  EXPECT_EQ(rolling_windows(ids, 4, -1)[0].labels, (std::vector<int32_t>{11, 12, 13, 14}));
  EXPECT_EQ(rolling_windows({5}, 4, 0).size(), 1u);
  EXPECT_TRUE(rolling_windows({5}, 4, -1).empty());
  EXPECT_TRUE(rolling_windows({}, 4, 0).empty());
  for (int64_t context : {1, 2, 3, 9, 10, 11, 100}) {
    std::vector<int32_t> labels;
    for (const ScoredSequence& s : rolling_windows(ids, context, 0)) {
      EXPECT_LE(static_cast<int64_t>(s.ids.size()), context);
      for (int32_t label : s.labels) {
        if (label >= 0) labels.push_back(label);
      }
    }
    EXPECT_EQ(labels, ids) << "context " << context;
  }
}

TEST(EvalStatistics, StandardErrors) {
  RatioOfSums mean;
  for (double v : {1.0, 2.0, 3.0, 6.0}) mean.add(v, 1);
  EXPECT_DOUBLE_EQ(mean.value(), 3);
  EXPECT_DOUBLE_EQ(*mean.std_error(), std::sqrt(14.0 / 3 / 4));  // sample variance 14/3, n = 4
  RatioOfSums exact;                                             // proportional: the ratio is known without error
  exact.add(2, 1), exact.add(6, 3);
  EXPECT_DOUBLE_EQ(exact.value(), 2);
  EXPECT_DOUBLE_EQ(*exact.std_error(), 0);
  RatioOfSums one;
  one.add(1, 2);
  EXPECT_FALSE(one.std_error().has_value());
}

// --- metrics against the logits -------------------------------------------------------------------------------------------------

TEST(Eval, LossIsTheMeanOverAnswerTokens) {
  std::vector<Document> documents;
  double expected = 0;
  int64_t tokens = 0;
  for (const TextRecord& record : questions()) {
    documents.push_back(tokenize(record, tokenizer(), 0));
    for (double l : oracle_log_probs(model(), sequence_of(documents.back()))) expected -= l, ++tokens;
  }
  const EvalResult result = evaluate_documents(model(), documents, {});
  EXPECT_EQ(result.metric, EvalMetric::kLoss);
  EXPECT_EQ(result.scored_tokens, tokens);
  // f32 logits of magnitude about 10: their rounding is 1e-6 each, and averages out.
  EXPECT_NEAR(result.value("loss"), expected / static_cast<double>(tokens), 2e-6);
  EXPECT_EQ(evaluate(model(), tokenizer(), questions(), {.metric = EvalMetric::kLoss}).value("loss"),
            result.value("loss"));
}

TEST(Eval, PerplexityInWindows) {
  for (int64_t context : {0, 7}) {
    double log_prob = 0, tokens = 0, words = 0, bytes = 0;
    for (const std::string& text : corpus()) {
      const std::vector<int32_t> ids = tokenizer().encode(text);
      for (const ScoredSequence& w : rolling_windows(ids, context == 0 ? 64 : context, 0)) {
        log_prob += sum(oracle_log_probs(model(), w));
      }
      tokens += static_cast<double>(ids.size());
      words += static_cast<double>(count_words(text));
      bytes += static_cast<double>(text.size());
    }
    const EvalResult r = evaluate(model(), tokenizer(), text_records(), {.context = context});
    EXPECT_EQ(r.metric, EvalMetric::kPerplexity);
    EXPECT_EQ(r.scored_tokens, static_cast<int64_t>(tokens));
    EXPECT_NEAR(std::log(r.value("perplexity")), -log_prob / tokens, 2e-6);
    EXPECT_NEAR(std::log(r.value("word_perplexity")), -log_prob / words, 2e-5);
    EXPECT_NEAR(std::log(r.value("byte_perplexity")), -log_prob / bytes, 2e-6);
    EXPECT_NEAR(r.value("bits_per_byte"), -log_prob / bytes / std::log(2.0), 2e-6);
    EXPECT_EQ(r.main().name, "perplexity");
  }
  std::vector<std::vector<int32_t>> rows;
  for (const std::string& text : corpus()) rows.push_back(tokenizer().encode(text));
  EXPECT_EQ(evaluate_tokens(model(), rows, {}).value("perplexity"),
            evaluate(model(), tokenizer(), text_records(), {}).value("perplexity"));
}

TEST(Eval, MultipleChoiceTakesTheLikeliest) {
  // Every record with every choice declared right in turn: acc over those is 1 / choices, hit exactly by the oracle's choice.
  for (const TextRecord& record : choices()) {
    std::vector<double> scores, normed;
    for (const std::string& c : record.choices) {
      scores.push_back(
          sum(oracle_log_probs(model(), continuation_sequence({text_of(record), c}, tokenizer(), 0, "x"))));
      normed.push_back(scores.back() / static_cast<double>(count_characters(trimmed(c))));
    }
    const auto best = std::max_element(scores.begin(), scores.end()) - scores.begin();
    const auto best_normed = std::max_element(normed.begin(), normed.end()) - normed.begin();
    for (int64_t answer = 0; answer < static_cast<int64_t>(record.choices.size()); ++answer) {
      TextRecord r = record;
      r.answer = answer;
      const EvalResult result = evaluate(model(), tokenizer(), {r}, {});
      EXPECT_EQ(result.metric, EvalMetric::kMultipleChoice);
      EXPECT_EQ(result.value("acc"), best == answer);
      EXPECT_EQ(result.value("acc_norm"), best_normed == answer);
    }
  }
}

TEST(Eval, ExactMatchOfGeneratedAnswers) {
  // Answers the model really gives are matches, others are not; an answer that never ends is none.
  std::vector<TextRecord> records;
  size_t ended = 0;
  for (const std::string prompt : {"the cat", "a dog", "one two", "Saluton,", "near", "story", "goes on", "mat"}) {
    const GemmBackendScope native("native");
    GenerateOptions options{.max_new_tokens = 32, .eos_ids = {0}, .tokenizer = &tokenizer()};
    const Generation g = generate(model(), {tokenizer().encode(prompt)}, options)[0];
    if (g.finish == FinishReason::kEos && g.text.find("\ufffd") == std::string::npos && !trimmed(g.text).empty()) {
      records.push_back(question(prompt, g.text));
      ++ended;
    } else {
      records.push_back(question(prompt, " sat"));
    }
  }
  EvalResult result = evaluate(model(), tokenizer(), records, {.max_new_tokens = 32, .keep_samples = true});
  EXPECT_EQ(result.metric, EvalMetric::kExactMatch);
  EXPECT_EQ(result.value("exact_match"), static_cast<double>(ended) / static_cast<double>(records.size()));
  EXPECT_EQ(result.samples.size(), records.size());
  EXPECT_EQ(result.main().name, "exact_match");
  EXPECT_NE(result.find("loss"), nullptr);
  // The right text, cut off by the limit instead of ended: no match.
  GenerateOptions free{.max_new_tokens = 6, .tokenizer = &tokenizer()};
  const Generation g = generate(model(), {tokenizer().encode("the cat")}, free)[0];
  EXPECT_EQ(evaluate(model(), tokenizer(), {question("the cat", g.text)}, {.max_new_tokens = 6}).value("exact_match"),
            0);
  for (TextRecord& record : records) record.parts[1].text += "x";
  EXPECT_EQ(evaluate(model(), tokenizer(), records, {.max_new_tokens = 32}).value("exact_match"), 0);
}

TEST(Eval, ComparisonWithAReferenceModel) {
  const EvalResult self = evaluate(model(), tokenizer(), text_records(), {.reference = &model()});
  EXPECT_EQ(self.value("kl_mean"), 0);
  EXPECT_EQ(self.value("kl_p99"), 0);
  EXPECT_EQ(self.value("same_top1"), 1);
  EXPECT_EQ(self.value("perplexity_ratio"), 1);

  std::vector<double> kl;
  double same = 0;
  for (const std::string& text : corpus()) {
    for (const ScoredSequence& w : rolling_windows(tokenizer().encode(text), 64, 0)) {
      const Batch batch = make_batch(w.ids, 1, static_cast<int64_t>(w.ids.size()));
      const auto ours = testing::to_doubles(model().logits(model().forward(batch, {}), {}));
      const auto theirs = testing::to_doubles(other_model().logits(other_model().forward(batch, {}), {}));
      for (size_t t = 0; t < w.ids.size(); ++t) {
        const double *p = theirs.data() + t * kVocabulary, *q = ours.data() + t * kVocabulary;
        double zp = 0, zq = 0, sum = 0;
        for (int64_t v = 0; v < kVocabulary; ++v) zp += std::exp(p[v]), zq += std::exp(q[v]);
        for (int64_t v = 0; v < kVocabulary; ++v)
          sum += std::exp(p[v]) / zp * (p[v] - std::log(zp) - q[v] + std::log(zq));
        kl.push_back(sum);
        same += std::max_element(p, p + kVocabulary) - p == std::max_element(q, q + kVocabulary) - q;
      }
    }
  }
  std::sort(kl.begin(), kl.end());
  const double n = static_cast<double>(kl.size());
  const EvalResult r = evaluate(model(), tokenizer(), text_records(), {.reference = &other_model()});
  EXPECT_NEAR(r.value("kl_mean"), sum(kl) / n, 1e-5);
  EXPECT_NEAR(r.value("kl_median"),
              kl.size() % 2 == 1 ? kl[kl.size() / 2] : (kl[kl.size() / 2 - 1] + kl[kl.size() / 2]) / 2, 1e-5);
  EXPECT_LE(r.value("kl_p99"), kl.back() + 1e-5);
  EXPECT_GE(r.value("kl_p99"), kl[kl.size() - 2] - 1e-5);
  EXPECT_EQ(r.value("same_top1"), same / n);
  const EvalResult reference = evaluate(other_model(), tokenizer(), text_records(), {});
  EXPECT_NEAR(r.value("perplexity_ratio"), r.value("perplexity") / reference.value("perplexity"), 1e-9);
  EXPECT_EQ(r.value("reference_loss"), reference.value("loss"));
}

// --- the promise of the header -------------------------------------------------------------------------------------------------

TEST(Eval, TheSameNumbersWhateverTheBatch) {
  for (const auto& records : {text_records(), questions(), choices()}) {
    std::vector<MetricValue> alone;
    for (int64_t batch : {1, 2, 3, 5, 64}) {
      const EvalResult r = evaluate(model(), tokenizer(), records,
                                    {.batch = batch, .context = 33, .truncate = true, .reference = &other_model()});
      if (batch == 1) alone = r.metrics;
      ASSERT_EQ(r.metrics.size(), alone.size());
      for (size_t i = 0; i < alone.size(); ++i) {
        EXPECT_EQ(r.metrics[i].value, alone[i].value) << alone[i].name << " at batch " << batch;  // bits, not nearly
        EXPECT_EQ(r.metrics[i].std_error, alone[i].std_error) << alone[i].name;
      }
    }
  }
}

TEST(Eval, LimitsContextAndErrors) {
  EXPECT_EQ(evaluate(model(), tokenizer(), questions(), {.limit = 2}).records, 2);
  const TextRecord longer = question(std::string(500, 'z'), " sat");
  EXPECT_TRUE(fails_with(ErrorKind::kInput, {"record 1", "64", "--truncate"},
                         [&] { evaluate(model(), tokenizer(), {longer}, {.metric = EvalMetric::kLoss}); }));
  const EvalResult cut = evaluate(model(), tokenizer(), {longer}, {.metric = EvalMetric::kLoss, .truncate = true});
  EXPECT_EQ(cut.forward_tokens, 64);
  EXPECT_EQ(cut.truncated, 1);
  EXPECT_NE(to_table("task", cut).find("1 sequences longer"), std::string::npos);
  EXPECT_TRUE(fails_with(ErrorKind::kInput, {"no records"}, [&] { evaluate(model(), tokenizer(), {}, {}); }));
  EXPECT_TRUE(fails_with(ErrorKind::kInput, {"line 1", "choices"}, [&] {
    evaluate(model(), tokenizer(), questions(), {.metric = EvalMetric::kMultipleChoice});
  }));
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, {"--context 65", "64"},
                         [&] { evaluate(model(), tokenizer(), text_records(), {.context = 65}); }));
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, {"--batch 0"},
                         [&] { evaluate(model(), tokenizer(), text_records(), {.batch = 0}); }));
  EXPECT_TRUE(fails_with(ErrorKind::kInput, {"row 1", "300", "299"}, [&] {
    evaluate_tokens(model(), {{1, 2}, {300}}, {});
  }));
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, {"--metric bleu", "exact_match"}, [] { parse_eval_metric("bleu"); }));
  EXPECT_EQ(parse_eval_metric("loss"), EvalMetric::kLoss);
  OlmoeConfig config = model().config;
  config.vocab_size = 310;
  const auto wider = random_model(config, DType::kF32, 1);
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, {"310", "300"},
                         [&] { evaluate(model(), tokenizer(), text_records(), {.reference = wider.get()}); }));
}

TEST(Eval, NaNWeightsAreANumericError) {
  const auto broken = make_model(5);
  broken->final_norm->value.data<float>()[0] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_TRUE(fails_with(ErrorKind::kNumeric, {}, [&] { evaluate(*broken, tokenizer(), questions(), {}); }));
  EXPECT_TRUE(fails_with(ErrorKind::kNumeric, {}, [&] { evaluate(*broken, tokenizer(), text_records(), {}); }));
}

TEST(Eval, JsonAndTable) {
  const EvalResult r = evaluate(model(), tokenizer(), questions(), {.keep_samples = true});
  const Json json = to_json(r);
  EXPECT_EQ(json["metric"], "exact_match");
  EXPECT_EQ(json["records"], 5);
  EXPECT_EQ(json["metrics"]["loss"]["value"].get<double>(), r.value("loss"));
  EXPECT_EQ(json["metrics"]["loss"]["stderr"].get<double>(), *r.find("loss")->std_error);
  EXPECT_EQ(json["samples"].size(), 5u);
  const EvalResult one = evaluate(model(), tokenizer(), {questions()[0]}, {});
  EXPECT_TRUE(to_json(one)["metrics"]["loss"]["stderr"].is_null());
  const std::string table = to_table("math", r);
  EXPECT_NE(table.find("exact_match"), std::string::npos);
  EXPECT_EQ(std::count(table.begin(), table.end(), '\n'), static_cast<int64_t>(r.metrics.size()) + 1);
}

}  // namespace
}  // namespace lightmoe
