#include "autograd/extension_ops.h"

#include "kernels/contraction.h"
#include "kernels/elementwise.h"
#include "kernels/softmax_top.h"

namespace lightmoe {
namespace {

// s [1] times every element.
Tensor scaled_by(const Tensor& s, const Tensor& x) {
  const Tensor y = Tensor::empty(x.shape(), x.dtype());
  run(Contraction{.shape = {1, 1, x.numel()}, .a = flat(x), .b = {s}, .y = flat(y)});
  return y;
}

}  // namespace

Var parameter_value(Tape& tape, const ParameterPtr& p, DType dtype) {
  const Var y = Tape::output(p->value.dtype() == dtype ? p->value : p->value.to(dtype), p->trainable);
  tape.record(y, [p](const Tensor& dy) { run(Axpy{.alpha = 1, .x = dy, .y = p->ensure_grad()}); });
  return y;
}

Var activate(Tape& tape, const Var& x, Activation kind) {
  const Var y = Tape::output(Tensor::empty(x.value.shape(), x.value.dtype()), x.needs_grad());
  run(Activate{.kind = kind, .x = x.value, .y = y.value});
  tape.record(y, [in = x.value, dx = x.grad, kind](const Tensor& dy) {
    const Tensor d = Tensor::empty(in.shape(), in.dtype());
    run(ActivateBackward{.kind = kind, .x = in, .dy = dy, .dx = d});
    dx->add(d);
  });
  return y;
}

Var multiply(Tape& tape, const Var& a, const Var& b) {
  require(a.value.shape() == b.value.shape(), "multiply: {} and {}", a.value.shape(), b.value.shape());
  const Var y = Tape::output(elementwise_product(a.value, b.value), a.needs_grad() || b.needs_grad());
  tape.record(y, [a = a.value, b = b.value, da = a.grad, db = b.grad](const Tensor& dy) {
    if (da) da->add(elementwise_product(dy, b));
    if (db) db->add(elementwise_product(dy, a));
  });
  return y;
}

Var multiply_scalar(Tape& tape, const Var& x, const Var& s) {
  require(s.value.numel() == 1, "multiply_scalar: s is {}", s.value.shape());
  const Var y = Tape::output(scaled_by(s.value, x.value), x.needs_grad() || s.needs_grad());
  tape.record(y, [x = x.value, s = s.value, dx = x.grad, ds = s.grad](const Tensor& dy) {
    if (dx) dx->add(scaled_by(s, dy));
    if (!ds) return;
    // Row by row first, so that no one sum is as long as x.
    const int64_t width = x.rank() > 1 ? x.dim(x.rank() - 1) : 1, rows = width > 0 ? x.numel() / width : 0;
    const Tensor sums = Tensor::empty({rows}, x.dtype()), sum = Tensor::empty({1}, x.dtype());
    const std::array<int64_t, 3> by_row = {width, 0, 0};
    run(Contraction{
        .shape = {rows, 1, 1}, .terms = width, .a = {dy, by_row, 1}, .b = {x, by_row, 1}, .y = {sums, {1}}});
    run(Contraction{.terms = rows, .a = {sums, {}, 1}, .b = {}, .y = {sum}});
    ds->add(sum);
  });
  return y;
}

Var columns(Tape& tape, const Var& x, int64_t begin, int64_t count) {
  const int64_t rows = x.value.dim(0), width = x.value.dim(1);
  require(begin >= 0 && count >= 1 && begin + count <= width, "columns: {} from {} of {}", count, begin, width);
  const Var y = Tape::output(Tensor::empty({rows, count}, x.value.dtype()), x.needs_grad());
  const auto part = [=](const Tensor& t) { return StridedView{t, {width, 0, 1}, 0, begin}; };
  const auto whole = [=](const Tensor& t) { return StridedView{t, {count, 0, 1}}; };
  run(Contraction{.shape = {rows, 1, count}, .a = part(x.value), .b = {}, .y = whole(y.value)});
  tape.record(y, [=, dx = x.grad](const Tensor& dy) {
    const Tensor wide = Tensor::zeros({rows, width}, dy.dtype());
    run(Contraction{.shape = {rows, 1, count}, .a = whole(dy), .b = {}, .y = part(wide)});
    dx->add(wide);
  });
  return y;
}

Var reshaped(Tape& tape, const Var& x, const Shape& shape) {
  const Var y = Tape::output(x.value.reshape(shape), x.needs_grad());
  tape.record(y, [before = x.value.shape(), dx = x.grad](const Tensor& dy) { dx->share(dy.reshape(before)); });
  return y;
}

Var softmax_top(Tape& tape, const Var& z, int64_t k, double scale) {
  const Var y = Tape::output(Tensor::empty(z.value.shape(), z.value.dtype()), z.needs_grad());
  run(SoftmaxTop{.z = z.value, .k = k, .scale = scale, .p = y.value});
  tape.record(y, [p = y.value, dz = z.grad, scale](const Tensor& dy) {
    const Tensor d = Tensor::empty(p.shape(), p.dtype());
    run(SoftmaxTopBackward{.p = p, .dp = dy, .scale = scale, .dz = d});
    dz->add(d);
  });
  return y;
}

Var normalised_rows(Tape& tape, const Var& x) {
  const Var y = Tape::output(Tensor::empty(x.value.shape(), x.value.dtype()), x.needs_grad());
  run(ShareOfRow{.x = x.value, .y = y.value});
  tape.record(y, [x = x.value, y = y.value, dx = x.grad](const Tensor& dy) {
    const Tensor d = Tensor::empty(x.shape(), x.dtype());
    run(ShareOfRowBackward{.x = x, .y = y, .dy = dy, .dx = d});
    dx->add(d);
  });
  return y;
}

}  // namespace lightmoe
