#include "autograd/extension_ops.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <numeric>
#include <vector>

#include "autograd/extension_loops.h"
#include "kernels/elementwise.h"

namespace lightmoe {

using namespace extension_loops;

namespace {

double value_at(Activation kind, double x) {
  switch (kind) {
    case Activation::kGelu:
      return .5 * x * (1 + std::erf(x * std::numbers::sqrt2 / 2));
    case Activation::kTanh:
      return std::tanh(x);
    case Activation::kSigmoid:
      return 1 / (1 + std::exp(-x));
  }
  return 0;
}

double slope_at(Activation kind, double x) {
  const double y = value_at(kind, x);
  switch (kind) {
    case Activation::kGelu:
      return .5 * (1 + std::erf(x * std::numbers::sqrt2 / 2)) +
             x * std::exp(-x * x / 2) / std::sqrt(2 * std::numbers::pi);
    case Activation::kTanh:
      return 1 - y * y;
    case Activation::kSigmoid:
      return y * (1 - y);
  }
  return 0;
}

}  // namespace

Var parameter_value(Tape& tape, const ParameterPtr& p, DType dtype) {
  const Var y = Tape::output(p->value.dtype() == dtype ? p->value : p->value.to(dtype), p->trainable);
  tape.record(y, [p](const Tensor& dy) { run(Axpy{.alpha = 1, .x = dy, .y = p->ensure_grad()}); });
  return y;
}

Var activate(Tape& tape, const Var& x, Activation kind) {
  const Tensor in = x.value;
  const Var y =
      Tape::output(elementwise(in, [&](int64_t i, auto* t) { return value_at(kind, at(in, i, t)); }), x.needs_grad());
  tape.record(y, [in, dx = x.grad, kind](const Tensor& dy) {
    dx->add(elementwise(in, [&](int64_t i, auto* t) { return slope_at(kind, at(in, i, t)) * at(dy, i, t); }));
  });
  return y;
}

Var multiply(Tape& tape, const Var& a, const Var& b) {
  require(a.value.shape() == b.value.shape(), "multiply: {} and {}", a.value.shape(), b.value.shape());
  const Var y = Tape::output(product_of(a.value, b.value), a.needs_grad() || b.needs_grad());
  tape.record(y, [a = a.value, b = b.value, da = a.grad, db = b.grad](const Tensor& dy) {
    if (da) da->add(product_of(dy, b));
    if (db) db->add(product_of(dy, a));
  });
  return y;
}

Var multiply_scalar(Tape& tape, const Var& x, const Var& s) {
  require(s.value.numel() == 1, "multiply_scalar: s is {}", s.value.shape());
  double factor = 0;
  typed(s.value, [&](auto* t) { factor = at(s.value, 0, t); });
  const auto scaled = [factor](const Tensor& v) {
    return elementwise(v, [&](int64_t i, auto* t) { return factor * at(v, i, t); });
  };
  const Var y = Tape::output(scaled(x.value), x.needs_grad() || s.needs_grad());
  tape.record(y, [scaled, x = x.value, dx = x.grad, ds = s.grad](const Tensor& dy) {
    if (dx) dx->add(scaled(dy));
    if (!ds) return;
    double sum = 0;
    typed(dy, [&](auto* t) {
      for (int64_t i = 0; i < dy.numel(); ++i) sum += at(dy, i, t) * at(x, i, t);
    });
    const Tensor one = Tensor::zeros({1}, dy.dtype());
    ds->add(elementwise(one, [&](int64_t, auto*) { return sum; }));
  });
  return y;
}

Var columns(Tape& tape, const Var& x, int64_t begin, int64_t count) {
  const int64_t rows = x.value.dim(0), width = x.value.dim(1);
  require(begin >= 0 && count >= 1 && begin + count <= width, "columns: {} from {} of {}", count, begin, width);
  const Var y = made({rows, count}, x.value.dtype(), x.needs_grad(), [&](auto* type, const Tensor& out) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int64_t t = 0; t < rows; ++t) std::copy_n(row<T>(x.value, t) + begin, count, row<T>(out, t));
  });
  tape.record(y, [=, dx = x.grad](const Tensor& dy) {
    const Tensor wide = Tensor::zeros({rows, width}, dy.dtype());
    typed(dy, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      for (int64_t t = 0; t < rows; ++t) std::copy_n(row<T>(dy, t), count, row<T>(wide, t) + begin);
    });
    dx->add(wide);
  });
  return y;
}

