#include "autograd/extension_ops.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <numeric>
#include <vector>

#include "kernels/elementwise.h"
#include "runtime/parallel.h"

namespace lightmoe {
namespace {

// f(T*) for the tensor's type.
template <class F>
void typed(const Tensor& t, F&& f) {
  if (t.dtype() == DType::kF64) return f(static_cast<double*>(nullptr));
  f(static_cast<float*>(nullptr));
}

// An op whose output has gradient dy: forward(T*) fills y, backward(T*, dy) adds to the inputs' slots.
template <class Forward>
Var made(const Shape& shape, DType dtype, bool needs, Forward&& forward) {
  const Var y = Tape::output(Tensor::empty(shape, dtype), needs);
  typed(y.value, [&](auto* type) { forward(type, y.value); });
  return y;
}

template <class T>
T* row(const Tensor& t, int64_t i) {
  return t.data<T>() + i * t.dim(1);
}

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

template <class F>
Tensor elementwise(const Tensor& like, F&& f) {
  const Tensor y = Tensor::empty(like.shape(), like.dtype());
  typed(like, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    parallel_for(0, like.numel(), 1 << 12, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) y.data<T>()[i] = static_cast<T>(f(i, type));
    });
  });
  return y;
}

template <class T>
double at(const Tensor& t, int64_t i, T*) {
  return static_cast<double>(t.data<T>()[i]);
}

Tensor product_of(const Tensor& a, const Tensor& b) {
  return elementwise(a, [&](int64_t i, auto* type) { return at(a, i, type) * at(b, i, type); });
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

Var scale_blocks(Tape& tape, const Var& x, const Var& w) {
  const int64_t rows = x.value.dim(0), n = w.value.dim(1), r = x.value.dim(1) / n;
  require(w.value.dim(0) == rows && n * r == x.value.dim(1), "scale_blocks: {} by {}", x.value.shape(),
          w.value.shape());
  const auto scaled = [=, w = w.value](const Tensor& v) {
    return elementwise(v, [&](int64_t i, auto* t) { return at(w, i / r, t) * at(v, i, t); });
  };
  const Var y = Tape::output(scaled(x.value), x.needs_grad() || w.needs_grad());
  tape.record(y, [=, x = x.value, like = w.value, dx = x.grad, dw = w.grad](const Tensor& dy) {
    if (dx) dx->add(scaled(dy));
    if (!dw) return;
    dw->add(elementwise(like, [&](int64_t i, auto* t) {
      double sum = 0;
      for (int64_t j = i * r; j < (i + 1) * r; ++j) sum += at(dy, j, t) * at(x, j, t);
      return sum;
    }));
  });
  return y;
}

Var mix_blocks(Tape& tape, const Var& x, const Var& w, int64_t n) {
  const int64_t rows = x.value.dim(0), r = x.value.dim(1) / n, parts = w.value.dim(1) / n;
  require(w.value.dim(0) == rows && n * r == x.value.dim(1) && parts * n == w.value.dim(1),
          "mix_blocks: {} blocks of {} by {}", n, x.value.shape(), w.value.shape());
  const Var y = Tape::output(Tensor::zeros({rows, parts * r}, x.value.dtype()), x.needs_grad() || w.needs_grad());
  // f(weights, block, mixed): pointers of one token's weight, block of x and block of y.
  const auto visit = [=](const Tensor& wv, const Tensor& xv, const Tensor& yv, auto&& f) {
    typed(xv, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      for (int64_t t = 0; t < rows; ++t) {
        for (int64_t p = 0; p < parts; ++p) {
          for (int64_t i = 0; i < n; ++i) f(row<T>(wv, t) + p * n + i, row<T>(xv, t) + i * r, row<T>(yv, t) + p * r);
        }
      }
    });
  };
  visit(w.value, x.value, y.value, [r](auto* weight, auto* block, auto* mixed) {
    for (int64_t j = 0; j < r; ++j) mixed[j] += *weight * block[j];
  });
  tape.record(y, [=, wv = w.value, xv = x.value, dx = x.grad, dw = w.grad](const Tensor& dy) {
    if (dx) {
      const Tensor d = Tensor::zeros(xv.shape(), xv.dtype());
      visit(wv, d, dy, [r](auto* weight, auto* block, auto* mixed) {
        for (int64_t j = 0; j < r; ++j) block[j] += *weight * mixed[j];
      });
      dx->add(d);
    }
    if (!dw) return;
    const Tensor d = Tensor::zeros(wv.shape(), wv.dtype());
    visit(d, xv, dy, [r](auto* weight, auto* block, auto* mixed) {
      for (int64_t j = 0; j < r; ++j) *weight += block[j] * mixed[j];
    });
    dw->add(d);
  });
  return y;
}

