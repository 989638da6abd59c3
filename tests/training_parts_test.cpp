// Patterns over parameter names, files to documents, and the memory estimate against what a step really takes.

#include <omp.h>

#include <algorithm>

#include "model/parameter_patterns.h"
#include "model/trainer.h"
#include "model/training_data.h"
#include "model/training_estimate.h"
#include "tests/support/bigram.h"
#include "tests/support/files.h"

namespace lightmoe {
namespace {

using testing::Bigram;
using testing::fails_with;
using testing::TempDir;

TEST(ParameterPatterns, Glob) {
  EXPECT_TRUE(glob_match("", ""));
  EXPECT_FALSE(glob_match("", "a"));
  EXPECT_TRUE(glob_match("*", ""));
  EXPECT_TRUE(glob_match("a?c", "abc"));
  EXPECT_FALSE(glob_match("a?c", "ac"));
  EXPECT_TRUE(glob_match("*.mlp.gate.weight", "model.layers.3.mlp.gate.weight"));
  EXPECT_FALSE(glob_match("*.mlp.gate.weight", "model.layers.3.mlp.gate.weight2"));
  EXPECT_TRUE(glob_match("*a*b*", "xxaxxabxx"));
  EXPECT_FALSE(glob_match("*a*b", "xxaxxbx"));
  EXPECT_TRUE(glob_match("model.layers.1*.mlp*", "model.layers.12.mlp.experts.0"));
  EXPECT_FALSE(glob_match("mlp", "model.mlp"));  // the whole name
  // Many stars against a long name: no exponential search.
  EXPECT_FALSE(glob_match(std::string(200, '*') + "a*a*a*a*a*a*a*b", std::string(20000, 'a')));
}

TEST(ParameterPatterns, FreezeAndTrainOnly) {
  Bigram model(5);
  const auto trained = [&](const std::vector<std::string>& only, const std::vector<std::string>& freeze) {
    select_trainable(model.parameters(), only, freeze);
    std::string names;
    for (const ParameterPtr& p : model.parameters()) names += p->trainable ? p->name + " " : "";
    return names;
  };
  EXPECT_EQ(trained({}, {}), "table bias scale ");
  EXPECT_EQ(trained({}, {"s*"}), "table bias ");
  EXPECT_EQ(trained({"b*", "s*"}, {}), "bias scale ");
  EXPECT_EQ(trained({"*"}, {"*a*"}), "");
  EXPECT_TRUE(
      fails_with(ErrorKind::kUsage, {"--freeze", "'biass'", "did you mean bias"}, [&] { trained({}, {"biass"}); }));
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, {"--train-only", "'zzzzzzzz'"}, [&] { trained({"zzzzzzzz"}, {}); }));
  model.table->trainable = true;
  model.table->ensure_grad();
  trained({}, {"table"});
  EXPECT_FALSE(model.table->grad.defined());
}

TEST(TrainingData, WhatCannotBeTrainedOnIsNamed) {
  TempDir directory;
  OlmoeConfig config;
  config.vocab_size = 10;
  testing::put_file(directory / "a.jsonl", "{\"text\":\"x\"}\n");
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, {"a.jsonl", "tokenizer.json"},
                         [&] { load_documents({directory / "a.jsonl"}, config, nullptr, false); }));
  const std::string header = R"({"input_ids":{"dtype":"I32","shape":[2,3],"data_offsets":[0,24]}})";
  const auto put = [&](std::vector<int32_t> ids) {
    testing::put_file(directory / "t.safetensors",
                      testing::safetensors_bytes(header, std::string(reinterpret_cast<char*>(ids.data()), 24)));
  };
  put({1, 2, 3, 4, 5, 9});
  DocumentsReport report;
  EXPECT_EQ(load_documents({directory / "t.safetensors"}, config, nullptr, false, &report).size(), 2u);
  EXPECT_EQ(report.tokens, 6);
  EXPECT_EQ(report.records, 2);
  put({1, 2, 3, 4, 5, 10});
  EXPECT_TRUE(fails_with(ErrorKind::kInput, {"t.safetensors", "10"},
                         [&] { load_documents({directory / "t.safetensors"}, config, nullptr, false); }));
}

TEST(TrainingEstimate, IsNearWhatAStepTakes) {
  OlmoeConfig config;
  config.vocab_size = 97, config.hidden_size = 64, config.intermediate_size = 48, config.num_layers = 6;
  config.num_heads = 4, config.num_kv_heads = 2, config.num_experts = 8, config.num_experts_per_token = 3;
  config.max_position_embeddings = 512;
  const int threads = omp_get_max_threads();
  omp_set_num_threads(1);  // bytes are what is measured
  const auto model = random_model(config, DType::kF32, 1);
  const int64_t rows = 2, length = 128, tokens = rows * length;
  std::vector<int32_t> ids(tokens);
  for (int64_t i = 0; i < tokens; ++i) ids[i] = static_cast<int32_t>(i * 31 % 97);
  const Batch batch = make_batch(ids, rows, length, ids);
  const TrainingEstimate exact = estimate_training(config, model->parameters(), tokens, Recompute::kNone);
  EXPECT_EQ(exact.fixed.weight_bytes, model->stored_bytes());
  for (const Recompute recompute : {Recompute::kNone, Recompute::kMoe, Recompute::kBlock}) {
    const TrainOptions options{.loss_scale = 1.0 / tokens, .aux_coef = 0.01, .recompute = recompute};
    model->forward_backward(batch, options);  // gradients exist from here on
    reset_peak_memory();
    const int64_t before = memory_use_total().live_bytes;
    model->forward_backward(batch, options);
    const auto measured = static_cast<double>(memory_use_total().peak_bytes - before);
    const auto estimated =
        static_cast<double>(estimate_training(config, model->parameters(), tokens, recompute).activation_bytes);
    EXPECT_NEAR(estimated / measured, 1, 0.2)
        << static_cast<int>(recompute) << ": " << estimated << " for " << measured;
  }
  omp_set_num_threads(threads);
}

}  // namespace
}  // namespace lightmoe
