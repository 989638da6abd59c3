#include "compress/statistics.h"

#include <gtest/gtest.h>

#include <cmath>
#include <map>

#include "loaders/safetensors.h"
#include "runtime/philox.h"
#include "tests/support/testing.h"

namespace lightmoe {
namespace {

// Random sums, all positive, with a sample of `sequences` x 3 tokens.
Statistics random_statistics(uint64_t seed, int sequences, bool all_outputs = false) {
  Statistics s = empty_statistics(2, 5, 3, all_outputs);
  Philox random(seed);
  s.tokens = 100 + static_cast<int64_t>(seed);
  s.model = "m", s.data = "d" + std::to_string(seed);
  for (LayerStatistics& l : s.layers) {
    for (auto* sums : {&l.count, &l.gate_mass, &l.output_norm, &l.gate_output_norm, &l.output_norm2,
                       &l.gate_output_norm2, &l.routed_output, &l.all_output}) {
      for (double& v : *sums) v = random.uniform();
    }
    l.logit_norm = random.uniform();
    for (int i = 0; i < sequences * 3 * 5; ++i) l.sample_logits.push_back(static_cast<float>(random.normal()));
  }
  for (int t = 0; t < sequences * 3; ++t) {
    s.sample_token.push_back(10 * t);
    s.sample_sequence.push_back(t / 3);
  }
  return s;
}

void expect_equal(const Statistics& a, const Statistics& b) {
  EXPECT_EQ(a.tokens, b.tokens);
  EXPECT_EQ(a.model, b.model);
  EXPECT_EQ(a.data, b.data);
  EXPECT_EQ(a.sample_token, b.sample_token);
  EXPECT_EQ(a.sample_sequence, b.sample_sequence);
  ASSERT_EQ(a.layers.size(), b.layers.size());
  for (size_t l = 0; l < a.layers.size(); ++l) {
    EXPECT_EQ(a.layers[l].count, b.layers[l].count);
    EXPECT_EQ(a.layers[l].gate_mass, b.layers[l].gate_mass);
    EXPECT_EQ(a.layers[l].gate_output_norm2, b.layers[l].gate_output_norm2);
    EXPECT_EQ(a.layers[l].routed_output, b.layers[l].routed_output);
    EXPECT_EQ(a.layers[l].all_output, b.layers[l].all_output);
    EXPECT_EQ(a.layers[l].logit_norm, b.layers[l].logit_norm);
    EXPECT_EQ(a.layers[l].sample_logits, b.layers[l].sample_logits);
  }
}

std::filesystem::path scratch(const char* name) {
  return std::filesystem::path(::testing::TempDir()) / (std::string("lightmoe_statistics_") + name);
}

TEST(Statistics, FileKeepsEverything) {
  for (const bool all_outputs : {false, true}) {
    for (const int sequences : {0, 4}) {
      const Statistics s = random_statistics(3, sequences, all_outputs);
      save_statistics(s, scratch("roundtrip.safetensors"));
      expect_equal(load_statistics(scratch("roundtrip.safetensors")), s);
    }
  }
}

TEST(Statistics, RefusesOtherFiles) {
  const auto refused = [](const std::filesystem::path& file, ErrorKind kind, const char* message) {
    try {
      load_statistics(file);
      ADD_FAILURE() << file << " was read";
    } catch (const Error& error) {
      EXPECT_EQ(error.kind(), kind);
      EXPECT_NE(std::string(error.what()).find(message), std::string::npos) << error.what();
    }
  };
  write_safetensors(scratch("other.safetensors"), {{"x", Tensor::zeros({2}, DType::kF32)}});
  refused(scratch("other.safetensors"), ErrorKind::kInput, "not a statistics file");
  Statistics s = random_statistics(1, 2);
  s.layers[1].gate_mass[4] = NAN;
  save_statistics(s, scratch("nan.safetensors"));
  refused(scratch("nan.safetensors"), ErrorKind::kNumeric, "gate_mass of layer 1 holds nan at 4");
  s = random_statistics(1, 2);
  s.layers[0].count[2] = -1;
  save_statistics(s, scratch("negative.safetensors"));
  refused(scratch("negative.safetensors"), ErrorKind::kNumeric, "count of layer 0 holds -1 at 2");
  const Tensor sums = Tensor::zeros({2, 5}, DType::kF64);
  const std::map<std::string, std::string> metadata = {
      {"lightmoe", "statistics-1"}, {"layers", "2"}, {"slots", "6"}, {"hidden", "3"}, {"tokens", "9"}};
  write_safetensors(scratch("shape.safetensors"), {{"count", sums}}, metadata);
  refused(scratch("shape.safetensors"), ErrorKind::kInput, "\"count\" is [2, 5], expected [2, 6]");
  write_safetensors(scratch("missing.safetensors"), {{"gate_mass", sums}}, metadata);
  refused(scratch("missing.safetensors"), ErrorKind::kInput, "tensor \"count\" is missing");
}

TEST(Statistics, MergingAddsSumsAndJoinsSamples) {
  const Statistics a = random_statistics(1, 2), b = random_statistics(2, 3);
  const Statistics merged = merge_statistics({a, b});
  EXPECT_EQ(merged.tokens, a.tokens + b.tokens);
  EXPECT_EQ(merged.data, "d1+d2");
  EXPECT_EQ(merged.sample_sequence, (std::vector<int32_t>{0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4}));
  EXPECT_EQ(merged.sample_token[6], a.tokens);
  EXPECT_EQ(merged.layers[1].gate_mass[3], a.layers[1].gate_mass[3] + b.layers[1].gate_mass[3]);
  EXPECT_EQ(merged.layers[0].sample_logits.size(), 75u);
  expect_equal(merge_statistics({a}), a);

  Statistics other = b;
  other.model = "n";
  EXPECT_THROW(merge_statistics({a, other}), Error);
}

TEST(Statistics, CoverageNamesExpertsWithoutTokens) {
  Statistics s = random_statistics(1, 0);
  s.layers[1].count = {0, 7, 3, 0, 1};
  EXPECT_EQ(starved_slots(s), (std::vector<std::vector<int32_t>>{{}, {0, 3}}));
  const std::string table = coverage_table(s);
  EXPECT_NE(table.find("    1      3                         0       1       7   0 3\n"), std::string::npos) << table;
}

TEST(Statistics, SimilarityIsTheMeanOfTheSequencesCosines) {
  Statistics s = empty_statistics(1, 2, 1, false);
  // Sequence 0: columns (1,0) and (1,1): cosine 1/sqrt 2.  Sequence 1: columns (2) and (-3): cosine -1.
  s.sample_sequence = {0, 0, 1};
  s.sample_token = {0, 1, 2};
  s.layers[0].sample_logits = {1, 1, 0, 1, 2, -3};
  const std::vector<double> similarity = logit_similarity(s, 0);
  EXPECT_NEAR(similarity[1], (std::sqrt(.5) - 1) / 2, 1e-15);
  EXPECT_EQ(similarity[1], similarity[2]);
  EXPECT_NEAR(similarity[0], 1, 1e-15);
  EXPECT_TRUE(logit_similarity(empty_statistics(1, 2, 1, false), 0).empty());
}

TEST(Statistics, BoundToTheirModel) {
  const Statistics s = random_statistics(1, 0);
  EXPECT_NO_THROW(check_statistics(s, "m", 2, 5, 3, "s"));
  EXPECT_THROW(check_statistics(s, "other", 2, 5, 3, "s"), Error);
  EXPECT_THROW(check_statistics(s, "m", 2, 6, 3, "s"), Error);
  EXPECT_NO_THROW(check_statistics(uniform_statistics(2, 5, 3), "other", 2, 5, 3, "s"));
}

}  // namespace
}  // namespace lightmoe
