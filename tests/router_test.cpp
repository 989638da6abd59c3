#include "kernels/router.h"

#include <algorithm>
#include <numeric>

#include "tests/cases/router.h"
#include "tests/support/devices.h"

namespace lightmoe {
namespace {

using testing::Guarded;
using testing::random_tensor;
using testing::to_doubles;

DType accumulator_type(DType dtype) { return dtype == DType::kF64 ? DType::kF64 : DType::kF32; }

struct Outputs {
  Guarded logits, probs, slots, gates;
  Outputs(int64_t tokens, int64_t count, int64_t top_k, DType dtype)
      : logits({tokens, count}, dtype),
        probs({tokens, count}, dtype),
        slots({tokens, top_k}, DType::kI32),
        gates({tokens, top_k}, dtype) {}
  Router op(const Tensor& x, const Tensor& w, bool renormalize = false, const Tensor& removed = {}) const {
    return {.x = x,
            .w = w,
            .removed = removed,
            .top_k = slots.tensor().dim(1),
            .renormalize = renormalize,
            .logits = logits.tensor(),
            .probs = probs.tensor(),
            .slots = slots.tensor(),
            .gates = gates.tensor()};
  }
};

std::vector<double> logits_of(const Tensor& x, const Tensor& w) {
  const std::vector<double> xs = to_doubles(x), ws = to_doubles(w);
  const size_t width = static_cast<size_t>(x.dim(1)), count = static_cast<size_t>(w.dim(0));
  std::vector<double> out(static_cast<size_t>(x.dim(0)) * count, 0.0);
  for (size_t i = 0; i < out.size(); ++i) {
    for (size_t d = 0; d < width; ++d) out[i] += xs[i / count * width + d] * ws[i % count * width + d];
  }
  return out;
}

std::vector<double> softmax_of(std::vector<double> rows, size_t count, const std::vector<uint8_t>& removed) {
  for (size_t begin = 0; begin < rows.size(); begin += count) {
    double sum = 0;
    for (size_t e = 0; e < count; ++e) sum += rows[begin + e] = removed[e] ? 0 : std::exp(rows[begin + e]);
    for (size_t e = 0; e < count; ++e) rows[begin + e] /= sum;
  }
  return rows;
}

// The choice is checked against the op's own probabilities, which another test compares with the equation: rounding decides near ties.
void expect_choice(const Outputs& out, bool renormalize, const std::vector<uint8_t>& removed) {
  const Tensor probs = out.probs.tensor(), slots = out.slots.tensor().on(DeviceKind::kCpu);
  const std::vector<double> p = to_doubles(probs), gates = to_doubles(out.gates.tensor());
  const size_t count = static_cast<size_t>(probs.dim(1)), top_k = static_cast<size_t>(slots.dim(1));
  for (size_t t = 0; t < static_cast<size_t>(probs.dim(0)); ++t) {
    std::vector<size_t> order;
    for (size_t e = 0; e < count; ++e) {
      if (!removed[e]) order.push_back(e);
    }
    std::stable_sort(order.begin(), order.end(),
                     [&](size_t a, size_t b) { return p[t * count + a] > p[t * count + b]; });
    double sum = 0;
    for (size_t k = 0; k < top_k; ++k) sum += p[t * count + order[k]];
    for (size_t k = 0; k < top_k; ++k) {
      ASSERT_EQ(slots.data<int32_t>()[t * top_k + k], static_cast<int32_t>(order[k]))
          << "token " << t << " choice " << k;
      const double expected = p[t * count + order[k]] / (renormalize ? sum : 1);
      ASSERT_NEAR(gates[t * top_k + k], expected, renormalize ? 1e-6 * expected : 0);
    }
  }
}

void check_forward(const cases::RouterCase& c, DType dtype, bool renormalize, int64_t num_removed) {
  SCOPED_TRACE(::testing::Message() << name_of(dtype) << " " << c.tokens << "x" << c.width << " top " << c.top_k
                                    << " of " << c.slots << " minus " << num_removed);
  const double spread = 2 / std::sqrt(static_cast<double>(c.width));
  const Tensor x = random_tensor({c.tokens, c.width}, dtype, 1),
               w = random_tensor({c.slots, c.width}, dtype, 2, spread);
  std::vector<uint8_t> removed(static_cast<size_t>(c.slots), 0);
  for (int64_t i = 0; i < num_removed; ++i) removed[static_cast<size_t>(i * 7 % c.slots)] = 1;
  const DType accumulator = accumulator_type(dtype);
  const Outputs out(c.tokens, c.slots, c.top_k, accumulator);
  run(out.op(x, w, renormalize, num_removed > 0 ? Tensor::from(removed, {c.slots}) : Tensor()));
  const std::vector<double> logits = logits_of(x, w);
  const double tolerance = testing::sum_tolerance(accumulator, c.width);
  EXPECT_TRUE(testing::close(out.logits.tensor(), logits, 0, tolerance * 8));
  // An absolute error e of a logit is a relative error e of a probability, and probabilities are at most 1.
  EXPECT_TRUE(
      testing::close(out.probs.tensor(), softmax_of(logits, static_cast<size_t>(c.slots), removed), 0, 16 * tolerance));
  expect_choice(out, renormalize, removed);
}

TEST(Router, MatchesTheEquation) {
  testing::on_each_device<Router>([] {
    for (const auto& c : cases::router) {
      for (const DType dtype : testing::floating_dtypes()) {
        for (const bool renormalize : {false, true}) {
          check_forward(c, dtype, renormalize, 0);
          check_forward(c, dtype, renormalize, (c.slots - c.top_k) / 2);
          check_forward(c, dtype, renormalize, c.slots - c.top_k);
        }
      }
    }
  });
}

std::vector<int32_t> slots_of(const Outputs& out) {
  const Tensor slots = out.slots.tensor().on(DeviceKind::kCpu);
  return {slots.data<int32_t>(), slots.data<int32_t>() + slots.numel()};
}

TEST(Router, TiesGoToTheLowerSlot) {
  testing::on_each_device<Router>([] {
    const Tensor x = Tensor::from<float>({1}, {1, 1}), w = Tensor::from<float>({1, 2, 1, 2, 2, 0}, {6, 1});
    const Outputs out(1, 6, 5, DType::kF32);
    run(out.op(x, w));
    EXPECT_EQ(slots_of(out), (std::vector<int32_t>{1, 3, 4, 0, 2}));
  });
}

// Half of the slots repeat the weights of the other half: every token has only ties, which rounding must not break.
TEST(Router, EqualWeightsAreExactTies) {
  testing::on_each_device<Router>([] {
    const Tensor x = random_tensor({40, 97}, DType::kF32, 21), half = random_tensor({70, 97}, DType::kF32, 22);
    const Tensor w = Tensor::empty({140, 97}, DType::kF32);
    w.slice(0, 70).copy_from(half), w.slice(70, 140).copy_from(half);
    const Outputs out(40, 140, 6, DType::kF32);
    run(out.op(x, w));
    const std::vector<int32_t> slots = slots_of(out);
    for (size_t i = 0; i < slots.size(); i += 2) {
      EXPECT_LT(slots[i], 70);
      EXPECT_EQ(slots[i + 1], slots[i] + 70);
    }
  });
}

// Underflow makes kept slots as improbable as removed ones: the removed must still never be chosen. NaN must not repeat a slot.
TEST(Router, NeverChoosesARemovedSlotOrOneTwice) {
  testing::on_each_device<Router>([] {
    const Tensor x = Tensor::from<float>({1}, {1, 1}), w = Tensor::from<float>({500, 0, -500, 3}, {4, 1});
    const Outputs out(1, 4, 3, DType::kF32);
    run(out.op(x, w, false, Tensor::from<uint8_t>({0, 1, 0, 0}, {4})));
    EXPECT_EQ(slots_of(out), (std::vector<int32_t>{0, 2, 3}));
    EXPECT_EQ(to_doubles(out.probs.tensor())[1], 0);
    EXPECT_EQ(to_doubles(out.logits.tensor())[2], -500);

    run(out.op(x, Tensor::from<float>({std::nanf(""), 0, -500, 3}, {4, 1})));
    std::vector<int32_t> slots = slots_of(out);
    std::sort(slots.begin(), slots.end());
    EXPECT_TRUE(slots[0] >= 0 && slots[0] < slots[1] && slots[1] < slots[2] && slots[2] < 4);
  });
}

void check_rows_alone() {
  const Tensor x = random_tensor({37, 97}, DType::kF32, 3), w = random_tensor({64, 97}, DType::kF32, 4);
  const Outputs all(37, 64, 8, DType::kF32), one(1, 64, 8, DType::kF32);
  run(all.op(x, w));
  for (int64_t t = 0; t < 37; ++t) {
    run(one.op(x.slice(t, t + 1), w));
    EXPECT_TRUE(testing::bits_equal(one.logits.tensor(), all.logits.tensor().slice(t, t + 1)));
    EXPECT_TRUE(testing::bits_equal(one.probs.tensor(), all.probs.tensor().slice(t, t + 1)));
    EXPECT_TRUE(testing::bits_equal(one.slots.tensor(), all.slots.tensor().slice(t, t + 1)));
  }
}

TEST(Router, ARowDoesNotDependOnTheOthers) { testing::on_each_device<Router>(check_rows_alone); }

TEST(Router, TakesWeightsOfAnotherType) {
  testing::on_each_device<Router>([] {
    const Tensor x = random_tensor({5, 40}, DType::kF32, 5), w = random_tensor({6, 40}, DType::kBF16, 6);
    const Tensor w_f32 = w.on(DeviceKind::kCpu).to(DType::kF32).on(default_device());
    const Outputs mixed(5, 6, 2, DType::kF32), same(5, 6, 2, DType::kF32);
    run(mixed.op(x, w));
    run(same.op(x, w_f32));
    EXPECT_TRUE(testing::bits_equal(mixed.logits.tensor(), same.logits.tensor()));
  });
}

// A function of everything the op returns that carries a gradient: sum gates dgates + sum probs dprobs.
struct GradientCase {
  bool renormalize, with_dgates, with_dprobs, with_removed;
};

TEST(Router, GradientCheck) {
  const Tensor x = random_tensor({4, 6}, DType::kF64, 7), w = random_tensor({9, 6}, DType::kF64, 8);
  const Tensor dgates = random_tensor({4, 3}, DType::kF64, 9), dprobs = random_tensor({4, 9}, DType::kF64, 10);
  const Tensor removed = Tensor::from<uint8_t>({0, 0, 1, 0, 0, 0, 1, 0, 0}, {9});
  for (const GradientCase& c : {GradientCase{false, true, true, false}, GradientCase{true, true, true, false},
                                GradientCase{true, true, false, true}, GradientCase{false, false, true, true}}) {
    SCOPED_TRACE(::testing::Message() << c.renormalize << c.with_dgates << c.with_dprobs << c.with_removed);
    const Outputs out(4, 9, 3, DType::kF64);
    const auto loss = [&] {
      run(out.op(x, w, c.renormalize, c.with_removed ? removed : Tensor()));
      double sum = 0;
      for (int64_t i = 0; i < 12 && c.with_dgates; ++i)
        sum += out.gates.tensor().data<double>()[i] * dgates.data<double>()[i];
      for (int64_t i = 0; i < 36 && c.with_dprobs; ++i)
        sum += out.probs.tensor().data<double>()[i] * dprobs.data<double>()[i];
      return sum;
    };
    loss();
    const Tensor dx = Tensor::empty({4, 6}, DType::kF64), dw = Tensor::zeros({9, 6}, DType::kF64);
    run(RouterBackward{.x = x,
                       .w = w,
                       .probs = out.probs.tensor(),
                       .slots = out.slots.tensor(),
                       .gates = out.gates.tensor(),
                       .dgates = c.with_dgates ? dgates : Tensor(),
                       .dprobs = c.with_dprobs ? dprobs : Tensor(),
                       .renormalize = c.renormalize,
                       .dx = dx,
                       .dw = dw});
    EXPECT_TRUE(testing::gradient_matches(loss, x, dx));
    EXPECT_TRUE(testing::gradient_matches(loss, w, dw));
  }
}

// The products of the backward pass at every size and type, against doubles from the op's own probabilities.
void check_backward(const cases::RouterCase& c, DType dtype, bool accumulate) {
  SCOPED_TRACE(::testing::Message() << name_of(dtype) << " " << c.tokens << "x" << c.width << " of " << c.slots << " "
                                    << accumulate);
  const DType accumulator = accumulator_type(dtype);
  const Tensor x = random_tensor({c.tokens, c.width}, dtype, 11), w = random_tensor({c.slots, c.width}, dtype, 12, 0.1);
  const Outputs out(c.tokens, c.slots, c.top_k, accumulator);
  run(out.op(x, w));
  const Tensor dprobs = random_tensor({c.tokens, c.slots}, accumulator, 13);
  const Guarded dx({c.tokens, c.width}, dtype), dw({c.slots, c.width}, accumulator);
  const Tensor dx_before = random_tensor({c.tokens, c.width}, dtype, 14),
               dw_before = random_tensor({c.slots, c.width}, accumulator, 15);
  dw.tensor().copy_from(dw_before);
  if (accumulate) dx.tensor().copy_from(dx_before);
  run(RouterBackward{.x = x,
                     .w = w,
                     .probs = out.probs.tensor(),
                     .dprobs = dprobs,
                     .accumulate_dx = accumulate,
                     .dx = dx.tensor(),
                     .dw = dw.tensor()});
  const std::vector<double> p = to_doubles(out.probs.tensor()), dp = to_doubles(dprobs), xs = to_doubles(x),
                            ws = to_doubles(w);
  std::vector<double> dx_expected = to_doubles(dx_before), dw_expected = to_doubles(dw_before);
  if (!accumulate) std::fill(dx_expected.begin(), dx_expected.end(), 0.0);
  const size_t count = static_cast<size_t>(c.slots), width = static_cast<size_t>(c.width);
  for (size_t t = 0; t < static_cast<size_t>(c.tokens); ++t) {
    double mean = 0;
    for (size_t e = 0; e < count; ++e) mean += p[t * count + e] * dp[t * count + e];
    for (size_t e = 0; e < count; ++e) {
      const double d = p[t * count + e] * (dp[t * count + e] - mean);
      for (size_t i = 0; i < width; ++i) {
        dx_expected[t * width + i] += d * ws[e * width + i];
        dw_expected[e * width + i] += d * xs[t * width + i];
      }
    }
  }
  EXPECT_TRUE(testing::close(dx.tensor(), dx_expected, testing::sum_tolerance(dtype, c.slots), 1e-6));
  EXPECT_TRUE(testing::close(dw.tensor(), dw_expected, testing::sum_tolerance(accumulator, c.tokens), 1e-6));
}

TEST(Router, BackwardMatchesTheEquation) {
  testing::on_each_device<Router, RouterBackward>([] {
    for (const auto& c : cases::router) {
      for (const DType dtype : testing::floating_dtypes()) {
        for (const bool accumulate : {false, true}) check_backward(c, dtype, accumulate);
      }
    }
  });
}

// The gates' part, which the gradient check covers in f64, repeated where there is no f64: against the cpu.
TEST(Router, BackwardThroughTheGatesEqualsTheCpu) {
  testing::on_each_device<Router, RouterBackward>([] {
    for (const bool renormalize : {false, true}) {
      const auto gradients = [&] {
        const Tensor x = random_tensor({1100, 40}, DType::kF32, 23), w = random_tensor({37, 40}, DType::kF32, 24, 0.3);
        const Tensor dgates = random_tensor({1100, 5}, DType::kF32, 25);
        const Outputs out(1100, 37, 5, DType::kF32);
        run(out.op(x, w, renormalize));
        const Tensor both = Tensor::zeros({1137, 40}, DType::kF32);
        run(RouterBackward{.x = x,
                           .w = w,
                           .probs = out.probs.tensor(),
                           .slots = out.slots.tensor(),
                           .dgates = dgates,
                           .renormalize = renormalize,
                           .dx = both.slice(0, 1100),
                           .dw = both.slice(1100, 1137)});
        return both;
      };
      const Tensor here = gradients();
      const DeviceScope cpu(DeviceKind::kCpu);
      EXPECT_TRUE(testing::close(here, to_doubles(gradients()), testing::sum_tolerance(DType::kF32, 1100)));
    }
  });
}

TEST(Router, IsTheSameOnAnyThreads) {
  const Tensor x = random_tensor({701, 97}, DType::kF32, 16), w = random_tensor({31, 97}, DType::kF32, 17);
  const Tensor dprobs = random_tensor({701, 31}, DType::kF32, 18);
  EXPECT_TRUE(testing::same_on_any_threads([&] {
    const Outputs out(701, 31, 4, DType::kF32);
    run(out.op(x, w));
    const Tensor dx_dw = Tensor::zeros({701 + 31, 97}, DType::kF32);
    run(RouterBackward{.x = x,
                       .w = w,
                       .probs = out.probs.tensor(),
                       .dprobs = dprobs,
                       .dx = dx_dw.slice(0, 701),
                       .dw = dx_dw.slice(701, 732)});
    return dx_dw;
  }));
}

TEST(Router, RefusesWrongArguments) {
  const Tensor x = Tensor::zeros({2, 4}, DType::kF32), w = Tensor::zeros({3, 4}, DType::kF32);
  EXPECT_THROW(run(Outputs(2, 3, 4, DType::kF32).op(x, w)), Error);
  EXPECT_THROW(run(Outputs(2, 3, 2, DType::kF32).op(x, w, false, Tensor::from<uint8_t>({1, 1, 0}, {3}))), Error);
  EXPECT_THROW(run(Outputs(2, 4, 2, DType::kF32).op(x, w)), Error);
}

}  // namespace
}  // namespace lightmoe