Var block_linear(Tape& tape, const Var& x, const ParameterPtr& w, int64_t n, GemmCompute compute) {
  const int64_t rows = x.value.dim(0), r = x.value.dim(1) / n, m = w->value.dim(0) / n;
  require(n * r == x.value.dim(1) && n * m == w->value.dim(0) && w->value.dim(1) == r,
          "block_linear: {} blocks of {} by {}", n, x.value.shape(), w->value.shape());
  const Var y = Tape::output(Tensor::empty({rows, n * m}, x.value.dtype()), x.needs_grad() || w->trainable);
  for (int64_t i = 0; i < n; ++i) {
    run(Gemm{.a = x.value,
             .b = w->value.slice(i * m, (i + 1) * m),
             .c = y.value,
             .trans_b = true,
             .compute = compute,
             .a_column = i * r,
             .c_column = i * m});
  }
  tape.record(y, [=, xv = x.value, dx = x.grad](const Tensor& dy) {
    const double beta = w->trainable ? w->grad_beta() : 0;
    bool accumulate = false;
    const Tensor target = dx ? dx->target(xv.shape(), xv.dtype(), &accumulate) : Tensor();
    for (int64_t i = 0; i < n; ++i) {
      if (w->trainable) {  // dW_i = dY_i^T X_i, one column of blocks at a time
        const Tensor block = Tensor::empty({rows, r}, xv.dtype());
        typed(xv, [&](auto* type) {
          using T = std::remove_pointer_t<decltype(type)>;
          for (int64_t t = 0; t < rows; ++t) std::copy_n(row<T>(xv, t) + i * r, r, row<T>(block, t));
        });
        run(Gemm{.a = dy,
                 .b = block,
                 .c = w->grad.slice(i * m, (i + 1) * m),
                 .trans_a = true,
                 .beta = beta,
                 .compute = compute,
                 .a_column = i * m});
      }
      if (!dx) continue;
      run(Gemm{.a = dy,
               .b = w->value.slice(i * m, (i + 1) * m),
               .c = target,
               .beta = accumulate ? 1.0 : 0.0,
               .compute = compute,
               .a_column = i * m,
               .c_column = i * r});
    }
  });
  return y;
}

Var add_tiled(Tape& tape, const Var& x, const Var& c) {
  const int64_t rows = x.value.dim(0), n = x.value.dim(1), parts = c.value.dim(0), wide = parts * n;
  require(c.value.dim(1) == n, "add_tiled: {} and {}", x.value.shape(), c.value.shape());
  const Tensor like = Tensor::empty({rows, wide}, x.value.dtype());
  const Var y = Tape::output(
      elementwise(like,
                  [&](int64_t i, auto* t) { return at(x.value, i / wide * n + i % n, t) + at(c.value, i % wide, t); }),
      x.needs_grad() || c.needs_grad());
  tape.record(y, [=, xv = x.value, cv = c.value, dx = x.grad, dc = c.grad](const Tensor& dy) {
    if (dx) {
      dx->add(elementwise(xv, [&](int64_t i, auto* t) {
        double sum = 0;
        for (int64_t p = 0; p < parts; ++p) sum += at(dy, i / n * wide + p * n + i % n, t);
        return sum;
      }));
    }
    if (!dc) return;
    dc->add(elementwise(cv, [&](int64_t i, auto* t) {
      double sum = 0;
      for (int64_t row_of = 0; row_of < rows; ++row_of) sum += at(dy, row_of * wide + i, t);
      return sum;
    }));
  });
  return y;
}

