// The ops of extension_ops.h that mix blocks and rows.

#include <algorithm>

#include "autograd/extension_loops.h"
#include "autograd/extension_ops.h"

namespace lightmoe {

using namespace extension_loops;

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

namespace {

// y (zeros) = sums of weights w times pieces of x, n elements each, and the backward of that. visit(w, x, y, f) calls f(weight, piece of x,
// piece of y) with pointers for every term.
template <class Visit>
void weighted_sums(Tape& tape, const Var& y, const Var& w, const Var& x, int64_t n, const Visit& visit) {
  visit(w.value, x.value, y.value, [n](auto* weight, auto* piece, auto* sum) {
    for (int64_t j = 0; j < n; ++j) sum[j] += *weight * piece[j];
  });
  tape.record(y, [=, wv = w.value, xv = x.value, dx = x.grad, dw = w.grad](const Tensor& dy) {
    if (dx) {
      const Tensor d = Tensor::zeros(xv.shape(), xv.dtype());
      visit(wv, d, dy, [n](auto* weight, auto* piece, auto* sum) {
        for (int64_t j = 0; j < n; ++j) piece[j] += *weight * sum[j];
      });
      dx->add(d);
    }
    if (!dw) return;
    const Tensor d = Tensor::zeros(wv.shape(), wv.dtype());
    visit(d, xv, dy, [n](auto* weight, auto* piece, auto* sum) {
      for (int64_t j = 0; j < n; ++j) *weight += piece[j] * sum[j];
    });
    dw->add(d);
  });
}

}  // namespace

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
  weighted_sums(tape, y, w, x, r, visit);
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
  weighted_sums(tape, y, w, table, n, visit);
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
