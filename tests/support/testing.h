#pragma once
// What every op test needs: random tensors, guarded outputs, comparison that says where and how
// much.

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <string>
#include <vector>

#include "runtime/philox.h"
#include "runtime/tensor.h"

namespace lightmoe::testing {

// Normal values of the given standard deviation, rounded to dtype: read them back with to_doubles
// so that both sides of a comparison see the same numbers. Made on the default device (tests/support/devices.h).
Tensor random_tensor(const Shape& shape, DType dtype, uint64_t seed, double stddev = 1.0);
std::vector<double> to_doubles(const Tensor& t);

// An output with canaries before and after, filled with NaN (floating) or a pattern; check_guards
// fails the test if a canary changed.
class Guarded {
 public:
  Guarded(const Shape& shape, DType dtype);
  ~Guarded();  // checks the canaries
  const Tensor& tensor() const { return tensor_; }

 private:
  Tensor memory_, tensor_;
};

// |actual - expected| <= absolute + relative * max|expected|, no NaN where expected has none;
// reports the worst element.
::testing::AssertionResult close(const Tensor& actual, const std::vector<double>& expected, double relative,
                                 double absolute = 0);
::testing::AssertionResult bits_equal(const Tensor& a, const Tensor& b);

// What f returns with 1 and with 3 threads must have the same bits.
::testing::AssertionResult same_on_any_threads(const std::function<Tensor()>& f);

// Unit round-off of the type an op rounds its result to: 2^-24, 2^-8, 2^-53.
double unit_roundoff(DType dtype);
// Error bound of a sum of `terms` products rounded in the compute type and stored as dtype,
// relative to the largest result: random rounding errors grow like sqrt(terms); the factor 8 covers
// the tail.
double sum_tolerance(DType dtype, int64_t terms);

// Central differences of scalar f in every element of x (f64) against the analytic gradient.
::testing::AssertionResult gradient_matches(const std::function<double()>& f, const Tensor& x, const Tensor& analytic,
                                            double tolerance = 1e-6);

}  // namespace lightmoe::testing
