#include "kernels/contraction.h"

#include "tests/support/devices.h"

namespace lightmoe {
namespace {

using testing::Guarded;
using testing::random_tensor;
using testing::to_doubles;

size_t place(const StridedView& v, int64_t i, int64_t j, int64_t k, int64_t r) {
  return static_cast<size_t>(v.begin + i * v.stride[0] + j * v.stride[1] + k * v.stride[2] + r * v.step);
}

// Against the same sums in double; other elements of y stay as they were.
void check(Contraction op) {
  const DType dtype = op.y.tensor.dtype();
  SCOPED_TRACE(::testing::Message() << name_of(dtype) << " " << op.shape[0] << "x" << op.shape[1] << "x" << op.shape[2]
                                    << ", " << op.terms << " terms" << (op.accumulate ? ", accumulated" : ""));
  std::vector<double> expected = to_doubles(op.y.tensor);
  const std::vector<double> a = to_doubles(op.a.tensor), b = op.b.tensor.defined() ? to_doubles(op.b.tensor) : a;
  double largest = 0;
  for (int64_t i = 0; i < op.shape[0]; ++i) {
    for (int64_t j = 0; j < op.shape[1]; ++j) {
      for (int64_t k = 0; k < op.shape[2]; ++k) {
        double sum = 0, size = 0;
        for (int64_t r = 0; r < op.terms; ++r) {
          const double term = a[place(op.a, i, j, k, r)] * (op.b.tensor.defined() ? b[place(op.b, i, j, k, r)] : 1);
          sum += term, size += std::abs(term);
        }
        double& y = expected[place(op.y, i, j, k, 0)];
        y = op.accumulate ? y + sum : sum;
        largest = std::max(largest, size);
      }
    }
  }
  run(op);
  // Sums in double, rounded once.
  EXPECT_TRUE(testing::close(op.y.tensor, expected, 2 * testing::unit_roundoff(dtype), 1e-14 * largest));
}

// y[t,p,j] += sum_i w[t,p,i] x[t,i,j] into columns of something wider: blocks mixed (kernels/contraction.h has no narrower case).
void check_mixture(DType dtype, int64_t tokens, int64_t parts, int64_t blocks, int64_t width, bool accumulate) {
  const Guarded memory({tokens, parts * width + 5}, dtype);
  memory.tensor().copy_from(random_tensor(memory.tensor().shape(), dtype, 3));
  const int64_t wide = memory.tensor().dim(1);
  check({.shape = {tokens, parts, width},
         .terms = blocks,
         .a = {random_tensor({tokens, blocks * width}, dtype, 1), {blocks * width, 0, 1}, width},
         .b = {random_tensor({tokens, parts * blocks}, dtype, 2), {parts * blocks, blocks, 0}, 1},
         .y = {memory.tensor(), {wide, width, 1}, 0, 2},
         .accumulate = accumulate});
}

void check_cases() {
  for (const DType dtype : testing::floating_dtypes()) {
    for (const bool accumulate : {false, true}) {
      check_mixture(dtype, 3, 2, 4, 5, accumulate);
      check_mixture(dtype, 1, 1, 1, 1, accumulate);
      check_mixture(dtype, 7, 3, 1, 33, accumulate);
      check_mixture(dtype, 2, 1, 700, 2, accumulate);  // a block for an output
    }
    // A copy of columns, and a sum over rows, without a second operand.
    const Tensor x = random_tensor({600, 6}, dtype, 4);
    check({.shape = {600, 1, 3}, .a = {x, {6, 0, 1}, 0, 2}, .b = {}, .y = {Tensor::zeros({600, 3}, dtype), {3, 0, 1}}});
    check({.shape = {1, 1, 6},
           .terms = 600,
           .a = {x, {0, 0, 1}, 6},
           .b = {},
           .y = {Tensor::zeros({6}, dtype), {0, 0, 1}}});
    const Tensor none = random_tensor({2, 3}, dtype, 5);
    check({.shape = {2, 1, 3}, .terms = 0, .a = {x, {6, 0, 1}}, .b = {}, .y = {none, {3, 0, 1}}});  // an empty sum is 0
    check({.shape = {0, 1, 3}, .a = {x, {6, 0, 1}}, .b = {}, .y = {none, {3, 0, 1}}});
  }
}

TEST(Contraction, MatchesTheEquation) { testing::on_each_device<Contraction>(check_cases); }

TEST(Contraction, RefusesWhatLiesOutside) {
  const Tensor x = Tensor::zeros({2, 3}, DType::kF32), y = Tensor::zeros({2, 3}, DType::kF32);
  const Contraction good{.shape = {2, 1, 3}, .a = {x, {3, 0, 1}}, .b = {}, .y = {y, {3, 0, 1}}};
  run(good);
  Contraction bad = good;
  bad.a.begin = 1;
  EXPECT_THROW(run(bad), Error);
  bad = good, bad.terms = 2, bad.a.step = 6;
  EXPECT_THROW(run(bad), Error);
  bad = good, bad.y.stride[0] = 4;
  EXPECT_THROW(run(bad), Error);
  bad = good, bad.y.tensor = Tensor::zeros({2, 3}, DType::kF64);
  EXPECT_THROW(run(bad), Error);
}

}  // namespace
}  // namespace lightmoe
