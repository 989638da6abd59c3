// Calibration against the equations in double: expert outputs are recomputed here from what the router saw.

#include "compress/calibrate.h"

#include <gtest/gtest.h>

#include <cmath>

#include "loaders/safetensors.h"
#include "runtime/parallel.h"
#include "tests/support/testing.h"

namespace lightmoe {
namespace {

using testing::to_doubles;

const std::filesystem::path kModel = "tests/golden/e64k8";

std::vector<Document> golden_documents() { return documents_from_tokens(kModel / "golden.safetensors", 131); }

double silu(double z) { return z / (1 + std::exp(-z)); }

// f(x) from the equation.
struct ExpertInDouble {
  std::vector<double> gate_up, down;
  std::vector<double> output(const double* x, size_t d, size_t f) const {
    std::vector<double> a(f), y(d, 0.0);
    for (size_t j = 0; j < f; ++j) {
      double g = 0, u = 0;
      for (size_t i = 0; i < d; ++i) g += gate_up[j * d + i] * x[i], u += gate_up[(f + j) * d + i] * x[i];
      a[j] = silu(g) * u;
    }
    for (size_t i = 0; i < d; ++i) {
      for (size_t j = 0; j < f; ++j) y[i] += down[i * f + j] * a[j];
    }
    return y;
  }
};

struct Expected {
  std::vector<double> count, mass, norm, gate_norm, norm2, routed, all;
  double logit_norm = 0;
};

// The sums over one document at a time, in the order of the set.
std::vector<Expected> oracle(const Olmoe& model, const CalibrationSet& set) {
  const size_t slots = 64, d = 64, f = 16;
  std::vector<Expected> layers(2);
  for (Expected& e : layers) {
    e.count = e.mass = e.norm = e.gate_norm = e.norm2 = std::vector<double>(slots, 0.0);
    e.routed = e.all = std::vector<double>(slots * d, 0.0);
  }
  const Observer observer{.on_router = [&](const RouterView& view) {
    Expected& out = layers[static_cast<size_t>(view.layer)];
    const std::vector<double> x = to_doubles(view.x), logits = to_doubles(view.logits), gates = to_doubles(view.gates);
    std::vector<ExpertInDouble> experts;
    for (const Expert& expert : model.blocks[static_cast<size_t>(view.layer)].moe.experts) {
      experts.push_back({to_doubles(expert.gate_up->value), to_doubles(expert.down->value)});
    }
    for (size_t t = 0; t < static_cast<size_t>(view.x.dim(0)); ++t) {
      double squares = 0;
      for (size_t e = 0; e < slots; ++e) squares += logits[t * slots + e] * logits[t * slots + e];
      out.logit_norm += std::sqrt(squares);
      for (size_t e = 0; e < slots; ++e) {
        const std::vector<double> y = experts[e].output(&x[t * d], d, f);
        double norm = 0;
        for (size_t i = 0; i < d; ++i) norm += y[i] * y[i], out.all[e * d + i] += y[i];
        norm = std::sqrt(norm);
        for (size_t k = 0; k < 8; ++k) {
          if (view.slots.data<int32_t>()[t * 8 + k] != static_cast<int32_t>(e)) continue;
          const double gate = gates[t * 8 + k];
          out.count[e] += 1, out.mass[e] += gate, out.norm[e] += norm, out.gate_norm[e] += gate * norm;
          out.norm2[e] += norm * norm;
          for (size_t i = 0; i < d; ++i) out.routed[e * d + i] += y[i];
        }
      }
    }
  }};
  for (const std::vector<int32_t>& ids : set.sequences) {
    std::vector<int32_t> positions;
    for (size_t t = 0; t < ids.size(); ++t) positions.push_back(static_cast<int32_t>(t));
    model.forward(make_packed_batch(ids, {}, positions, {0, static_cast<int32_t>(ids.size())}),
                  {.observer = &observer});
  }
  return layers;
}

void expect_close(const std::vector<double>& actual, const std::vector<double>& expected, const char* what) {
  EXPECT_TRUE(testing::close(Tensor::from(actual, {static_cast<int64_t>(actual.size())}), expected, 1e-5)) << what;
}

TEST(Calibrate, SumsMatchTheEquations) {
  const auto model = load_model(kModel, DType::kF32);
  const CalibrateOptions options{.length = 30, .batch_tokens = 50, .all_outputs = true};
  const CalibrationSet set = calibration_set(golden_documents(), options);
  EXPECT_EQ(set.tokens, 80);
  EXPECT_EQ(set.sequences.size(), 4u);  // two documents of 40, cut at 30
  const Statistics s = calibrate(*model, set, "m", options);
  const std::vector<Expected> expected = oracle(*model, set);
  for (size_t l = 0; l < 2; ++l) {
    EXPECT_EQ(s.layers[l].count, expected[l].count);
    expect_close(s.layers[l].gate_mass, expected[l].mass, "gate_mass");
    expect_close(s.layers[l].output_norm, expected[l].norm, "output_norm");
    expect_close(s.layers[l].gate_output_norm, expected[l].gate_norm, "gate_output_norm");
    expect_close(s.layers[l].output_norm2, expected[l].norm2, "output_norm2");
    expect_close(s.layers[l].routed_output, expected[l].routed, "routed_output");
    expect_close(s.layers[l].all_output, expected[l].all, "all_output");
    EXPECT_NEAR(s.layers[l].logit_norm, expected[l].logit_norm, 1e-5 * expected[l].logit_norm);
  }
  EXPECT_EQ(s.tokens, 80);
  EXPECT_EQ(s.data, set.hash);
}

// Selection and gates as Hugging Face computed them, over whole documents.
TEST(Calibrate, CountsMatchTheGoldenSelection) {
  const auto model = load_model(kModel, DType::kF32);
  const SafetensorsFile golden(kModel / "golden.safetensors");
  const CalibrateOptions options;
  const Statistics s = calibrate(*model, calibration_set(golden_documents(), options), "m", options);
  for (size_t l = 0; l < 2; ++l) {
    const Tensor selected = golden.read(fmt::format("selected_experts.{}", l), DType::kI32);
    const std::vector<double> weights = to_doubles(golden.read(fmt::format("routing_weights.{}", l), DType::kF32));
    std::vector<double> count(64, 0.0), mass(64, 0.0);
    for (size_t i = 0; i < weights.size(); ++i) {
      count[static_cast<size_t>(selected.data<int32_t>()[i])] += 1;
      mass[static_cast<size_t>(selected.data<int32_t>()[i])] += weights[i];
    }
    EXPECT_EQ(s.layers[l].count, count);
    expect_close(s.layers[l].gate_mass, mass, "gate_mass");
  }
  EXPECT_EQ(starved_slots(s)[1].size(), 1u);  // as the golden README says
}

TEST(Calibrate, BatchAndThreadsDoNotMatter) {
  const auto model = load_model(kModel, DType::kF32);
  const GemmBackendScope rows_alone("reference");
  const int threads = num_threads();
  Statistics first;
  for (const auto& [batch, count] : {std::pair<int64_t, int>{40, 1}, {40, 2}, {2048, 2}}) {
    omp_set_num_threads(count);
    CalibrateOptions options{.length = 25, .batch_tokens = batch, .sample_tokens = 30, .sample_length = 8};
    const Statistics s = calibrate(*model, calibration_set(golden_documents(), options), "m", options);
    if (first.layers.empty()) first = s;
    EXPECT_EQ(s.sample_token, first.sample_token);
    for (size_t l = 0; l < 2; ++l) {
      EXPECT_EQ(s.layers[l].gate_mass, first.layers[l].gate_mass);
      EXPECT_EQ(s.layers[l].gate_output_norm2, first.layers[l].gate_output_norm2);
      EXPECT_EQ(s.layers[l].routed_output, first.layers[l].routed_output);
      EXPECT_EQ(s.layers[l].logit_norm, first.layers[l].logit_norm);
      EXPECT_EQ(s.layers[l].sample_logits, first.layers[l].sample_logits);
    }
  }
  omp_set_num_threads(threads);
}

TEST(Calibrate, MergingHalvesIsCalibratingTheWhole) {
  const auto model = load_model(kModel, DType::kF32);
  const GemmBackendScope rows_alone("reference");
  std::vector<Document> documents = golden_documents();
  const CalibrateOptions options;
  const auto of = [&](std::vector<Document> part) {
    return calibrate(*model, calibration_set(part, options), "m", options);
  };
  const Statistics merged = merge_statistics({of({documents[0]}), of({documents[1]})});
  const Statistics whole = of(documents);
  EXPECT_EQ(merged.tokens, whole.tokens);
  for (size_t l = 0; l < 2; ++l) {
    EXPECT_EQ(merged.layers[l].count, whole.layers[l].count);
    expect_close(merged.layers[l].gate_mass, whole.layers[l].gate_mass, "gate_mass");
  }
}

// A label is the next token where the loss falls on predicting it; a piece's last token has none.
TEST(CalibrationSet, LabelsFollowTheLossMask) {
  const CalibrateOptions options{
      .tokens = 100, .length = 4, .batch_tokens = 8, .sample_tokens = 50, .sample_length = 4};
  const CalibrationSet set = calibration_set({{.ids = {1, 2, 3, 4, 5, 6, 7}, .loss = {0, 0, 1, 1, 1, 0, 1}}}, options);
  EXPECT_EQ(set.sequences, (std::vector<std::vector<int32_t>>{{1, 2, 3, 4}, {5, 6, 7}}));
  EXPECT_EQ(set.labels, (std::vector<std::vector<int32_t>>{{-100, 3, 4, -100}, {-100, 7, -100}}));
  const CalibrationSet whole = calibration_set({{.ids = {1, 2, 3, 4, 5, 6, 7}}}, options);
  EXPECT_EQ(whole.labels, (std::vector<std::vector<int32_t>>{{2, 3, 4, -100}, {6, 7, -100}}));
  EXPECT_NE(whole.hash, set.hash);
}

TEST(CalibrationSet, TakesWhatIsAskedForAndSamplesEvenly) {
  std::vector<Document> documents;
  for (int i = 0; i < 50; ++i) documents.push_back({.ids = std::vector<int32_t>(static_cast<size_t>(5 + i % 7), i)});
  const CalibrateOptions options{
      .tokens = 200, .length = 6, .batch_tokens = 6, .sample_tokens = 50, .sample_length = 4};
  const CalibrationSet set = calibration_set(documents, options);
  int64_t tokens = 0, sampled = 0, half = 0;
  for (size_t i = 0; i < set.sequences.size(); ++i) {
    EXPECT_LE(set.sequences[i].size(), 6u);
    EXPECT_LE(set.sampled[i], std::min<int64_t>(4, static_cast<int64_t>(set.sequences[i].size())));
    tokens += static_cast<int64_t>(set.sequences[i].size());
    sampled += set.sampled[i];
    if (tokens <= 100) half = sampled;
  }
  EXPECT_EQ(tokens, 200);
  EXPECT_EQ(set.tokens, 200);
  EXPECT_NEAR(static_cast<double>(sampled), 50, 4);
  EXPECT_NEAR(static_cast<double>(half), 25, 4);
  EXPECT_EQ(calibration_set(documents, options).hash, set.hash);
  CalibrateOptions other = options;
  other.seed = 2;
  EXPECT_NE(calibration_set(documents, other).hash, set.hash);
  EXPECT_THROW(calibration_set({}, options), Error);
}

}  // namespace
}  // namespace lightmoe
