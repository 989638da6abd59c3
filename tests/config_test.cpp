#include "model/config.h"

#include "loaders/json.h"
#include "tests/support/files.h"

namespace lightmoe {
namespace {

using testing::cap_memory_growth;
using testing::fails_with;
using testing::get_file;
using testing::in_child;
using testing::put_file;
using testing::TempDir;

TEST(Config, ReadsGolden) {
  const OlmoeConfig c = read_config("tests/golden/gqa-clip-renorm");
  EXPECT_EQ(c.hidden_size, 48);
  EXPECT_EQ(c.intermediate_size, 40);
  EXPECT_EQ(c.num_heads, 6);
  EXPECT_EQ(c.num_kv_heads, 3);
  EXPECT_EQ(c.num_experts, 12);
  EXPECT_EQ(c.num_experts_per_token, 3);
  EXPECT_EQ(c.clip_qkv, 0.7);
  EXPECT_TRUE(c.norm_topk_prob);
  EXPECT_EQ(c.rope_theta, 20000);
  EXPECT_EQ(c.rms_norm_eps, 1e-6);
  EXPECT_EQ(c.eos_token_ids, std::vector<int64_t>{3});
  EXPECT_EQ(c.pad_token_id, 1);
  EXPECT_FALSE(c.bos_token_id.has_value());
}

// The golden config with one key set (or, with null text, taken away).
std::string with(const std::string& key, const char* value) {
  Json root = parse_json(get_file("tests/golden/plain/config.json"), "golden");
  if (value == nullptr)
    root.erase(key);
  else
    root[key] = parse_json(value, "json");
  return root.dump();
}
OlmoeConfig parsed(const std::string& key, const char* value) { return parse_config(with(key, value), "c.json"); }
::testing::AssertionResult refused(const std::string& key, const char* value,
                                   const std::vector<std::string>& pieces = {}) {
  std::vector<std::string> all = pieces;
  all.push_back("c.json");
  all.push_back(key);
  return fails_with(ErrorKind::kInput, all, [&] { parsed(key, value); });
}

TEST(Config, EverySwitchIsHonoured) {
  EXPECT_EQ(parsed("num_key_value_heads", "null").num_kv_heads, 4);
  EXPECT_EQ(parsed("num_key_value_heads", nullptr).num_kv_heads, 4);
  EXPECT_EQ(parsed("num_key_value_heads", "2").num_kv_heads, 2);
  EXPECT_EQ(parsed("eos_token_id", "[3, 5]").eos_token_ids, (std::vector<int64_t>{3, 5}));
  EXPECT_TRUE(parsed("eos_token_id", "null").eos_token_ids.empty());
  EXPECT_EQ(parsed("clip_qkv", "8").clip_qkv, 8);
  EXPECT_FALSE(parsed("clip_qkv", "null").clip_qkv.has_value());
  EXPECT_TRUE(parsed("tie_word_embeddings", "true").tie_word_embeddings);
  EXPECT_EQ(parsed("rms_norm_eps", "1e-6").rms_norm_eps, 1e-6);
  EXPECT_EQ(parsed("rope_scaling", R"({"rope_type":"default"})").rope_theta, 10000);
  EXPECT_EQ(parsed("dtype", "\"bfloat16\"").torch_dtype, "float32");  // torch_dtype is there too and wins
  EXPECT_EQ(parsed("router_aux_loss_coef", "0").router_aux_loss_coef, 0);
  EXPECT_EQ(parsed("architectures", nullptr).hidden_size, 64);  // model_type says it
  EXPECT_EQ(parsed("model_type", nullptr).hidden_size, 64);     // architectures says it
}

// As transformers 5 writes it: other names for experts, dtype and rope.
TEST(Config, ReadsTheNamesOfTransformersFive) {
  Json root = parse_json(get_file("tests/golden/plain/config.json"), "golden");
  for (const char* key : {"num_experts", "rope_theta", "rope_scaling", "torch_dtype"}) root.erase(key);
  root["num_local_experts"] = 8;
  root["rope_parameters"] = {{"rope_type", "default"}, {"rope_theta", 50000.0}};
  root["dtype"] = "bfloat16";
  const OlmoeConfig c = parse_config(root.dump(), "c.json");
  EXPECT_EQ(c.num_experts, 8);
  EXPECT_EQ(c.rope_theta, 50000);
  EXPECT_EQ(c.torch_dtype, "bfloat16");
  const Json written = parse_json(config_to_json(c), "written");
  EXPECT_EQ(written["num_local_experts"], 8);
  EXPECT_EQ(written["rope_parameters"]["rope_theta"], 50000.0);
  EXPECT_EQ(written["dtype"], "bfloat16");
  for (const char* key : {"num_experts", "rope_theta", "torch_dtype"}) EXPECT_FALSE(written.contains(key)) << key;
}

TEST(Config, AbsurdValuesNameKeyValueAndRange) {
  for (const char* key : {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                          "num_experts", "num_experts_per_tok", "max_position_embeddings"}) {
    EXPECT_TRUE(refused(key, nullptr, {"missing", "integer from 1"}));
    EXPECT_TRUE(refused(key, "null", {"missing"}));
    for (const char* value : {"0", "-1", "1000000000", "18446744073709551615", "2.0", "\"64\"", "true", "[64]", "{}"}) {
      EXPECT_TRUE(refused(key, value, {printable(value), "integer from 1 to"})) << key << " " << value;
    }
  }
  EXPECT_TRUE(refused("num_experts_per_tok", "9", {"9", "1 to 8"}));
  EXPECT_TRUE(refused("num_attention_heads", "7", {"7", "hidden_size is 64"}));
  EXPECT_TRUE(refused("num_attention_heads", "64", {"even width"}));
  EXPECT_TRUE(refused("num_key_value_heads", "3", {"3", "divisor", "4"}));
  EXPECT_TRUE(refused("num_key_value_heads", "8", {"1 to 4"}));
  EXPECT_TRUE(refused("num_local_experts", "9", {"num_experts is 8", "is 9"}));
  EXPECT_TRUE(refused("head_dim", "32", {"32", "16"}));
  for (const char* value : {"0", "-1e-5", "2", "\"1e-5\""}) {
    EXPECT_TRUE(refused("rms_norm_eps", value, {"above 0 and at most 1"})) << value;
  }
  EXPECT_TRUE(refused("rope_theta", "0", {"above 0"}));
  EXPECT_TRUE(refused("clip_qkv", "-0.5", {"-0.5"}));
  EXPECT_TRUE(refused("clip_qkv", "false", {"false"}));
  EXPECT_TRUE(refused("norm_topk_prob", "1", {"true or false"}));
  EXPECT_TRUE(refused("eos_token_id", "-1", {"token id"}));
  EXPECT_TRUE(refused("eos_token_id", "[3, \"4\"]", {"token id"}));
  EXPECT_TRUE(refused("eos_token_id", "3.5", {"3.5"}));
  EXPECT_TRUE(refused("lightmoe", "[]", {"an object"}));
  EXPECT_TRUE(refused("torch_dtype", "16", {"a string"}));
}

TEST(Config, OtherArchitecturesAreRefused) {
  EXPECT_TRUE(refused("architectures", R"(["LlamaForCausalLM"])", {"LlamaForCausalLM", "OlmoeForCausalLM"}));
  EXPECT_TRUE(refused("architectures", R"("OlmoeForCausalLM")", {"OlmoeForCausalLM"}));
  EXPECT_TRUE(refused("architectures", "[]"));
  EXPECT_TRUE(refused("model_type", "\"mixtral\"", {"mixtral", "olmoe"}));
  EXPECT_TRUE(refused("attention_bias", "true", {"true"}));
  EXPECT_TRUE(refused("hidden_act", "\"gelu\"", {"gelu", "silu"}));
  EXPECT_TRUE(refused("rope_scaling", R"({"rope_type":"yarn","factor":2.0})", {"yarn", "not supported"}));
  EXPECT_TRUE(refused("rope_scaling", R"({"type":"linear","factor":2.0})", {"linear"}));
  EXPECT_TRUE(refused("rope_parameters", R"({"rope_theta":5.0})", {"10000", "5"}));
  EXPECT_TRUE(refused("quantization_config", R"({"bits":4})", {"quantized"}));
  Json root = parse_json(with("architectures", nullptr), "x");
  root.erase("model_type");
  EXPECT_TRUE(fails_with(ErrorKind::kInput, {"model_type"}, [&] { parse_config(root.dump(), "c.json"); }));
}

TEST(Config, HostileTextIsRefused) {
  const auto text_refused = [](const std::string& text, const std::vector<std::string>& pieces) {
    return fails_with(ErrorKind::kInput, pieces, [&] { parse_config(text, "c.json"); });
  };
  const std::string good = get_file("tests/golden/plain/config.json");
  for (size_t length = 0; length < good.find_last_of('}'); ++length)
    ASSERT_TRUE(text_refused(good.substr(0, length), {"c.json:"}));
  EXPECT_TRUE(
      text_refused("{\"hidden_size\":64,\n\"hidden_size\":128}", {"c.json:2:", "duplicate key \"hidden_size\""}));
  EXPECT_TRUE(text_refused("{\"a\":" + std::string(1'000'000, '[') + std::string(1'000'000, ']') + "}", {"nested"}));
  EXPECT_TRUE(text_refused("[]", {"c.json", "array", "object"}));
  EXPECT_TRUE(text_refused(std::string(17 << 20, ' '), {"at most"}));
}

TEST(Config, FilesAreCapped) {
  const TempDir dir;
  put_file(dir / "config.json", "{}");
  std::filesystem::resize_file(dir / "config.json", uint64_t{1} << 30);
  EXPECT_EQ(0, in_child([&] {
              cap_memory_growth(int64_t{16} << 20);
              return fails_with(ErrorKind::kInput, {"config.json", "1073741824 bytes", "at most"},
                                [&] { read_config(dir.path()); })
                         ? 0
                         : 1;
            }));
  EXPECT_TRUE(
      fails_with(ErrorKind::kInput, {"absent/config.json", "cannot open"}, [&] { read_config(dir / "absent"); }));
}

TEST(Config, GenerationConfigOverridesTokenIds) {
  const TempDir dir;
  put_file(dir / "config.json", get_file("tests/golden/plain/config.json"));
  put_file(dir / "generation_config.json", R"({"eos_token_id":[7,8],"bos_token_id":2})");
  const OlmoeConfig c = read_config(dir.path());
  EXPECT_EQ(c.eos_token_ids, (std::vector<int64_t>{7, 8}));
  EXPECT_EQ(c.bos_token_id, 2);
  EXPECT_EQ(c.pad_token_id, 1);
  put_file(dir / "generation_config.json", R"({"eos_token_id":"x"})");
  EXPECT_TRUE(fails_with(ErrorKind::kInput, {"generation_config.json", "eos_token_id", "\"x\""},
                         [&] { read_config(dir.path()); }));
}

TEST(Config, WritingKeepsWhatItReadAndForeignKeys) {
  for (const std::string name : {"plain", "gqa-clip-renorm", "e64k8"}) {
    const std::string text = get_file("tests/golden/" + name + "/config.json");
    const OlmoeConfig c = parse_config(text, name);
    Json before = parse_json(text, name), after = parse_json(config_to_json(c), name);
    EXPECT_FALSE(before.contains("bos_token_id"));
    EXPECT_TRUE(after.erase("bos_token_id") == 1);  // null, as Hugging Face writes it
    EXPECT_EQ(nlohmann::json(before), nlohmann::json(after));
  }
  OlmoeConfig c = parse_config(with("foreign", R"({"kept":[1,2]})"), "c.json");
  c.num_experts = 5, c.num_experts_per_token = 3, c.eos_token_ids = {1, 2}, c.lightmoe_json = R"({"format":1})";
  const OlmoeConfig again = parse_config(config_to_json(c), "again");
  EXPECT_EQ(again.num_experts, 5);
  EXPECT_EQ(again.eos_token_ids, c.eos_token_ids);
  EXPECT_EQ(again.lightmoe_json, c.lightmoe_json);
  EXPECT_EQ(parse_json(again.raw_json, "x")["foreign"], parse_json(R"({"kept":[1,2]})", "json"));
  OlmoeConfig stock = again;
  stock.lightmoe_json.clear();
  EXPECT_FALSE(parse_json(config_to_json(stock), "x").contains("lightmoe"));
}

TEST(Config, NamedShapesRoundTrip) {
  for (const std::string name : {"tiny", "mid", "olmoe-1b-7b"}) {
    const OlmoeConfig c = *named_config(name), again = parse_config(config_to_json(c), name);
    EXPECT_EQ(again.hidden_size, c.hidden_size);
    EXPECT_EQ(again.intermediate_size, c.intermediate_size);
    EXPECT_EQ(again.num_experts, c.num_experts);
    EXPECT_EQ(again.num_experts_per_token, c.num_experts_per_token);
    EXPECT_EQ(again.eos_token_ids, c.eos_token_ids);
    EXPECT_EQ(again.pad_token_id, c.pad_token_id);
    EXPECT_LT(c.eos_token_ids[0], c.vocab_size);
  }
  EXPECT_FALSE(named_config("small").has_value());
}

}  // namespace
}  // namespace lightmoe
