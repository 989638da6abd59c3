// The distillation loss against a double oracle and central differences.

#include <gtest/gtest.h>

#include <cmath>

#include "autograd/distillation.h"
#include "autograd/gradcheck.h"
#include "runtime/philox.h"
#include "tests/support/files.h"
#include "tests/support/testing.h"

namespace lightmoe {
namespace {

constexpr int64_t kTokens = 5, kHidden = 3, kVocabulary = 7;

Tensor random_tensor(const Shape& shape, uint64_t stream) {
  Philox random(3, stream);
  const Tensor t = Tensor::empty(shape, DType::kF64);
  for (int64_t i = 0; i < t.numel(); ++i) t.data<double>()[i] = random.normal();
  return t;
}

struct Case {
  Tensor teacher = random_tensor({kTokens, kHidden}, 1),
         labels = Tensor::from<int32_t>({2, -100, 6, 0, -100}, {kTokens});
  ParameterPtr head = std::make_shared<Parameter>();
  Case() {
    head->name = "head";
    head->value = random_tensor({kVocabulary, kHidden}, 2);
    head->trainable = false;
  }
};

// log softmax of the head's logits over T, one row.
std::vector<double> log_probs(const Tensor& x, int64_t row, const Tensor& w, double temperature) {
  std::vector<double> z;
  double sum = 0;
  for (int64_t v = 0; v < kVocabulary; ++v) {
    double dot = 0;
    for (int64_t d = 0; d < kHidden; ++d)
      dot += x.data<double>()[row * kHidden + d] * w.data<double>()[v * kHidden + d];
    z.push_back(dot / temperature);
    sum += std::exp(z.back());
  }
  for (double& v : z) v -= std::log(sum);
  return z;
}

TEST(Distillation, ValueAndGradient) {
  const Case c;
  const Var x = Tape::variable(random_tensor({kTokens, kHidden}, 4));
  const Distillation d{.teacher = c.teacher, .weight = .3, .temperature = 2};
  double ce = 0, kl = 0;
  for (const int64_t row : {0, 2, 3}) {
    ce -= log_probs(x.value, row, c.head->value, 1)[static_cast<size_t>(c.labels.data<int32_t>()[row])];
    const std::vector<double> t = log_probs(c.teacher, row, c.head->value, 2),
                              s = log_probs(x.value, row, c.head->value, 2);
    for (size_t v = 0; v < t.size(); ++v) kl += std::exp(t[v]) * (t[v] - s[v]);
  }
  const auto loss = [&](Tape& tape) {
    const DistillationLoss found = distillation_loss(tape, x, c.head, c.labels, d, {.scale = .25});
    EXPECT_GT(found.kl_sum(), 0);
    return .25 * (.7 * found.ce_sum() + .3 * 4 * found.kl_sum());
  };
  Tape tape(false);
  EXPECT_NEAR(loss(tape), .25 * (.7 * ce + .3 * 4 * kl), 1e-13);
  // Central differences with h ~ 1e-5 are good to about 1e-9 of a value of order one.
  const GradCheckReport report = check_gradients(loss, {x}, {});
  EXPECT_LT(report.worst, 1e-7) << report.where;
  EXPECT_EQ(report.checked, kTokens * kHidden);
}

TEST(Distillation, IsNothingTowardsOneself) {
  const Case c;
  const Var x = Tape::variable(c.teacher.clone());
  Tape tape;
  const DistillationLoss loss =
      distillation_loss(tape, x, c.head, c.labels, {.teacher = c.teacher, .weight = 1, .temperature = 1.5}, {});
  EXPECT_NEAR(loss.kl_sum(), 0, 1e-14);
  tape.backward();
  for (int64_t i = 0; i < x.value.numel(); ++i) EXPECT_NEAR(x.grad->value().data<double>()[i], 0, 1e-15);
}

TEST(Distillation, TheTeacherMayHaveAHeadOfItsOwn) {
  const Case c;
  const Var x = Tape::variable(random_tensor({kTokens, kHidden}, 4));
  const Tensor head = random_tensor({kVocabulary, kHidden}, 5);
  double kl = 0;
  for (const int64_t row : {0, 2, 3}) {
    const std::vector<double> t = log_probs(c.teacher, row, head, 2), s = log_probs(x.value, row, c.head->value, 2);
    for (size_t v = 0; v < t.size(); ++v) kl += std::exp(t[v]) * (t[v] - s[v]);
  }
  const Distillation d{.teacher = c.teacher, .head = head, .weight = 1, .temperature = 2};
  const auto loss = [&](Tape& tape) { return 4 * distillation_loss(tape, x, c.head, c.labels, d, {}).kl_sum(); };
  Tape tape(false);
  EXPECT_NEAR(loss(tape), 4 * kl, 1e-13);
  const GradCheckReport report = check_gradients(loss, {x}, {});
  EXPECT_LT(report.worst, 1e-7) << report.where;
}

TEST(Distillation, RefusesAHeadThatTrains) {
  Case c;
  c.head->trainable = true;
  Tape tape;
  const Var x = Tape::variable(c.teacher.clone());
  EXPECT_TRUE(testing::fails_with(ErrorKind::kUsage, {"head trains"},
                                  [&] { distillation_loss(tape, x, c.head, c.labels, {.teacher = c.teacher}, {}); }));
}

}  // namespace
}  // namespace lightmoe
