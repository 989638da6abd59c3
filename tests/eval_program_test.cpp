// Verbs eval and generate, run as a user does.
#include <gtest/gtest.h>

#include "loaders/json.h"
#include "loaders/safetensors.h"
#include "tests/support/program.h"

namespace lightmoe {
namespace {

TEST(EvalProgram, TokensReferenceAndRefusals) {
  const testing::ScratchDirectory directory;
  const std::filesystem::path tokens = directory.path() / "ids.safetensors", out = directory.path() / "out.json";
  write_safetensors(tokens, {{"input_ids", Tensor::from<int32_t>({5, 6, 7, 8, 9, 10, 11, 12}, {2, 4})}});
  const std::vector<std::string> base = {"eval",  "tests/golden/plain", "--tokens", tokens.string(),
                                         "--out", out.string()};
  std::vector<std::string> with_reference = base;
  with_reference.insert(with_reference.end(), {"--reference", "tests/golden/plain-bf16"});
  const testing::ProgramResult first = testing::run_lightmoe(with_reference);
  ASSERT_EQ(first.exit_code, 0) << first.err;
  EXPECT_NE(first.out.find("perplexity_ratio"), std::string::npos);
  const Json json = read_json_file(out.string());
  EXPECT_EQ(json["tasks"][0]["scored_tokens"], 8);  // each row's first token follows EOS
  EXPECT_EQ(json["model_hash"].get<std::string>().size(), 32u);
  EXPECT_LT(json["tasks"][0]["metrics"]["kl_mean"]["value"].get<double>(), 0.01);

  const testing::ProgramResult again = testing::run_lightmoe(base);
  EXPECT_EQ(again.exit_code, 2);
  EXPECT_NE(again.err.find("--force"), std::string::npos);
  EXPECT_EQ(read_json_file(out.string()), json);  // untouched
  EXPECT_EQ(testing::run_lightmoe({"eval", "tests/golden/plain"}).exit_code, 2);
  EXPECT_EQ(testing::run_lightmoe({"eval", "tests/golden/plain", "--task", "no-such.jsonl"}).exit_code, 3);
  EXPECT_EQ(
      testing::run_lightmoe({"eval", "tests/golden/plain", "--tokens", tokens.string(), "--metric", "f1"}).exit_code,
      2);
}

TEST(EvalProgram, GenerateFromTokens) {
  const auto generate_json = [](const std::vector<std::string>& more) {
    std::vector<std::string> arguments = {
        "generate", "tests/golden/e64k8", "--tokens", "tests/golden/e64k8/golden.safetensors", "--max-new-tokens", "6",
        "--json"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    const testing::ProgramResult result = testing::run_lightmoe(arguments);
    EXPECT_EQ(result.exit_code, 0) << result.err;
    return parse_json(result.out, "stdout");
  };
  const Json greedy = generate_json({});
  EXPECT_EQ(greedy["sequences"].size(), 2u);
  EXPECT_EQ(greedy["sequences"], generate_json({"--batch", "1"})["sequences"]);
  EXPECT_EQ(generate_json({"--temperature", "2", "--seed", "4"})["sequences"],
            generate_json({"--temperature", "2", "--seed", "4", "--batch", "1"})["sequences"]);
  EXPECT_EQ(testing::run_lightmoe({"generate", "tests/golden/plain", "--prompt", "a"}).exit_code, 3);  // no tokenizer
}

}  // namespace
}  // namespace lightmoe
