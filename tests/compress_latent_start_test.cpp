// Where the fits of MoBE and SLBF start: a step of Adam moves a number by at most its rate, so that the plan of one step is the
// published start to within that.

#include <gtest/gtest.h>

#include <cmath>

#include "compress/linear_algebra.h"
#include "compress/weights.h"
#include "tests/support/compression.h"
#include "tests/support/testing.h"

namespace lightmoe {
namespace {

using testing::to_doubles;

struct Fixture {
  explicit Fixture(int64_t bases) {
    options.budget = {BudgetKind::kExperts, .25};
    options.latent.fit_steps = 1, options.latent.bases = bases;
  }
  MethodInput input() const {
    return {.config = config, .statistics = ground.statistics, .options = options, .experts = &experts};
  }
  // [F,D], of down the transpose.
  Tensor weights(int64_t expert, ExpertMatrix matrix) const {
    const Tensor w = experts.place(0, expert, matrix).read(DType::kF64);
    return matrix == ExpertMatrix::kDown ? transpose(w) : w;
  }
  double deviation(ExpertMatrix matrix) const {
    double sum = 0, squares = 0, count = 0;
    for (int64_t e = 0; e < config.num_experts; ++e) {
      for (const double v : to_doubles(weights(e, matrix))) sum += v, squares += v * v, count += 1;
    }
    return std::sqrt(squares / count - sum / count * (sum / count));
  }
  // The M directions that experts [first, end) have most in, as rows.
  Tensor directions(int64_t first, int64_t end, ExpertMatrix matrix, int64_t count) const {
    const int64_t d = config.hidden_size;
    const Tensor gram = Tensor::zeros({d, d}, DType::kF64);
    for (int64_t e = first; e < end; ++e) {
      const std::vector<double> g = to_doubles(product(weights(e, matrix), true, weights(e, matrix), false));
      for (size_t i = 0; i < g.size(); ++i) gram.data<double>()[i] += g[i];
    }
    return symmetric_eigen(gram).vectors.slice(0, count);
  }

  const testing::CompressionGround& ground = testing::CompressionGround::golden();
  OlmoeConfig config = read_config(ground.model);
  Checkpoint checkpoint{ground.model};
  ExpertSource experts{checkpoint, config};
  MethodOptions options;
};

void expect_within(const Tensor& made, const Tensor& start, double scale, double distance) {
  const std::vector<double> a = to_doubles(made), b = to_doubles(start);
  ASSERT_EQ(a.size(), b.size());
  double furthest = 0, largest = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    furthest = std::max(furthest, std::abs(a[i] - b[i]) / scale), largest = std::max(largest, std::abs(b[i]) / scale);
  }
  EXPECT_LE(furthest, distance);
  EXPECT_GT(largest, 3 * distance);  // so that another start would be seen
}

// Softmax of one 1 among zeros, every logit moved by at most `rate`: the share moves by at most a half of that times two.
void expect_own(const Tensor& mix, int64_t row, int64_t own, double rate) {
  const std::vector<double> w = to_doubles(mix.row(row));
  const double sum = std::exp(1.0) + static_cast<double>(w.size() - 1);
  for (size_t j = 0; j < w.size(); ++j) {
    EXPECT_NEAR(w[j], (static_cast<int64_t>(j) == own ? std::exp(1.0) : 1) / sum, rate / 2) << j;
  }
}

// Groups by index; each basis is its group's main directions, each factor the expert's part along them.
TEST(Mobe, StartsFromTheGroupsMainDirections) {
  const Fixture at(4);
  const Plan plan = find_method("mobe").plan(at.input());
  const int64_t m = plan.layers[0].shape.latent_size, per_group = at.config.num_experts / 4;
  ASSERT_EQ(plan.layers[0].shape.projections, 4);
  for (const ExpertMatrix matrix : {ExpertMatrix::kGate, ExpertMatrix::kUp}) {
    const double sigma = at.deviation(matrix);
    for (const int64_t j : {0, 3}) {
      const Tensor b = at.directions(j * per_group, (j + 1) * per_group, matrix, m);
      expect_within(plan.computed.at(projection_tensor_name(0, j, matrix))(), b, 1, .0701);
      for (const int64_t e : {j * per_group, (j + 1) * per_group - 1}) {
        const Tensor a = product(at.weights(e, matrix), false, b, true);
        expect_within(plan.computed.at(latent_tensor_name(0, e, matrix))(), a, sigma, .0701);
        expect_own(plan.computed.at(mix_tensor_name(0, e))(), static_cast<int64_t>(matrix), j, .0701);
      }
    }
  }
}

// Each expert's own singular vectors: the first K are its basis' rows, U = [I; 0], A is the expert's part along the first M.
TEST(Slbf, StartsFromTheExpertsOwnDirections) {
  const Fixture at(0);
  const Plan plan = find_method("slbf").plan(at.input());
  const LayerShape& shape = plan.layers[0].shape;
  const int64_t m = shape.latent_size, k = shape.projection_rank;
  ASSERT_EQ(shape.projections, at.config.num_experts);
  ASSERT_TRUE(0 < k && k < m);
  for (const ExpertMatrix matrix : kExpertMatrices) {
    const double sigma = at.deviation(matrix);
    for (const int64_t e : {int64_t{0}, at.config.num_experts - 1}) {
      const Tensor r = at.directions(e, e + 1, matrix, m);
      expect_within(plan.computed.at(projection_tensor_name(0, e, matrix))(), r.slice(0, k), 1,
                    .0301 + .0006);  // of unit rows
      for (const double u : to_doubles(plan.computed.at(left_tensor_name(0, e, matrix))()))
        EXPECT_LE(std::abs(u), .0301);
      const Tensor a = product(at.weights(e, matrix), false, r, true);
      double largest = 0;
      for (const double v : to_doubles(a)) largest = std::max(largest, std::abs(v) / sigma);
      // The rate, and the decay of 0.02 times the rate.
      expect_within(plan.computed.at(latent_tensor_name(0, e, matrix))(), a, sigma, .1001 + .002 * largest);
      expect_own(plan.computed.at(mix_tensor_name(0, e))(), static_cast<int64_t>(matrix), e, .1001);
    }
  }
}

}  // namespace
}  // namespace lightmoe
