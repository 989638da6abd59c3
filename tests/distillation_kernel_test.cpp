// The op of kernels/distillation.h on every device, against an oracle in double.

#include "kernels/distillation.h"

#include "tests/cases/distillation.h"
#include "tests/support/devices.h"

namespace lightmoe {
namespace {

using testing::Guarded;
using testing::random_tensor;
using testing::to_doubles;

constexpr int32_t kIgnored = -100;

// Every fourth row is ignored.
Tensor some_labels(int64_t rows, int64_t vocabulary) {
  Philox random(4, 9);
  std::vector<int32_t> labels;
  for (int64_t t = 0; t < rows; ++t)
    labels.push_back(t % 4 == 2 ? kIgnored : static_cast<int32_t>(random.below(static_cast<uint64_t>(vocabulary))));
  return Tensor::from(labels, {rows});
}

std::vector<double> logits_of(const std::vector<double>& x, const std::vector<double>& w, size_t row, size_t width) {
  std::vector<double> logits(w.size() / width, 0);
  for (size_t j = 0; j < logits.size(); ++j) {
    for (size_t i = 0; i < width; ++i) logits[j] += x[row * width + i] * w[j * width + i];
  }
  return logits;
}

std::vector<double> log_softmax(std::vector<double> z, double temperature) {
  double top = -INFINITY, sum = 0;
  for (double& v : z) v /= temperature, top = std::max(top, v);
  for (const double v : z) sum += std::exp(v - top);
  for (double& v : z) v -= top + std::log(sum);
  return z;
}

struct Oracle {
  double ce = 0, kl = 0;
  std::vector<double> dx;
  explicit Oracle(const LmHeadDistillation& op) {
    const std::vector<double> x = to_doubles(op.x), w = to_doubles(op.w), teacher = to_doubles(op.teacher),
                              teacher_w = to_doubles(op.teacher_w), labels = to_doubles(op.labels);
    const auto d = static_cast<size_t>(op.x.dim(1)), teacher_d = static_cast<size_t>(op.teacher.dim(1));
    dx.assign(x.size(), 0);
    for (size_t t = 0; t < labels.size(); ++t) {
      if (labels[t] == kIgnored) continue;
      const auto label = static_cast<size_t>(labels[t]);
      const std::vector<double> z = logits_of(x, w, t, d);
      const std::vector<double> hard = log_softmax(z, 1), soft = log_softmax(z, op.temperature),
                                q = log_softmax(logits_of(teacher, teacher_w, t, teacher_d), op.temperature);
      ce -= hard[label];
      for (size_t j = 0; j < z.size(); ++j) {
        kl += std::exp(q[j]) * (q[j] - soft[j]);
        const double g = (1 - op.weight) * (std::exp(hard[j]) - (j == label ? 1 : 0)) +
                         op.weight * op.temperature * (std::exp(soft[j]) - std::exp(q[j]));
        for (size_t i = 0; i < d; ++i) dx[t * d + i] += op.scale * g * w[j * d + i];
      }
    }
  }
};

void check_case(const cases::DistillationCase& c, DType dtype, DType w_dtype) {
  SCOPED_TRACE(::testing::Message() << name_of(dtype) << name_of(w_dtype) << " " << c.rows << "x" << c.width << "x"
                                    << c.vocabulary << " chunk " << c.chunk_rows);
  const DType compute = dtype == DType::kF64 ? DType::kF64 : DType::kF32;
  const Guarded losses({2}, DType::kF64), dx({c.rows, c.width}, dtype);
  LmHeadDistillation op{.x = random_tensor({c.rows, c.width}, dtype, 1),
                        .w = random_tensor({c.vocabulary, c.width}, w_dtype, 2, 0.5),
                        .teacher = random_tensor({c.rows, c.teacher_width}, dtype, 3),
                        .teacher_w = random_tensor({c.vocabulary, c.teacher_width}, w_dtype, 4, 0.5),
                        .labels = some_labels(c.rows, c.vocabulary),
                        .weight = c.weight,
                        .temperature = c.temperature,
                        .scale = .25,
                        .chunk_rows = c.chunk_rows,
                        .losses = losses.tensor(),
                        .dx = dx.tensor()};
  run(op);
  const Oracle oracle(op);
  // As in tests/cross_entropy_test.cpp, of logits that the temperature makes larger or smaller; two softmaxes meet in the divergence, whose
  // terms are up to twice the largest logit.
  const double size =
      (std::sqrt(static_cast<double>(std::max(c.width, c.teacher_width))) + 1) * std::max(1.0, 1 / c.temperature);
  const double tolerance =
      2 * size *
      (testing::sum_tolerance(compute, std::max(c.width, c.teacher_width)) + 4 * testing::unit_roundoff(compute));
  const double rows = static_cast<double>(c.rows);
  EXPECT_TRUE(testing::close(losses.tensor(), {oracle.ce, oracle.kl}, tolerance, rows * size * tolerance));
  const double gradient = op.scale * (1 + c.weight * c.temperature);
  EXPECT_TRUE(testing::close(dx.tensor(), oracle.dx, testing::sum_tolerance(dtype, c.vocabulary) + tolerance,
                             gradient * tolerance));
  const Tensor alone = Tensor::empty({2}, DType::kF64);
  op.losses = alone, op.dx = {};
  run(op);
  EXPECT_TRUE(testing::bits_equal(alone, losses.tensor()));
}

void check_cases() {
  size_t turn = 0;
  for (const auto& c : cases::distillation) {
    if (testing::is_run_now(turn, 3)) check_case(c, DType::kF32, DType::kF32);
    if (testing::is_run_now(turn + 1, 3)) check_case(c, DType::kF32, DType::kBF16);
    if (testing::is_run_now(turn + 2, 3)) check_case(c, DType::kBF16, DType::kBF16);
    if (default_device() == DeviceKind::kCpu) check_case(c, DType::kF64, DType::kF64);
    ++turn;
  }
}

TEST(LmHeadDistillation, MatchesTheEquation) { testing::on_each_device<LmHeadDistillation>(check_cases); }

// Logits of +-30,000, of which the softmax is sure: the divergence is the difference of the logits, over T.
void check_large_logits() {
  const Tensor x = Tensor::from<float>({300}, {1, 1}), w = Tensor::from<float>({100, -100}, {2, 1}),
               teacher = Tensor::from<float>({-300}, {1, 1}), labels = Tensor::from<int32_t>({0}, {1}),
               losses = Tensor::empty({2}, DType::kF64), dx = Tensor::empty({1, 1}, DType::kF32);
  run(LmHeadDistillation{.x = x,
                         .w = w,
                         .teacher = teacher,
                         .teacher_w = w,
                         .labels = labels,
                         .weight = 1,
                         .temperature = 2,
                         .losses = losses,
                         .dx = dx});
  EXPECT_TRUE(testing::close(losses, {0, 30000}, 1e-12));
  EXPECT_TRUE(testing::close(dx, {2 * (100. + 100.)}, 1e-6));
}

TEST(LmHeadDistillation, LargeLogitsStayFinite) { testing::on_each_device<LmHeadDistillation>(check_large_logits); }

TEST(LmHeadDistillation, RefusesWhatDoesNotFit) {
  const Tensor x = Tensor::zeros({1, 2}, DType::kF32), w = Tensor::zeros({3, 2}, DType::kF32);
  LmHeadDistillation op{.x = x,
                        .w = w,
                        .teacher = x,
                        .teacher_w = w,
                        .labels = Tensor::from<int32_t>({3}, {1}),
                        .losses = Tensor::zeros({2}, DType::kF64),
                        .dx = {}};
  EXPECT_THROW(run(op), Error);
  op.labels = Tensor::from<int32_t>({2}, {1});
  run(op);
  op.teacher_w = Tensor::zeros({4, 2}, DType::kF32);
  EXPECT_THROW(run(op), Error);
}

}  // namespace
}  // namespace lightmoe
