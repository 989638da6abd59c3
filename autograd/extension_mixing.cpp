// The ops of extension_ops.h that mix blocks and rows.

#include "autograd/extension_ops.h"
#include "kernels/combine.h"
#include "kernels/contraction.h"
#include "kernels/masked_mean.h"

namespace lightmoe {

Var scale_blocks(Tape& tape, const Var& x, const Var& w) {
  const int64_t rows = x.value.dim(0), n = w.value.dim(1), r = x.value.dim(1) / n;
  require(w.value.dim(0) == rows && n * r == x.value.dim(1), "scale_blocks: {} by {}", x.value.shape(),
          w.value.shape());
  const auto blocks = [=](const Tensor& t) { return StridedView{t, {n * r, r, 1}}; };
  const auto scaled = [=, w = w.value](const Tensor& v) {
    const Tensor y = Tensor::empty(v.shape(), v.dtype());
    run(Contraction{.shape = {rows, n, r}, .a = blocks(v), .b = {w, {n, 1, 0}}, .y = blocks(y)});
    return y;
  };
  const Var y = Tape::output(scaled(x.value), x.needs_grad() || w.needs_grad());
  tape.record(y, [=, x = x.value, like = w.value, dx = x.grad, dw = w.grad](const Tensor& dy) {
    if (dx) dx->add(scaled(dy));
    if (!dw) return;
    const Tensor d = Tensor::empty(like.shape(), like.dtype());
    run(Contraction{.shape = {rows, n, 1},
                    .terms = r,
                    .a = {dy, {n * r, r, 0}, 1},
                    .b = {x, {n * r, r, 0}, 1},
                    .y = {d, {n, 1, 0}}});
    dw->add(d);
  });
  return y;
}

Var mix_blocks(Tape& tape, const Var& x, const Var& w, int64_t n) {
  const int64_t rows = x.value.dim(0), r = x.value.dim(1) / n, parts = w.value.dim(1) / n;
  require(w.value.dim(0) == rows && n * r == x.value.dim(1) && parts * n == w.value.dim(1),
          "mix_blocks: {} blocks of {} by {}", n, x.value.shape(), w.value.shape());
  const Var y = Tape::output(Tensor::empty({rows, parts * r}, x.value.dtype()), x.needs_grad() || w.needs_grad());
  run(Contraction{.shape = {rows, parts, r},
                  .terms = n,
                  .a = {x.value, {n * r, 0, 1}, r},
                  .b = {w.value, {parts * n, n, 0}, 1},
                  .y = {y.value, {parts * r, r, 1}}});
  tape.record(y, [=, x = x.value, w = w.value, dx = x.grad, dw = w.grad](const Tensor& dy) {
    if (dx) {
      const Tensor d = Tensor::empty(x.shape(), x.dtype());
      run(Contraction{.shape = {rows, n, r},
                      .terms = parts,
                      .a = {dy, {parts * r, 0, 1}, r},
                      .b = {w, {parts * n, 1, 0}, n},
                      .y = {d, {n * r, r, 1}}});
      dx->add(d);
    }
    if (!dw) return;
    const Tensor d = Tensor::empty(w.shape(), w.dtype());
    run(Contraction{.shape = {rows, parts, n},
                    .terms = r,
                    .a = {dy, {parts * r, r, 0}, 1},
                    .b = {x, {n * r, 0, r}, 1},
                    .y = {d, {parts * n, n, 1}}});
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
        run(Contraction{.shape = {rows, 1, r}, .a = {xv, {n * r, 0, 1}, 0, i * r}, .b = {}, .y = {block, {r, 0, 1}}});
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
  const Var y = Tape::output(Tensor::empty({rows, wide}, x.value.dtype()), x.needs_grad() || c.needs_grad());
  const StridedView tiles{y.value, {wide, n, 1}};
  run(Contraction{.shape = {rows, parts, n}, .a = {c.value, {0, n, 1}}, .b = {}, .y = tiles});
  run(Contraction{.shape = {rows, parts, n}, .a = {x.value, {n, 0, 1}}, .b = {}, .y = tiles, .accumulate = true});
  tape.record(y, [=, x = x.value, c = c.value, dx = x.grad, dc = c.grad](const Tensor& dy) {
    if (dx) {
      const Tensor d = Tensor::empty(x.shape(), x.dtype());
      run(Contraction{.shape = {rows, 1, n}, .terms = parts, .a = {dy, {wide, 0, 1}, n}, .b = {}, .y = {d, {n, 0, 1}}});
      dx->add(d);
    }
    if (!dc) return;
    const Tensor d = Tensor::empty(c.shape(), c.dtype());
    run(Contraction{.shape = {1, 1, wide}, .terms = rows, .a = {dy, {0, 0, 1}, wide}, .b = {}, .y = {d, {0, 0, 1}}});
    dc->add(d);
  });
  return y;
}

namespace {

Tensor counting(int64_t count, int64_t step) {  // i / step
  std::vector<int32_t> values(static_cast<size_t>(count));
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<int32_t>(static_cast<int64_t>(i) / step);
  return Tensor::from(values, {count});
}

// Rows of x [..,N] by index.
Tensor rows_of(const Tensor& x, const Tensor& index) {
  const Tensor y = Tensor::empty({index.numel(), x.dim(1)}, x.dtype());
  run(ExpandPairs{.x = x, .pair_visit = index, .y = y});
  return y;
}

}  // namespace

Var mix_rows(Tape& tape, const Var& table, const Tensor& index, const Var& w) {
  const int64_t rows = index.dim(0), k = index.dim(1), entries = table.value.dim(0), n = table.value.dim(1);
  require(w.value.shape() == index.shape(), "mix_rows: weights {}, index {}", w.value.shape(), index.shape());
  // Index E is a row of zeros behind the table.
  const Tensor known = Tensor::zeros({entries + 1, n}, table.value.dtype());
  known.slice(0, entries).copy_from(table.value);
  const Var y = Tape::output(Tensor::empty({rows, n}, table.value.dtype()), table.needs_grad() || w.needs_grad());
  run(Combine{.x = known, .index = index, .scales = w.value, .y = y.value});
  tape.record(y, [=, w = w.value, dtable = table.grad, dw = w.grad](const Tensor& dy) {
    if (dtable) {
      const Tensor d = Tensor::empty(known.shape(), known.dtype());
      run(GatedSum{.a = rows_of(dy, counting(rows * k, k)),
                   .gates = w,
                   .pair_index = counting(rows * k, 1),
                   .pair_visit = index.reshape({rows * k}),
                   .s = d});
      dtable->add(d.slice(0, entries));
    }
    if (!dw) return;
    const Tensor d = Tensor::empty(w.shape(), dy.dtype());
    run(Contraction{.shape = {rows, k, 1},
                    .terms = n,
                    .a = {rows_of(known, index.reshape({rows * k})), {k * n, n, 0}, 1},
                    .b = {dy, {n, 0, 0}, 1},
                    .y = {d, {k, 1, 0}}});
    dw->add(d.dtype() == w.dtype() ? d : d.to(w.dtype()));
  });
  return y;
}

Loss openness_loss(Tape& tape, const std::vector<Var>& g, const Tensor& mask, double scale) {
  MaskedMean op{.x = {}, .mask = mask, .scale = scale, .loss = Tensor::empty({1}, DType::kF64), .dx = {}};
  for (const Var& v : g) {
    op.x.push_back(v.value);
    op.dx.push_back(tape.recording() && v.needs_grad() ? Tensor::empty(v.value.shape(), v.value.dtype()) : Tensor());
  }
  run(op);
  tape.record([slots = g, gradients = op.dx] {
    for (size_t l = 0; l < slots.size(); ++l) {
      if (gradients[l].defined()) slots[l].grad->add(gradients[l]);
    }
  });
  return {op.loss};
}

}  // namespace lightmoe
