#include "model/generate.h"

#include <algorithm>
#include <map>

#include "kernels/gemm.h"
#include "loaders/safetensors.h"
#include "tests/support/files.h"
#include "tests/support/testing.h"

namespace lightmoe {
namespace {

using testing::fails_with;
using testing::TempDir;

std::vector<int32_t> ids_of(const Tensor& t) { return {t.data<int32_t>(), t.data<int32_t>() + t.numel()}; }

OlmoeConfig tiny_config() {
  OlmoeConfig config;
  config.vocab_size = 300, config.hidden_size = 32, config.intermediate_size = 24, config.num_layers = 2;
  config.num_heads = config.num_kv_heads = 2, config.num_experts = 8, config.num_experts_per_token = 3;
  config.max_position_embeddings = 64, config.eos_token_ids = {0};
  config.initializer_range = 0.3;  // far from uniform outputs, so that choices are clear
  return config;
}
const Olmoe& tiny_model() {
  static const std::unique_ptr<Olmoe> model = random_model(tiny_config(), DType::kF32, 5);
  return *model;
}
std::vector<std::vector<int32_t>> ragged_prompts() {
  Philox rng(3);
  std::vector<std::vector<int32_t>> prompts;
  for (size_t length : {5, 1, 17, 2, 31, 8, 3}) {
    prompts.emplace_back(length);
    for (int32_t& id : prompts.back()) id = static_cast<int32_t>(rng.below(300));
  }
  return prompts;
}
std::vector<std::vector<int32_t>> tokens_of(const std::vector<Generation>& results) {
  std::vector<std::vector<int32_t>> tokens;
  for (const Generation& g : results) tokens.push_back(g.tokens);
  return tokens;
}

TEST(Generate, GreedyTokensOfTheGoldenModels) {
  for (const std::string name : {"plain", "gqa-clip-renorm", "e64k8"}) {
    SCOPED_TRACE(name);
    const auto model = load_model("tests/golden/" + name, DType::kF32);
    const SafetensorsFile golden("tests/golden/" + name + "/golden.safetensors");
    const std::vector<int32_t> expected = ids_of(golden.read("greedy_tokens", DType::kI32));
    const auto results = generate(*model, {ids_of(golden.read("greedy_prompt", DType::kI32))},
                                  {.max_new_tokens = static_cast<int64_t>(expected.size())});
    EXPECT_EQ(results[0].tokens, expected);
    EXPECT_EQ(results[0].finish, FinishReason::kLength);
  }
}

// The cache must change nothing but time: each token is the argmax of a forward pass over all before it.
TEST(Generate, EqualsForwardWithoutCache) {
  const Olmoe& model = tiny_model();
  const std::vector<int32_t> prompt = ragged_prompts()[2];
  const std::vector<int32_t> tokens = generate(model, {prompt}, {.max_new_tokens = 12})[0].tokens;
  ASSERT_EQ(tokens.size(), 12u);
  std::vector<int32_t> all = prompt;
  for (int32_t token : tokens) {
    const int64_t length = static_cast<int64_t>(all.size());
    const Tensor hidden = model.forward(make_batch(all, 1, length), {});
    const std::vector<double> logits = testing::to_doubles(model.logits(hidden.slice(length - 1, length), {}));
    const auto best = std::max_element(logits.begin(), logits.end());
    EXPECT_EQ(token, best - logits.begin());
    all.push_back(token);
  }
}

TEST(Generate, DoesNotDependOnTheBatch) {
  const GemmBackendScope native("native");
  for (const SamplingOptions& sampling :
       {SamplingOptions{}, SamplingOptions{.temperature = 1.5, .top_k = 50, .top_p = 0.9, .seed = 11}}) {
    std::vector<std::vector<int32_t>> alone;
    for (int64_t batch : {1, 2, 3, 7, 64}) {
      const auto tokens =
          tokens_of(generate(tiny_model(), ragged_prompts(),
                             {.sampling = sampling, .max_new_tokens = 20, .eos_ids = {0, 9}, .batch = batch}));
      if (batch == 1) alone = tokens;
      EXPECT_EQ(tokens, alone) << "batch " << batch;
    }
  }
}

TEST(Generate, SeedsAndStreamsDiffer) {
  const std::vector<int32_t> prompt = ragged_prompts()[0];
  GenerateOptions options{.sampling = {.temperature = 2, .seed = 1}, .max_new_tokens = 20};
  const auto first = tokens_of(generate(tiny_model(), {prompt, prompt}, options));
  EXPECT_NE(first[0], first[1]);  // one stream a sequence
  EXPECT_EQ(tokens_of(generate(tiny_model(), {prompt, prompt}, options)), first);
  options.sampling.seed = 2;
  EXPECT_NE(tokens_of(generate(tiny_model(), {prompt, prompt}, options)), first);
}

TEST(Generate, StopsAtEosWhichIsNotPartOfTheTokens) {
  const std::vector<int32_t> prompt = ragged_prompts()[4];
  const std::vector<int32_t> free = generate(tiny_model(), {prompt}, {.max_new_tokens = 10})[0].tokens;
  const int32_t eos = free[4];
  const size_t first = static_cast<size_t>(std::find(free.begin(), free.end(), eos) - free.begin());
  const Generation stopped = generate(tiny_model(), {prompt}, {.max_new_tokens = 10, .eos_ids = {299, eos}})[0];
  EXPECT_EQ(stopped.finish, FinishReason::kEos);
  EXPECT_EQ(stopped.tokens, std::vector<int32_t>(free.begin(), free.begin() + static_cast<int64_t>(first)));
}

TEST(Generate, ReportsTokensInOrderAndCountsThem) {
  const auto prompts = ragged_prompts();
  std::map<int64_t, std::vector<int32_t>> heard;
  GenerateOptions options{.max_new_tokens = 6, .batch = 4};
  options.on_token = [&](int64_t sequence, int32_t token) { heard[sequence].push_back(token); };
  GenerateReport report;
  const auto results = generate(tiny_model(), prompts, options, &report);
  for (size_t i = 0; i < prompts.size(); ++i) EXPECT_EQ(heard[static_cast<int64_t>(i)], results[i].tokens);
  EXPECT_EQ(report.prefill_tokens, 67);
  EXPECT_EQ(report.decode_tokens, static_cast<int64_t>(prompts.size()) * 5);  // the last token is never fed
}

TEST(Generate, ContextAndTruncation) {
  const Olmoe& model = tiny_model();
  std::vector<int32_t> longest(60, 7);
  for (size_t i = 0; i < longest.size(); ++i) longest[i] = static_cast<int32_t>(i * 5 % 300);
  EXPECT_NO_THROW(generate(model, {longest}, {.max_new_tokens = 5}));  // 60 + 5 - 1 = 64 positions
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, {"prompt 0", "60", "64", "--truncate"},
                         [&] { generate(model, {longest}, {.max_new_tokens = 6}); }));
  GenerateReport report;
  const auto cut = generate(model, {longest, {1, 2}}, {.max_new_tokens = 6, .truncate = true}, &report);
  EXPECT_EQ(report.truncated, 1);
  const auto same = generate(model, {{longest.begin() + 1, longest.end()}}, {.max_new_tokens = 6});
  EXPECT_EQ(cut[0].tokens, same[0].tokens);
}

