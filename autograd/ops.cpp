#include "autograd/ops.h"

#include "kernels/elementwise.h"
#include "kernels/embedding.h"
#include "kernels/rms_norm.h"
#include "kernels/router_dispatch.h"
#include "kernels/swiglu.h"

namespace lightmoe {
namespace {

Tensor empty_like(const Tensor& t) { return Tensor::empty(t.shape(), t.dtype(), t.device()); }
Saved saved_if(bool needed, const Var& x) { return needed ? Saved(x) : Saved(); }
Tensor grad_of(const ParameterPtr& w) { return w->trainable ? w->ensure_grad() : Tensor(); }

}  // namespace

DType activation_dtype(DType weight) { return weight == DType::kF64 ? DType::kF64 : DType::kF32; }

Var embedding(Tape& tape, const Tensor& ids, const ParameterPtr& table) {
  const Tensor& w = table->value;
  const Var y = Tape::output(Tensor::empty({ids.dim(0), w.dim(1)}, activation_dtype(w.dtype())), table->trainable);
  run(Embedding{.ids = ids, .table = w, .y = y.value});
  tape.record(y, [ids, table](const Tensor& dy) {
    run(EmbeddingBackward{.ids = ids, .dy = dy, .dtable = table->ensure_grad()});
  });
  return y;
}

Var rms_norm(Tape& tape, const Var& x, const ParameterPtr& w, double eps) {
  return add_rms_norm(tape, x, {}, w, eps).y;
}

Normed add_rms_norm(Tape& tape, const Var& x, const Var& branch, const ParameterPtr& w, double eps) {
  const bool adds = branch.value.defined();
  Normed out{.sum = Tape::output(adds ? branch.value : x.value, x.needs_grad() || branch.needs_grad()), .y = {}};
  out.y = Tape::output(empty_like(x.value), out.sum.needs_grad() || w->trainable);
  if (!adds) out.sum.rebuild = x.rebuild;
  const bool keep = tape.wants(out.y);
  const Tensor rstd = keep ? Tensor::empty({x.value.dim(0)}, x.value.dtype()) : Tensor();
  run(RmsNorm{.x = x.value,
              .w = w->value,
              .eps = eps,
              .y = out.y.value,
              .rstd = rstd,
              .residual = branch.value,
              .sum = adds ? out.sum.value : Tensor()});
  if (!keep) return out;
  out.y.rebuild = std::make_shared<Rebuild>([sum = Saved(out.sum), w, eps] {
    const Tensor sum_value = sum.get(), again = empty_like(sum_value);
    run(RmsNorm{.x = sum_value, .w = w->value, .eps = eps, .y = again});
    return again;
  });
  tape.record([sum = Saved(out.sum), dsum_slot = out.sum.grad, dy_slot = out.y.grad, dx = x.grad, dbranch = branch.grad,
               w, rstd] {
    const Tensor dy = dy_slot->take(), dsum = dsum_slot != nullptr ? dsum_slot->take() : Tensor();
    Tensor d = dsum;
    if (dy.defined()) {
      d = empty_like(dy);
      run(RmsNormBackward{
          .x = sum.get(), .w = w->value, .rstd = rstd, .dy = dy, .dx = d, .dw = grad_of(w), .dsum = dsum});
    }
    if (!d.defined()) return;
    const bool alone = dy.defined() && (dx == nullptr || dbranch == nullptr);
    for (const GradPtr& slot : {dx, dbranch}) {
      if (slot != nullptr) alone ? slot->add(d) : slot->share(d);
    }
  });
  return out;
}

Var linear(Tape& tape, const Var& x, const ParameterPtr& w, GemmCompute compute) {
  const Tensor y_value = Tensor::empty({x.value.dim(0), w->value.dim(0)}, x.value.dtype());
  const Var y = Tape::output(y_value, x.needs_grad() || w->trainable);
  run(Gemm{.a = x.value, .b = w->value, .c = y.value, .trans_b = true, .compute = compute});
  tape.record(y, [x = saved_if(w->trainable, x), dx = x.grad, w, compute](const Tensor& dy) {
    if (w->trainable) {
      const double beta = w->grad_beta();
      run(Gemm{.a = dy, .b = x.get(), .c = w->grad, .trans_a = true, .beta = beta, .compute = compute});
    }
    if (dx) {
      bool accumulate = false;
      const Tensor target = dx->target({dy.dim(0), w->value.dim(1)}, dy.dtype(), &accumulate);
      run(Gemm{.a = dy, .b = w->value, .c = target, .beta = accumulate ? 1.0 : 0.0, .compute = compute});
    }
  });
  return y;
}

Var clamp(Tape& tape, const Var& x, double limit) {
  Var y = Tape::output(empty_like(x.value), x.needs_grad());
  run(Clamp{.limit = limit, .x = x.value, .y = y.value});
  if (!tape.wants(y)) return y;
  y.rebuild = std::make_shared<Rebuild>([x = Saved(x), limit] {
    const Tensor x_value = x.get(), again = empty_like(x_value);
    run(Clamp{.limit = limit, .x = x_value, .y = again});
    return again;
  });
  tape.record(y, [x = Saved(x), dx = x.grad, limit](const Tensor& dy) {
    const Tensor fresh = empty_like(dy);
    run(ClampBackward{.limit = limit, .x = x.get(), .dy = dy, .dx = fresh});
    dx->add(fresh);
  });
  return y;
}

Var swiglu(Tape& tape, const Var& h) {
  const Var a = Tape::output(Tensor::empty({h.value.dim(0), h.value.dim(1) / 2}, h.value.dtype()), h.needs_grad());
  run(SwiGlu{.h = h.value, .a = a.value});
  tape.record(a, [h_value = h.value, dh = h.grad](const Tensor& da) {
    const Tensor fresh = empty_like(h_value);
    run(SwiGluBackward{.h = h_value, .da = da, .dh = fresh});
    dh->add(fresh);
  });
  return a;
}

namespace {

// One of the two as it goes through qk_norm_rope.
struct NormedRows {
  Saved x;
  GradPtr dx, dy;
  ParameterPtr w;
  Tensor rstd;
};

}  // namespace

QueriesKeys qk_norm_rope(Tape& tape, const QueriesKeys& x, const QkNorm& norm, const HeadTurns& turns) {
  QueriesKeys y;
  std::vector<NormedRows> kept;
  QkNormRope op{.turns = turns, .eps = norm.eps, .limit = norm.limit};
  const auto add = [&](const Var& in, const ParameterPtr& w, Var& out, QkNormRope::Rows& rows) {
    const bool needs = in.needs_grad() || w->trainable, keep = tape.recording() && needs;
    out = Tape::output(keep ? empty_like(in.value) : in.value, needs);
    rows = {.x = in.value, .w = w->value, .y = out.value, .rstd = {}};
    if (!keep) return;
    rows.rstd = Tensor::empty({in.value.dim(0)}, in.value.dtype());
    kept.push_back({Saved(in), in.grad, out.grad, w, rows.rstd});
    out.rebuild = std::make_shared<Rebuild>([in = Saved(in), w, turns, eps = norm.eps, limit = norm.limit] {
      const Tensor value = in.get(), again = empty_like(value);
      run(QkNormRope{.q = {.x = value, .w = w->value, .y = again, .rstd = {}},
                     .k = {},
                     .turns = turns,
                     .eps = eps,
                     .limit = limit});
      return again;
    });
  };
  add(x.q, norm.q, y.q, op.q);
  if (x.k.value.defined()) add(x.k, norm.k, y.k, op.k);
  run(op);
  if (kept.empty()) return y;
  tape.record([kept = std::move(kept), turns, limit = norm.limit] {
    QkNormRopeBackward op{.q = {}, .k = {}, .turns = turns, .limit = limit};
    std::vector<std::pair<GradPtr, Tensor>> fresh_gradients;
    for (const NormedRows& one : kept) {
      const Tensor dy = one.dy->take();
      if (!dy.defined()) continue;
      const Tensor fresh = empty_like(dy);
      auto& rows = op.q.x.defined() ? op.k : op.q;
      rows = {.x = one.x.get(), .w = one.w->value, .rstd = one.rstd, .dy = dy, .dx = fresh, .dw = grad_of(one.w)};
      if (one.dx) fresh_gradients.emplace_back(one.dx, fresh);
    }
    if (op.q.x.defined()) run(op);
    for (const auto& [slot, fresh] : fresh_gradients) slot->add(fresh);
  });
  return y;
}

Var add_in_place(Tape& tape, const Var& x, const Var& branch) {
  const Var y = Tape::output(branch.value, x.needs_grad() || branch.needs_grad());
  run(Add{.a = x.value, .b = branch.value, .y = y.value});
  tape.record(y, [dx = x.grad, dbranch = branch.grad](const Tensor& dy) {
    if (dx) dx->share(dy);
    if (dbranch) dbranch->share(dy);
  });
  return y;
}

Var attention(Tape& tape, const Var& q, const Var& k, const Var& v, const AttentionSequences& sequences,
              int64_t head_dim) {
  const Var out = Tape::output(empty_like(q.value), q.needs_grad() || k.needs_grad() || v.needs_grad());
  const bool keep = tape.wants(out);
  const int64_t heads = q.value.dim(1) / head_dim;
  const Tensor lse = keep ? Tensor::empty({heads, q.value.dim(0)}, q.value.dtype()) : Tensor();
  run(Attention{.q = q.value,
                .k = k.value,
                .v = v.value,
                .sequences = sequences,
                .head_dim = head_dim,
                .out = out.value,
                .lse = lse});
  if (!keep) return out;
  struct Input {
    Saved value;
    GradPtr grad;
  };
  const Input inputs[] = {{Saved(q), q.grad}, {Saved(k), k.grad}, {Saved(v), v.grad}};
  tape.record(out, [q = inputs[0], k = inputs[1], v = inputs[2], out = out.value, lse, sequences,
                    head_dim](const Tensor& dout) {
    AttentionBackward op{.q = q.value.get(),
                         .k = k.value.get(),
                         .v = v.value.get(),
                         .out = out,
                         .lse = lse,
                         .dout = dout,
                         .sequences = sequences,
                         .head_dim = head_dim};
    op.dq = empty_like(op.q), op.dk = empty_like(op.k), op.dv = empty_like(op.v);
    run(op);
    if (q.grad) q.grad->add(op.dq);
    if (k.grad) k.grad->add(op.dk);
    if (v.grad) v.grad->add(op.dv);
  });
  return out;
}

Routing router(Tape& tape, const Var& x, const ParameterPtr& w, const Tensor& removed, int64_t top_k, bool renormalize,
               const DispatchGroups* groups) {
  const int64_t tokens = x.value.dim(0), slots = w->value.dim(0);
  const DType dtype = x.value.dtype();
  const bool needs = x.needs_grad() || w->trainable;
  Routing r{.slots = Tensor::empty({tokens, top_k}, DType::kI32),
            .logits = Tensor::empty({tokens, slots}, dtype),
            .probs = Tape::output(Tensor::empty({tokens, slots}, dtype), needs),
            .gates = Tape::output(Tensor::empty({tokens, top_k}, dtype), needs),
            .plan = {}};
  const Router op{.x = x.value,
                  .w = w->value,
                  .removed = removed,
                  .top_k = top_k,
                  .renormalize = renormalize,
                  .logits = r.logits,
                  .probs = r.probs.value,
                  .slots = r.slots,
                  .gates = r.gates.value};
  if (groups != nullptr) {
    r.plan = run_router_dispatch(op, groups->group_of_slot, groups->num_groups);
  } else {
    run(op);
  }
  if (!tape.wants(r.gates)) return r;
  tape.record([x = Saved(x), dx = x.grad, w, probs = r.probs, gates = r.gates, slots = r.slots, renormalize] {
    RouterBackward op{.x = x.get(),
                      .w = w->value,
                      .probs = probs.value,
                      .slots = slots,
                      .gates = gates.value,
                      .dgates = gates.grad->take(),
                      .dprobs = probs.grad->take(),
                      .renormalize = renormalize};
    if (!op.dgates.defined() && !op.dprobs.defined()) return;
    if (dx) op.dx = dx->target(op.x.shape(), op.x.dtype(), &op.accumulate_dx);
    op.dw = grad_of(w);
    run(op);
  });
  return r;
}

}  // namespace lightmoe