Var reshaped(Tape& tape, const Var& x, const Shape& shape) {
  const Var y = Tape::output(x.value.reshape(shape), x.needs_grad());
  tape.record(y, [before = x.value.shape(), dx = x.grad](const Tensor& dy) { dx->share(dy.reshape(before)); });
  return y;
}

namespace {

// Which of a row's n values are among its k largest.
template <class T>
std::vector<int32_t> top_columns(const T* z, int64_t n, int64_t k) {
  std::vector<int32_t> order(static_cast<size_t>(n));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [z](int32_t a, int32_t b) { return z[a] > z[b]; });
  order.resize(static_cast<size_t>(k));
  return order;
}

}  // namespace

Var softmax_top(Tape& tape, const Var& z, int64_t k, double scale) {
  const int64_t rows = z.value.dim(0), n = z.value.dim(1);
  require(k >= 1 && k <= n, "softmax_top: {} of {}", k, n);
  const Var y = made(z.value.shape(), z.value.dtype(), z.needs_grad(), [&](auto* type, const Tensor& out) {
    using T = std::remove_pointer_t<decltype(type)>;
    out.fill_zero();
    for (int64_t t = 0; t < rows; ++t) {
      const T* in = row<T>(z.value, t);
      const std::vector<int32_t> top = top_columns(in, n, k);
      double sum = 0;
      for (const int32_t j : top) sum += std::exp(scale * static_cast<double>(in[j] - in[top[0]]));
      for (const int32_t j : top)
        row<T>(out, t)[j] = static_cast<T>(std::exp(scale * static_cast<double>(in[j] - in[top[0]])) / sum);
    }
  });
  tape.record(y, [=, p = y.value, dz = z.grad](const Tensor& dy) {
    const Tensor d = Tensor::empty(dy.shape(), dy.dtype());
    typed(dy, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      for (int64_t t = 0; t < rows; ++t) {
        double mean = 0;
        for (int64_t j = 0; j < n; ++j) mean += double{row<T>(p, t)[j]} * double{row<T>(dy, t)[j]};
        for (int64_t j = 0; j < n; ++j)  // p = 0 outside the k largest: nothing flows there
          row<T>(d, t)[j] = static_cast<T>(scale * double{row<T>(p, t)[j]} * (double{row<T>(dy, t)[j]} - mean));
      }
    });
    dz->add(d);
  });
  return y;
}

Var normalised_rows(Tape& tape, const Var& x) {
  const int64_t rows = x.value.dim(0), n = x.value.dim(1);
  std::vector<double> sums(static_cast<size_t>(rows), 0.0);
  const Var y = made(x.value.shape(), x.value.dtype(), x.needs_grad(), [&](auto* type, const Tensor& out) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int64_t t = 0; t < rows; ++t) {
      double& sum = sums[static_cast<size_t>(t)];
      for (int64_t j = 0; j < n; ++j) sum += double{row<T>(x.value, t)[j]};
      for (int64_t j = 0; j < n; ++j)
        row<T>(out, t)[j] = sum != 0 ? static_cast<T>(double{row<T>(x.value, t)[j]} / sum) : T(0);
    }
  });
  tape.record(y, [=, p = y.value, dx = x.grad](const Tensor& dy) {
    const Tensor d = Tensor::zeros(dy.shape(), dy.dtype());
    typed(dy, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      for (int64_t t = 0; t < rows; ++t) {
        const double sum = sums[static_cast<size_t>(t)];
        double mean = 0;
        for (int64_t j = 0; j < n; ++j) mean += double{row<T>(p, t)[j]} * double{row<T>(dy, t)[j]};
        for (int64_t j = 0; sum != 0 && j < n; ++j)
          row<T>(d, t)[j] = static_cast<T>((double{row<T>(dy, t)[j]} - mean) / sum);
      }
    });
    dx->add(d);
  });
  return y;
}

}  // namespace lightmoe
