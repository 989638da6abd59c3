#include "kernels/combine.h"

#include <limits>

#include "tests/cases/combine.h"
#include "tests/support/devices.h"

namespace lightmoe {
namespace {

using testing::Guarded;
using testing::random_tensor;
using testing::to_doubles;

DType accumulator_type(DType dtype) { return dtype == DType::kF64 ? DType::kF64 : DType::kF32; }

// Pairs name some of the T*K gates, each once and in no order; visits are random, so pairs of one visit are scattered.
struct Pairs {
  std::vector<int32_t> index, visit;
  explicit Pairs(const cases::CombineCase& c) {
    Philox random(static_cast<uint64_t>(c.width));
    for (int64_t i = c.tokens * c.top_k - 1; i >= 0; --i) {
      if (random.below(4) == 0) continue;
      index.push_back(static_cast<int32_t>(i));
      visit.push_back(static_cast<int32_t>(random.below(static_cast<uint64_t>(c.visits))));
    }
  }
  int64_t count() const { return static_cast<int64_t>(index.size()); }
  Tensor index_tensor() const { return Tensor::from(index, {count()}); }
  Tensor visit_tensor() const { return Tensor::from(visit, {count()}); }
};

struct Inputs {
  Pairs pairs;
  Tensor a, gates, ds;
  Inputs(const cases::CombineCase& c, DType dtype)
      : pairs(c),
        a(random_tensor({pairs.count(), c.width}, dtype, 1)),
        gates(random_tensor({c.tokens, c.top_k}, accumulator_type(dtype), 2)),
        ds(random_tensor({c.visits, c.width}, dtype, 3)) {}
};

void check_sums(const cases::CombineCase& c, DType dtype) {
  const Inputs in(c, dtype);
  const std::vector<double> as = to_doubles(in.a), gs = to_doubles(in.gates);
  const size_t width = static_cast<size_t>(c.width);
  std::vector<double> gated(static_cast<size_t>(c.visits) * width, 0.0), plain(gated);
  for (size_t p = 0; p < in.pairs.index.size(); ++p) {
    for (size_t i = 0; i < width; ++i) {
      const size_t to = static_cast<size_t>(in.pairs.visit[p]) * width + i;
      gated[to] += gs[static_cast<size_t>(in.pairs.index[p])] * as[p * width + i];
      plain[to] += as[p * width + i];
    }
  }
  const double tolerance = testing::sum_tolerance(dtype, in.pairs.count());
  const Guarded s({c.visits, c.width}, dtype), y({c.visits, c.width}, dtype),
      expanded({in.pairs.count(), c.width}, dtype);
  run(GatedSum{.a = in.a,
               .gates = in.gates,
               .pair_index = in.pairs.index_tensor(),
               .pair_visit = in.pairs.visit_tensor(),
               .s = s.tensor()});
  EXPECT_TRUE(testing::close(s.tensor(), gated, tolerance));
  run(SumPairs{.x = in.a, .pair_visit = in.pairs.visit_tensor(), .y = y.tensor()});
  EXPECT_TRUE(testing::close(y.tensor(), plain, tolerance));
  run(ExpandPairs{.x = in.ds, .pair_visit = in.pairs.visit_tensor(), .y = expanded.tensor()});
  for (int64_t p = 0; p < in.pairs.count(); ++p) {
    const int64_t v = in.pairs.visit[static_cast<size_t>(p)];
    ASSERT_TRUE(testing::bits_equal(expanded.tensor().slice(p, p + 1), in.ds.slice(v, v + 1)));
  }
}

void check_backward(const cases::CombineCase& c, DType dtype, bool accumulate) {
  const Inputs in(c, dtype);
  const Tensor da_before = random_tensor(in.a.shape(), dtype, 4),
               dgates_before = random_tensor(in.gates.shape(), accumulator_type(dtype), 5);
  std::vector<double> da(to_doubles(da_before)), dgates(to_doubles(dgates_before));
  const std::vector<double> as = to_doubles(in.a), gs = to_doubles(in.gates), dss = to_doubles(in.ds);
  const size_t width = static_cast<size_t>(c.width);
  for (size_t p = 0; p < in.pairs.index.size(); ++p) {
    double& dgate = dgates[static_cast<size_t>(in.pairs.index[p])];
    if (!accumulate) dgate = 0;
    for (size_t i = 0; i < width; ++i) {
      const double gradient = dss[static_cast<size_t>(in.pairs.visit[p]) * width + i];
      if (!accumulate) da[p * width + i] = 0;
      da[p * width + i] += gs[static_cast<size_t>(in.pairs.index[p])] * gradient;
      dgate += gradient * as[p * width + i];
    }
  }
  const Guarded da_actual(in.a.shape(), dtype), dgates_actual(in.gates.shape(), accumulator_type(dtype));
  if (accumulate) da_actual.tensor().copy_from(da_before);
  dgates_actual.tensor().copy_from(dgates_before);  // entries that no pair names stay as they are
  run(GatedSumBackward{.a = in.a,
                       .ds = in.ds,
                       .gates = in.gates,
                       .pair_index = in.pairs.index_tensor(),
                       .pair_visit = in.pairs.visit_tensor(),
                       .accumulate_da = accumulate,
                       .accumulate_dgates = accumulate,
                       .da = da_actual.tensor(),
                       .dgates = dgates_actual.tensor()});
  EXPECT_TRUE(testing::close(da_actual.tensor(), da, testing::sum_tolerance(dtype, 2)));
  EXPECT_TRUE(testing::close(dgates_actual.tensor(), dgates, testing::sum_tolerance(accumulator_type(dtype), c.width)));
}

void check_pair_ops() {
  for (const auto& c : cases::combine) {
    for (const DType dtype : testing::floating_dtypes()) {
      SCOPED_TRACE(::testing::Message() << name_of(dtype) << " " << c.tokens << " x " << c.top_k << ", " << c.visits
                                        << " visits x " << c.width);
      check_sums(c, dtype);
      check_backward(c, dtype, false);
      check_backward(c, dtype, true);
    }
  }
}

TEST(Combine, PairOpsMatchTheEquations) {
  testing::on_each_device<GatedSum, GatedSumBackward, SumPairs, ExpandPairs>(check_pair_ops);
}

void check_combine(const cases::CombineCase& c, DType dtype, bool scaled, bool accumulate) {
  const Tensor x = random_tensor({c.visits, c.width}, dtype, 6),
               scales = random_tensor({c.tokens, c.top_k}, accumulator_type(dtype), 7);
  const Tensor before = random_tensor({c.tokens, c.width}, dtype, 8);
  Philox random(9);
  std::vector<int32_t> index;
  for (int64_t i = 0; i < c.tokens * c.top_k; ++i) {
    index.push_back(static_cast<int32_t>(random.below(static_cast<uint64_t>(c.visits) + 1)) - 1);
  }
  std::vector<double> expected = to_doubles(before);
  const std::vector<double> xs = to_doubles(x), ss = to_doubles(scales);
  const size_t width = static_cast<size_t>(c.width), terms = static_cast<size_t>(c.top_k);
  for (size_t i = 0; i < expected.size(); ++i) {
    if (!accumulate) expected[i] = 0;
    for (size_t j = 0; j < terms; ++j) {
      const int32_t row = index[i / width * terms + j];
      if (row < 0) continue;
      expected[i] += (scaled ? ss[i / width * terms + j] : 1) * xs[static_cast<size_t>(row) * width + i % width];
    }
  }
  const Guarded y({c.tokens, c.width}, dtype);
  if (accumulate) y.tensor().copy_from(before);
  run(Combine{.x = x,
              .index = Tensor::from(index, {c.tokens, c.top_k}),
              .scales = scaled ? scales : Tensor(),
              .accumulate = accumulate,
              .y = y.tensor()});
  EXPECT_TRUE(testing::close(y.tensor(), expected, testing::sum_tolerance(dtype, c.top_k + 1)));
}

void check_combines() {
  for (const auto& c : cases::combine) {
    for (const DType dtype : testing::floating_dtypes()) {
      for (const bool scaled : {false, true}) {
        for (const bool accumulate : {false, true}) check_combine(c, dtype, scaled, accumulate);
      }
    }
  }
}

TEST(Combine, MatchesTheEquation) { testing::on_each_device<Combine>(check_combines); }

// A device's plan is as long as it may become: the rows behind its pairs hold -1 and may hold anything else.
TEST(Combine, PairsBehindTheRealOnesAreSkipped) {
  testing::on_each_device<GatedSum, GatedSumBackward, SumPairs, ExpandPairs>([] {
    if (default_device() == DeviceKind::kCpu) return;
    const Shape shape{4, 3}, gates_shape{1, 2};
    const float nan = std::numeric_limits<float>::quiet_NaN();
    const Tensor x = Tensor::from<float>({1, 2, 3, 4, 5, 6, nan, nan, nan, nan, nan, nan}, shape);
    const Tensor gates = Tensor::from<float>({2, 10}, gates_shape),
                 ds = Tensor::from<float>({1, 1, 1, 7, 7, 7}, {2, 3});
    const Tensor index = Tensor::from<int32_t>({1, 0, -1, -1}, {4}), visit = Tensor::from<int32_t>({0, 0, -1, -1}, {4});
    const Tensor every = Tensor::from<int32_t>({0, 1, 2, 3}, {4});
    const Guarded s({2, 3}, DType::kF32), each(shape, DType::kF32), y({2, 3}, DType::kF32);
    run(GatedSum{.a = x, .gates = gates, .pair_index = index, .pair_visit = visit, .s = s.tensor()});
    EXPECT_TRUE(testing::close(s.tensor(), {18, 30, 42, 0, 0, 0}, 0));
    run(GatedSum{.a = x, .gates = gates, .pair_index = index, .pair_visit = every, .s = each.tensor()});
    EXPECT_TRUE(testing::close(each.tensor(), {10, 20, 30, 8, 10, 12, 0, 0, 0, 0, 0, 0}, 0));
    run(SumPairs{.x = x, .pair_visit = visit, .y = y.tensor()});
    EXPECT_TRUE(testing::close(y.tensor(), {5, 7, 9, 0, 0, 0}, 0));
    const Tensor expanded = Tensor::zeros(shape, DType::kF32), da = Tensor::zeros(shape, DType::kF32);
    const Tensor dgates = Tensor::zeros(gates_shape, DType::kF32);
    run(ExpandPairs{.x = ds, .pair_visit = visit, .y = expanded});
    EXPECT_TRUE(testing::close(expanded, {1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0}, 0));
    run(GatedSumBackward{
        .a = x, .ds = ds, .gates = gates, .pair_index = index, .pair_visit = visit, .da = da, .dgates = dgates});
    EXPECT_TRUE(testing::close(da, {10, 10, 10, 2, 2, 2, 0, 0, 0, 0, 0, 0}, 0));
    EXPECT_TRUE(testing::close(dgates, {15, 6}, 0));
  });
}

TEST(Combine, GradientCheckOfGatedSum) {
  const cases::CombineCase c{4, 3, 5, 6};
  const Inputs in(c, DType::kF64);
  const Tensor s = Tensor::empty({c.visits, c.width}, DType::kF64);
  const auto loss = [&] {
    run(GatedSum{.a = in.a,
                 .gates = in.gates,
                 .pair_index = in.pairs.index_tensor(),
                 .pair_visit = in.pairs.visit_tensor(),
                 .s = s});
    double sum = 0;
    for (int64_t i = 0; i < s.numel(); ++i) sum += s.data<double>()[i] * in.ds.data<double>()[i];
    return sum;
  };
  const Tensor da = Tensor::empty(in.a.shape(), DType::kF64), dgates = Tensor::zeros(in.gates.shape(), DType::kF64);
  run(GatedSumBackward{.a = in.a,
                       .ds = in.ds,
                       .gates = in.gates,
                       .pair_index = in.pairs.index_tensor(),
                       .pair_visit = in.pairs.visit_tensor(),
                       .da = da,
                       .dgates = dgates});
  EXPECT_TRUE(testing::gradient_matches(loss, in.a, da));
  EXPECT_TRUE(testing::gradient_matches(loss, in.gates, dgates));
}

TEST(Combine, IsTheSameOnAnyThreads) {
  const cases::CombineCase c{100, 8, 300, 640};
  const Inputs in(c, DType::kF32);
  EXPECT_TRUE(testing::same_on_any_threads([&] {
    const Tensor s = Tensor::empty({c.visits, c.width}, DType::kF32);
    run(GatedSum{.a = in.a,
                 .gates = in.gates,
                 .pair_index = in.pairs.index_tensor(),
                 .pair_visit = in.pairs.visit_tensor(),
                 .s = s});
    return s;
  }));
  EXPECT_TRUE(testing::same_on_any_threads([&] {
    const Tensor dgates = Tensor::zeros(in.gates.shape(), DType::kF32);
    run(GatedSumBackward{.a = in.a,
                         .ds = in.ds,
                         .gates = in.gates,
                         .pair_index = in.pairs.index_tensor(),
                         .pair_visit = in.pairs.visit_tensor(),
                         .dgates = dgates});
    return dgates;
  }));
}

TEST(Combine, RefusesWrongArguments) {
  const Tensor x = Tensor::zeros({3, 4}, DType::kF32), y = Tensor::zeros({2, 4}, DType::kF32);
  const Tensor visits = Tensor::from<int32_t>({0, 2, 1}, {3});
  EXPECT_THROW(run(SumPairs{.x = x, .pair_visit = visits, .y = y}), Error);  // visit 2 of 2
  EXPECT_THROW(run(ExpandPairs{.x = y, .pair_visit = visits, .y = x}), Error);
  EXPECT_THROW(run(Combine{.x = x, .index = Tensor::from<int32_t>({0, 1}, {1, 2}), .y = y}), Error);
}

}  // namespace
}  // namespace lightmoe
