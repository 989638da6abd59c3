#include "tests/support/testing.h"

#include "tests/support/files.h"

#include <cstring>
#include <limits>

#include "runtime/parallel.h"

namespace lightmoe::testing {
namespace {
constexpr int64_t kGuardBytes = 256;
constexpr uint8_t kCanary = 0xA5;
}  // namespace

Tensor random_tensor(const Shape& shape, DType dtype, uint64_t seed, double stddev) {
  Tensor values = Tensor::empty(shape, DType::kF64, DeviceKind::kCpu);
  Philox random(seed, 77);
  for (int64_t i = 0; i < values.numel(); ++i) values.data<double>()[i] = stddev * random.normal();
  return (dtype == DType::kF64 ? values : values.to(dtype)).on(default_device());
}

std::vector<double> to_doubles(const Tensor& tensor) {
  const Tensor t = tensor.on(DeviceKind::kCpu);
  std::vector<double> out(static_cast<size_t>(t.numel()));
  if (out.empty()) return out;
  if (is_floating(t.dtype())) {
    convert(t.raw(), t.dtype(), out.data(), DType::kF64, out.size());
  } else {
    for (size_t i = 0; i < out.size(); ++i) {
      if (t.dtype() == DType::kI32)
        out[i] = t.data<int32_t>()[i];
      else if (t.dtype() == DType::kI64)
        out[i] = static_cast<double>(t.data<int64_t>()[i]);
      else
        out[i] = t.data<uint8_t>()[i];
    }
  }
  return out;
}

Guarded::Guarded(const Shape& shape, DType dtype) {
  const int64_t bytes = shape.numel() * static_cast<int64_t>(size_of(dtype));
  const Tensor host = Tensor::empty({bytes + 2 * kGuardBytes}, DType::kU8, DeviceKind::kCpu);
  uint8_t* start = host.data<uint8_t>();
  std::memset(start, kCanary, static_cast<size_t>(host.bytes()));
  std::memset(start + kGuardBytes, 0xFF, static_cast<size_t>(bytes));  // all ones is a NaN in every floating type
  memory_ = Tensor::empty(host.shape(), DType::kU8);
  memory_.copy_from(host);
  tensor_ = Tensor::borrow(memory_.data<uint8_t>() + kGuardBytes, shape, dtype, memory_.device());
}

Guarded::~Guarded() {
  const Tensor host = memory_.on(DeviceKind::kCpu);
  const int64_t end = kGuardBytes + tensor_.bytes();
  for (int64_t i = 0; i < host.numel(); ++i) {
    const bool inside = i >= kGuardBytes && i < end;
    if (inside || host.data<uint8_t>()[i] == kCanary) continue;
    ADD_FAILURE() << "a kernel wrote " << (i < end ? i - kGuardBytes : i - end) << " bytes outside its output "
                  << tensor_.shape().str();
    return;
  }
}

::testing::AssertionResult close(const Tensor& actual, const std::vector<double>& expected, double relative,
                                 double absolute) {
  const std::vector<double> values = to_doubles(actual);
  if (values.size() != expected.size()) {
    return ::testing::AssertionFailure() << values.size() << " elements, expected " << expected.size();
  }
  double largest = 0;
  for (const double e : expected) {
    if (std::isfinite(e)) largest = std::max(largest, std::abs(e));
  }
  const double bound = absolute + relative * largest;
  double worst = -1;
  size_t where = 0;
  for (size_t i = 0; i < values.size(); ++i) {
    double error = std::abs(values[i] - expected[i]);
    if (values[i] == expected[i] || (std::isnan(values[i]) && std::isnan(expected[i]))) error = 0;
    if (std::isnan(error)) error = std::numeric_limits<double>::infinity();
    if (error > worst) worst = error, where = i;
  }
  if (worst <= bound) return ::testing::AssertionSuccess() << "worst error " << worst << " of bound " << bound;
  return ::testing::AssertionFailure() << "element " << where << " is " << values[where] << ", expected "
                                       << expected[where] << ", error " << worst << " over the bound " << bound;
}

::testing::AssertionResult bits_equal(const Tensor& first, const Tensor& second) {
  const Tensor a = first.on(DeviceKind::kCpu), b = second.on(DeviceKind::kCpu);
  if (!(a.shape() == b.shape()) || a.dtype() != b.dtype()) {
    return ::testing::AssertionFailure() << a.shape().str() << " against " << b.shape().str();
  }
  if (a.bytes() == 0 || std::memcmp(a.raw(), b.raw(), static_cast<size_t>(a.bytes())) == 0) {
    return ::testing::AssertionSuccess();
  }
  const std::vector<double> x = to_doubles(a), y = to_doubles(b);
  for (size_t i = 0; i < x.size(); ++i) {
    if (x[i] != y[i]) {
      return ::testing::AssertionFailure() << "element " << i << ": " << x[i] << " against " << y[i];
    }
  }
  return ::testing::AssertionFailure() << "equal values, different bits";
}

::testing::AssertionResult same_on_any_threads(const std::function<Tensor()>& f) {
  const int threads = num_threads();
  omp_set_num_threads(1);
  const Tensor one = f();
  omp_set_num_threads(3);
  const Tensor three = f();
  omp_set_num_threads(threads);
  return bits_equal(one, three);
}

double unit_roundoff(DType dtype) {
  switch (dtype) {
    case DType::kF64:
      return 0x1p-53;
    case DType::kBF16:
      return 0x1p-8;
    case DType::kF16:
      return 0x1p-11;
    default:
      return 0x1p-24;
  }
}

double sum_tolerance(DType dtype, int64_t terms) {
  const double compute = dtype == DType::kF64 ? 0x1p-53 : 0x1p-24;
  return 8 * compute * std::sqrt(static_cast<double>(terms) + 1) + (dtype == DType::kBF16 ? 0x1p-8 : 0);
}

::testing::AssertionResult gradient_matches(const std::function<double()>& f, const Tensor& x, const Tensor& analytic,
                                            double tolerance) {
  double* values = x.data<double>();
  const double* gradient = analytic.data<double>();
  double largest = 0;
  for (int64_t i = 0; i < x.numel(); ++i) largest = std::max(largest, std::abs(gradient[i]));
  for (int64_t i = 0; i < x.numel(); ++i) {
    const double saved = values[i], h = 1e-5 * std::max(1.0, std::abs(saved));
    values[i] = saved + h;
    const double above = f();
    values[i] = saved - h;
    const double below = f();
    values[i] = saved;
    const double numeric = (above - below) / (2 * h);
    if (!(std::abs(numeric - gradient[i]) <= tolerance * std::max(1.0, largest))) {
      return ::testing::AssertionFailure()
             << "element " << i << ": analytic " << gradient[i] << ", central difference " << numeric;
    }
  }
  return ::testing::AssertionSuccess();
}

// Here, so that the programs of device tests, which read no files, have it too.
::testing::AssertionResult fails_with(ErrorKind kind, const std::vector<std::string>& pieces,
                                      const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& error) {
    const std::string message = error.what();
    if (error.kind() != kind) {
      return ::testing::AssertionFailure()
             << "kind " << error.exit_code() << ", expected " << static_cast<int>(kind) << ": " << message;
    }
    for (const std::string& piece : pieces) {
      if (message.find(piece) == std::string::npos) {
        return ::testing::AssertionFailure() << "\"" << message << "\" does not name \"" << piece << "\"";
      }
    }
    for (const char c : message) {
      if (static_cast<unsigned char>(c) < 0x20)
        return ::testing::AssertionFailure() << "control character in: " << message;
    }
    return ::testing::AssertionSuccess() << message;
  } catch (const std::exception& error) {
    return ::testing::AssertionFailure() << "not an Error: " << error.what();
  }
  return ::testing::AssertionFailure() << "no error";
}

}  // namespace lightmoe::testing