TEST(Generate, RefusesBadInput) {
  const Olmoe& model = tiny_model();
  EXPECT_TRUE(fails_with(ErrorKind::kInput, {"prompt 1", "no tokens"}, [&] { generate(model, {{1}, {}}, {}); }));
  EXPECT_TRUE(fails_with(ErrorKind::kInput, {"prompt 0", "300", "299"}, [&] { generate(model, {{300}}, {}); }));
  EXPECT_TRUE(fails_with(ErrorKind::kInput, {"-1"}, [&] { generate(model, {{-1}}, {}); }));
  EXPECT_TRUE(
      fails_with(ErrorKind::kUsage, {"--max-new-tokens"}, [&] { generate(model, {{1}}, {.max_new_tokens = 0}); }));
  EXPECT_TRUE(
      fails_with(ErrorKind::kUsage, {"--max-new-tokens"}, [&] { generate(model, {{1}}, {.max_new_tokens = 65}); }));
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, {"--batch"}, [&] { generate(model, {{1}}, {.batch = 0}); }));
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, {"tokenizer"}, [&] { generate(model, {{1}}, {.stop_strings = {"x"}}); }));
  EXPECT_TRUE(generate(model, {}, {}).empty());
}

TEST(Generate, StopStringsAndMaskedIds) {
  const TempDir directory;
  testing::put_file(directory / "tokenizer.json", train_bpe({"the cat sat on the mat, the end"}, {.vocab_size = 262}));
  const Tokenizer tokenizer = Tokenizer::load(directory.path());
  ASSERT_LT(tokenizer.vocab_size(), 300);
  GenerateOptions options{.sampling = {.temperature = 3}, .max_new_tokens = 30, .tokenizer = &tokenizer};
  const auto prompts = ragged_prompts();
  const auto free = generate(tiny_model(), prompts, options);
  for (size_t i = 0; i < free.size(); ++i) {
    for (int32_t id : free[i].tokens) EXPECT_LT(id, tokenizer.vocab_size());
    EXPECT_EQ(free[i].text, tokenizer.decode(free[i].tokens, true));
  }
  // A stop string that spans two tokens of a free run, both ASCII so that the text is plain.
  size_t tried = 0;
  for (size_t i = 0; i < free.size(); ++i) {
    const std::string& text = free[i].text;
    for (size_t at = 1; at + 2 < text.size() && tried < 5; ++at) {
      const std::string stop = text.substr(at, 2);
      if (std::any_of(stop.begin(), stop.end(), [](char c) { return c <= 0; })) continue;
      options.stop_strings = {"never seen", stop};
      const Generation stopped = generate(tiny_model(), prompts, options)[i];
      EXPECT_EQ(stopped.finish, FinishReason::kStopString);
      EXPECT_EQ(stopped.text, text.substr(0, text.find(stop)));
      EXPECT_LE(stopped.tokens.size(), free[i].tokens.size());
      ++tried;
      break;
    }
  }
  EXPECT_GT(tried, 0u);
}

}  // namespace
}  // namespace lightmoe
