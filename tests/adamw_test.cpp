#include "kernels/adamw.h"

#include <limits>

#include "tests/cases/adamw.h"
#include "tests/support/devices.h"

namespace lightmoe {
namespace {

using testing::random_tensor;
using testing::to_doubles;

struct Types {
  DType w, grad, moment;
};
const std::vector<Types> kTypes = {{DType::kF32, DType::kF32, DType::kF32},
                                   {DType::kBF16, DType::kBF16, DType::kF32},
                                   {DType::kBF16, DType::kF32, DType::kF32},
                                   {DType::kF64, DType::kF64, DType::kF64}};

struct State {
  std::vector<double> w, m, v;
};

// One step of torch.optim.AdamW's equations in double.
void oracle_step(State* state, const std::vector<double>& grad, const AdamW& op, const AdamWTensor& tensor) {
  const double step = static_cast<double>(op.step);
  for (size_t i = 0; i < grad.size(); ++i) {
    const double g = op.grad_scale * grad[i];
    state->w[i] *= 1 - tensor.lr * tensor.weight_decay;
    state->m[i] = op.beta1 * state->m[i] + (1 - op.beta1) * g;
    state->v[i] = op.beta2 * state->v[i] + (1 - op.beta2) * g * g;
    const double mean = state->m[i] / (1 - std::pow(op.beta1, step)),
                 square = state->v[i] / (1 - std::pow(op.beta2, step));
    state->w[i] -= tensor.lr * mean / (std::sqrt(square) + op.eps);
  }
}

void check_case(const std::vector<int64_t>& sizes, const Types& types) {
  AdamW op{.beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .grad_scale = 0.5};
  std::vector<State> states;
  for (size_t i = 0; i < sizes.size(); ++i) {
    const Shape shape{sizes[i]};
    op.tensors.push_back({.w = random_tensor(shape, types.w, 10 + i),
                          .grad = Tensor::empty(shape, types.grad),
                          .m = Tensor::zeros(shape, types.moment),
                          .v = Tensor::zeros(shape, types.moment),
                          .lr = 1e-2 * static_cast<double>(i + 1),
                          .weight_decay = i % 2 == 0 ? 0.1 : 0.0});
    const size_t count = static_cast<size_t>(sizes[i]);
    states.push_back({to_doubles(op.tensors[i].w), std::vector<double>(count, 0.0), std::vector<double>(count, 0.0)});
  }
  for (op.step = 1; op.step <= 3; ++op.step) {
    for (size_t i = 0; i < sizes.size(); ++i) {
      op.tensors[i].grad.copy_from(random_tensor({sizes[i]}, types.grad, 100 * static_cast<uint64_t>(op.step) + i));
      oracle_step(&states[i], to_doubles(op.tensors[i].grad), op, op.tensors[i]);
    }
    run(op);
  }
  for (size_t i = 0; i < sizes.size(); ++i) {
    // Three steps, each rounding w once to its type and the moments a few times to theirs.
    const double moment = 16 * testing::unit_roundoff(types.moment);
    EXPECT_TRUE(testing::close(op.tensors[i].m, states[i].m, moment));
    EXPECT_TRUE(testing::close(op.tensors[i].v, states[i].v, moment));
    EXPECT_TRUE(testing::close(op.tensors[i].w, states[i].w, 3 * testing::unit_roundoff(types.w) + moment));
  }
}

void check_cases() {
  for (const auto& sizes : cases::adamw) {
    for (const Types& types : kTypes) {
      if (types.w == DType::kF64 && default_device() != DeviceKind::kCpu) continue;
      SCOPED_TRACE(::testing::Message() << sizes.size() << " tensors " << name_of(types.w) << " "
                                        << name_of(types.grad));
      check_case(sizes, types);
    }
  }
}

TEST(AdamW, MatchesTheEquation) { testing::on_each_device<AdamW>(check_cases); }

// The first step moves every weight by lr against the sign of its gradient, whatever its size.
void check_first_step() {
  const Tensor w = Tensor::from<float>({1, 1, 1, 1}, {4}), grad = Tensor::from<float>({1e-3f, -1e3f, 5, 0}, {4});
  const Tensor m = Tensor::zeros({4}, DType::kF32), v = Tensor::zeros({4}, DType::kF32);
  run(AdamW{.tensors = {{.w = w, .grad = grad, .m = m, .v = v, .lr = 0.1}}, .step = 1});
  EXPECT_TRUE(testing::close(w, {0.9, 1.1, 0.9, 1}, 1e-5));
}

TEST(AdamW, FirstStepIsTheSign) { testing::on_each_device<AdamW>(check_first_step); }

void check_grouping() {
  const Tensor grad = random_tensor({50001}, DType::kF32, 1);
  const auto step = [&](bool together) {
    const Tensor w = random_tensor({50001}, DType::kF32, 2), m = Tensor::zeros({50001}, DType::kF32), v = m.clone();
    AdamW all{.tensors = {}, .step = 1};
    for (const auto& [begin, end] : std::vector<std::pair<int64_t, int64_t>>{{0, 7}, {7, 40000}, {40000, 50001}}) {
      const AdamWTensor part{.w = w.slice(begin, end),
                             .grad = grad.slice(begin, end),
                             .m = m.slice(begin, end),
                             .v = v.slice(begin, end),
                             .lr = 0.01,
                             .weight_decay = 0.1};
      all.tensors.push_back(part);
      if (!together) run(AdamW{.tensors = {part}, .step = 1});
    }
    if (together) run(all);
    return w;
  };
  EXPECT_TRUE(testing::same_on_any_threads([&] { return step(true); }));
  EXPECT_TRUE(testing::bits_equal(step(true), step(false)));
}

TEST(AdamW, IsTheSameOnAnyThreadsAndHoweverTensorsAreGrouped) { testing::on_each_device<AdamW>(check_grouping); }

TEST(AdamW, RefusesWrongArguments) {
  const Tensor w = Tensor::zeros({3}, DType::kF32), wrong = Tensor::zeros({3}, DType::kBF16);
  EXPECT_THROW(run(AdamW{.tensors = {{.w = w, .grad = wrong, .m = w, .v = w}}}), Error);
  EXPECT_THROW(run(AdamW{.tensors = {{.w = w, .grad = w, .m = wrong, .v = w}}}), Error);
  EXPECT_THROW(run(AdamW{.tensors = {{.w = w, .grad = w, .m = w, .v = w}}, .step = 0}), Error);
}

void check_norm() {
  for (const auto& sizes : cases::adamw) {
    for (const DType dtype : testing::floating_dtypes()) {
      std::vector<Tensor> gradients = {Tensor()};
      double squares = 0;
      for (const int64_t size : sizes) {
        gradients.push_back(random_tensor({size}, dtype, static_cast<uint64_t>(size)));
        for (const double g : to_doubles(gradients.back())) squares += g * g;
      }
      EXPECT_NEAR(gradient_norm(gradients), std::sqrt(squares), 1e-13 * std::sqrt(squares));
    }
  }
}

TEST(GradientNorm, MatchesTheEquation) { testing::on_each_device<GradientNorm>(check_norm); }

void check_extreme_norms() {
  EXPECT_NEAR(gradient_norm({Tensor::from<float>({3e30f, 4e30f}, {2})}), 5e30, 1e24);
  EXPECT_TRUE(std::isnan(gradient_norm({Tensor::from<float>({1, std::numeric_limits<float>::quiet_NaN()}, {2})})));
  EXPECT_EQ(gradient_norm({}), 0);
}

TEST(GradientNorm, SurvivesWhatF32WouldOverflowAndShowsNaN) {
  testing::on_each_device<GradientNorm>(check_extreme_norms);
}

void check_norm_of_threads() {
  const std::vector<Tensor> gradients = {random_tensor({100003}, DType::kF32, 3), random_tensor({5}, DType::kF32, 4)};
  EXPECT_TRUE(testing::same_on_any_threads([&] { return Tensor::from<double>({gradient_norm(gradients)}, {1}); }));
}

TEST(GradientNorm, IsTheSameOnAnyThreads) { testing::on_each_device<GradientNorm>(check_norm_of_threads); }

}  // namespace
}  // namespace lightmoe