Var mix_rows(Tape& tape, const Var& table, const Tensor& index, const Var& w) {
  const int64_t rows = index.dim(0), k = index.dim(1), entries = table.value.dim(0), n = table.value.dim(1);
  require(w.value.shape() == index.shape(), "mix_rows: weights {}, index {}", w.value.shape(), index.shape());
  const Var y = Tape::output(Tensor::zeros({rows, n}, table.value.dtype()), table.needs_grad() || w.needs_grad());
  // f(weight, table row, mixed row) for every entry that is in the table.
  const auto visit = [=](const Tensor& wv, const Tensor& tv, const Tensor& yv, auto&& f) {
    typed(tv, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      for (int64_t i = 0; i < rows * k; ++i) {
        const int32_t at_row = index.data<int32_t>()[i];
        if (at_row >= 0 && at_row < entries) f(wv.data<T>() + i, row<T>(tv, at_row), row<T>(yv, i / k));
      }
    });
  };
  visit(w.value, table.value, y.value, [n](auto* weight, auto* entry, auto* mixed) {
    for (int64_t j = 0; j < n; ++j) mixed[j] += *weight * entry[j];
  });
  tape.record(y, [=, wv = w.value, tv = table.value, dtable = table.grad, dw = w.grad](const Tensor& dy) {
    if (dtable) {
      const Tensor d = Tensor::zeros(tv.shape(), tv.dtype());
      visit(wv, d, dy, [n](auto* weight, auto* entry, auto* mixed) {
        for (int64_t j = 0; j < n; ++j) entry[j] += *weight * mixed[j];
      });
      dtable->add(d);
    }
    if (!dw) return;
    const Tensor d = Tensor::zeros(wv.shape(), wv.dtype());
    visit(d, tv, dy, [n](auto* weight, auto* entry, auto* mixed) {
      for (int64_t j = 0; j < n; ++j) *weight += entry[j] * mixed[j];
    });
    dw->add(d);
  });
  return y;
}

namespace {

// 1 / (tensors * counted elements) where the mask counts the row, else 0.
Tensor shares_of_mean(const Tensor& g, const Tensor& mask, size_t tensors) {
  const int64_t rows = g.dim(0), n = g.dim(1), choices = mask.defined() ? rows / mask.numel() : rows;
  const auto counts = [&](int64_t r) { return !mask.defined() || mask.data<uint8_t>()[r / choices] != 0; };
  int64_t counted = 0;
  for (int64_t r = 0; r < rows; ++r) counted += counts(r) ? n : 0;
  const double share = counted > 0 ? 1 / (static_cast<double>(counted) * static_cast<double>(tensors)) : 0;
  return elementwise(g, [&](int64_t i, auto*) { return counts(i / n) ? share : 0.0; });
}

}  // namespace

double openness_loss(Tape& tape, const std::vector<Var>& g, const Tensor& mask, double scale) {
  double mean = 0;
  for (const Var& v : g) {
    const Tensor shares = shares_of_mean(v.value, mask, g.size()), parts = product_of(v.value, shares);
    typed(parts, [&](auto* type) {
      for (int64_t i = 0; i < parts.numel(); ++i) mean += at(parts, i, type);
    });
    if (!v.needs_grad()) continue;
    tape.record([shares, scale, slot = v.grad] {
      slot->add(elementwise(shares, [&](int64_t i, auto* type) { return scale * at(shares, i, type); }));
    });
  }
  return mean;
}

}  // namespace lightmoe
