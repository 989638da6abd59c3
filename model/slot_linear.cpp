#include "model/slot_linear.h"

#include "runtime/parallel.h"

namespace lightmoe {
namespace {

struct Sizes {
  int64_t choices, top_k, hidden, rows, slots;  // rows: N
};

template <class T>
void forward(const Sizes& n, const Tensor& x, const Tensor& slots, const Tensor& w, const Tensor& b, const Tensor& y) {
  parallel_for(0, n.choices, 16, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      const int32_t slot = slots.data<int32_t>()[c];
      if (slot >= n.slots) continue;
      const T* in = x.data<T>() + c / n.top_k * n.hidden;
      for (int64_t i = 0; i < n.rows; ++i) {
        const T* row = w.data<T>() + (slot * n.rows + i) * n.hidden;
        T sum = b.defined() ? b.data<T>()[slot * n.rows + i] : T(0);
        for (int64_t j = 0; j < n.hidden; ++j) sum += row[j] * in[j];
        y.data<T>()[c * n.rows + i] = sum;
      }
    }
  });
}

// f(choice, slot, i): every output that is not 0 for want of a slot.
template <class F>
void visit(const Sizes& n, const Tensor& slots, F&& f) {
  for (int64_t c = 0; c < n.choices; ++c) {
    const int32_t slot = slots.data<int32_t>()[c];
    for (int64_t i = 0; slot < n.slots && i < n.rows; ++i) f(c, slot * n.rows + i, c * n.rows + i);
  }
}

template <class T>
void backward(const Sizes& n, const Tensor& x, const Tensor& slots, const Tensor& w, const Tensor& dy, const Tensor& dx,
              const Tensor& dw, const Tensor& db) {
  visit(n, slots, [&](int64_t c, int64_t row, int64_t at) {
    const T d = dy.data<T>()[at];
    const int64_t token = c / n.top_k * n.hidden;
    for (int64_t j = 0; dx.defined() && j < n.hidden; ++j)
      dx.data<T>()[token + j] += d * w.data<T>()[row * n.hidden + j];
    for (int64_t j = 0; dw.defined() && j < n.hidden; ++j)
      dw.data<T>()[row * n.hidden + j] += d * x.data<T>()[token + j];
    if (db.defined()) db.data<T>()[row] += d;
  });
}

Tensor as(const Tensor& t, DType dtype) { return t.dtype() == dtype ? t : t.to(dtype); }

}  // namespace

Var slot_linear(Tape& tape, const Var& x, const Tensor& slots, const ParameterPtr& w, const ParameterPtr& b,
                int64_t num_slots) {
  const DType dtype = x.value.dtype();
  const Sizes n{.choices = slots.numel(),
                .top_k = slots.dim(1),
                .hidden = x.value.dim(1),
                .rows = w->value.dim(0) / num_slots,
                .slots = num_slots};
  const Tensor weights = as(w->value, dtype), bias = b != nullptr ? as(b->value, dtype) : Tensor();
  const bool trains = w->trainable || (b != nullptr && b->trainable);
  const Var y = Tape::output(Tensor::zeros({n.choices, n.rows}, dtype), x.needs_grad() || trains);
  dtype == DType::kF64 ? forward<double>(n, x.value, slots, weights, bias, y.value)
                       : forward<float>(n, x.value, slots, weights, bias, y.value);
  tape.record(y, [=, x = Saved(x), dx = x.grad](const Tensor& dy) {
    const Tensor in = x.get(), d = dx ? Tensor::zeros(in.shape(), dtype) : Tensor();
    const Tensor dw = w->trainable ? w->ensure_grad() : Tensor();
    const Tensor db = b != nullptr && b->trainable ? b->ensure_grad() : Tensor();
    dtype == DType::kF64 ? backward<double>(n, in, slots, weights, dy, d, dw, db)
                         : backward<float>(n, in, slots, weights, dy, d, dw, db);
    if (dx) dx->add(d);
  });
  return y;
}

}  // namespace lightmoe
