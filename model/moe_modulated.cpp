#include "model/moe_modulated.h"

#include <algorithm>

#include "kernels/combine.h"
#include "kernels/contraction.h"
#include "kernels/dispatch_plan.h"
#include "kernels/indexing.h"
#include "kernels/swiglu.h"

namespace lightmoe {
namespace {

class ModulatedRun {
 public:
  ModulatedRun(const MoeLayer& layer, const Tensor& slots, GemmCompute compute) : compute_(compute) {
    std::vector<int32_t> expert_of_slot;
    for (const Slot& slot : layer.slots) {
      expert_of_slot.push_back(slot.kind == SlotKind::kRemoved ? -1 : slot.expert);
    }
    expert_of_slot.push_back(-1);
    for (const Expert& expert : layer.experts) gate_up_.push_back(expert.gate_up), down_.push_back(expert.down);
    plan_ = make_dispatch_plan(slots, expert_of_slot, static_cast<int64_t>(layer.experts.size()));
    width_ = down_.front()->value.dim(1);
  }

  const DispatchPlan& plan() const { return plan_; }
  int64_t width() const { return width_; }

  // h and a of every pair.
  void activate(const Tensor& x_gate, const Tensor& x_up) {
    h_ = pair_rows(2 * width_, x_gate.dtype()), a_ = pair_rows(width_, x_gate.dtype());
    product(x_gate, plan_.pair_token, half(0), true, h_, {});
    product(x_up, plan_.pair_token, half(1), true, h_, {.c = width_});
    run(SwiGlu{.h = h_, .a = a_});
  }
  const Tensor& a() const { return a_; }

  // y, with m of every pair and block [P,B] (undefined: 1).
  Tensor forward(const Tensor& m, const Tensor& gates, int64_t tokens, int64_t hidden) {
    m_ = m, gates_ = gates;
    const Tensor rows = pair_rows(hidden, a_.dtype()), y = Tensor::empty({tokens, hidden}, a_.dtype());
    product(scaled(a_), {}, matrices(down_), true, rows, {});
    run(Combine{.x = rows, .index = plan_.index_pair, .scales = gates_, .y = y});
    return y;
  }

  struct Gradients {
    Tensor gates, m;      // [T,K]; of every pair and block [P,B]
    Tensor x_gate, x_up;  // [T,D]
  };
  Gradients backward(const Tensor& x_gate, const Tensor& x_up, const Tensor& dy, bool wants_x) {
    Gradients g{.gates = Tensor::zeros(gates_.shape(), gates_.dtype()), .m = {}, .x_gate = {}, .x_up = {}};
    const Tensor ds = pair_rows(width_, dy.dtype()), da = pair_rows(width_, dy.dtype());
    product(dy, plan_.pair_token, matrices(down_), false, ds, {});
    const Tensor ma = scaled(a_);
    run(GatedSumBackward{.a = ma,
                         .ds = ds,
                         .gates = gates_,
                         .pair_index = plan_.pair_index,
                         .pair_visit = identity(),
                         .da = da,
                         .dgates = g.gates});
    weight_gradient(down_, kWhole, {.a = dy, .a_rows = plan_.pair_token, .b = gated(ma)});
    if (m_.defined()) g.m = block_sums(da, a_);
    const Tensor dh = Tensor::empty(h_.shape(), h_.dtype());
    run(SwiGluBackward{.h = h_, .da = scaled(da), .dh = dh});
    weight_gradient(gate_up_, kGate, {.a = dh, .b = x_gate, .b_rows = plan_.pair_token});
    weight_gradient(gate_up_, kUp, {.a = dh, .b = x_up, .b_rows = plan_.pair_token, .a_column = width_});
    if (!wants_x) return g;
    g.x_gate = input_gradient(dh, 0, dy), g.x_up = input_gradient(dh, 1, dy);
    return g;
  }

 private:
  struct Columns {
    int64_t a = 0, c = 0;
  };
  enum Rows : int64_t { kGate = 0, kUp = 1, kWhole };  // of a parameter
  Tensor pair_rows(int64_t width, DType dtype) const { return Tensor::empty({plan_.num_pairs, width}, dtype); }
  static std::vector<Tensor> matrices(const std::vector<ParameterPtr>& parameters) {
    std::vector<Tensor> all;
    for (const ParameterPtr& p : parameters) all.push_back(p->value);
    return all;
  }
  std::vector<Tensor> half(int64_t which) const {  // gate rows or up rows
    std::vector<Tensor> all;
    for (const ParameterPtr& p : gate_up_) all.push_back(p->value.slice(which * width_, (which + 1) * width_));
    return all;
  }
  void product(const Tensor& a, const Tensor& a_rows, std::vector<Tensor> b, bool trans_b, const Tensor& c,
               Columns columns) const {
    run(GroupedGemmM{.a = a,
                     .a_rows = a_rows,
                     .offsets = plan_.pair_group_offsets,
                     .b = std::move(b),
                     .c = c,
                     .trans_b = trans_b,
                     .compute = compute_,
                     .a_column = columns.a,
                     .c_column = columns.c});
  }
  int64_t blocks() const { return m_.dim(1); }
  StridedView by_block(const Tensor& a) const { return {a, {width_, width_ / blocks(), 1}}; }
  // a [P,F], each block of units times its multiplier.
  Tensor scaled(const Tensor& a) const {
    if (!m_.defined()) return a;
    const Tensor y = Tensor::empty(a.shape(), a.dtype());
    run(Contraction{.shape = {a.dim(0), blocks(), width_ / blocks()},
                    .a = by_block(a),
                    .b = {m_, {blocks(), 1, 0}},
                    .y = by_block(y)});
    return y;
  }
  // Sums of a * b over the units of a block, [P,B].
  Tensor block_sums(const Tensor& a, const Tensor& b) const {
    const Tensor sums = Tensor::empty(m_.shape(), m_.dtype());
    const int64_t units = width_ / blocks();
    run(Contraction{.shape = {a.dim(0), blocks(), 1},
                    .terms = units,
                    .a = {a, {width_, units, 0}, 1},
                    .b = {b, {width_, units, 0}, 1},
                    .y = {sums, {blocks(), 1, 0}}});
    return sums;
  }
  // Rows times the gate of their pair.
  Tensor gated(const Tensor& a) const {
    const Tensor s = Tensor::empty(a.shape(), a.dtype());
    run(GatedSum{.a = a, .gates = gates_, .pair_index = plan_.pair_index, .pair_visit = identity(), .s = s});
    return s;
  }
  Tensor identity() const {
    std::vector<int32_t> pairs(static_cast<size_t>(plan_.num_pairs));
    for (size_t p = 0; p < pairs.size(); ++p) pairs[p] = static_cast<int32_t>(p);
    return Tensor::from(pairs, {plan_.num_pairs});
  }
  void weight_gradient(const std::vector<ParameterPtr>& parameters, Rows rows, GroupedGemmK op) {
    std::vector<ParameterPtr> trained;
    for (const ParameterPtr& p : parameters) trained.push_back(p->trainable ? p : nullptr);
    if (rows != kUp) beta_ = grad_beta_of(trained);  // up rows follow the gate rows of the same gradients
    op.offsets = plan_.pair_group_offsets, op.compute = compute_, op.beta = beta_;
    for (const ParameterPtr& p : trained) {
      const Tensor grad = p != nullptr ? p->grad : Tensor();
      op.c.push_back(rows == kWhole || p == nullptr ? grad : grad.slice(rows * width_, (rows + 1) * width_));
    }
    if (std::any_of(op.c.begin(), op.c.end(), [](const Tensor& c) { return c.defined(); })) run(op);
  }
  Tensor input_gradient(const Tensor& dh, int64_t which, const Tensor& like) const {
    const Tensor rows = pair_rows(like.dim(1), like.dtype()), dx = Tensor::empty(like.shape(), like.dtype());
    product(dh, {}, half(which), false, rows, {.a = which * width_});
    run(Combine{.x = rows, .index = plan_.index_pair, .y = dx});
    return dx;
  }

  GemmCompute compute_;
  std::vector<ParameterPtr> gate_up_, down_;
  DispatchPlan plan_;
  int64_t width_ = 0;
  Tensor h_, a_, m_, gates_;
  double beta_ = 0;  // of the gradient at hand
};

}  // namespace

Var modulated_experts(Tape& tape, const ModulatedExperts& in, const MoeLayer& layer, GemmCompute compute) {
  const int64_t tokens = in.slots.dim(0), hidden = in.x_gate.value.dim(1);
  const auto pass = std::make_shared<ModulatedRun>(layer, in.slots, compute);
  pass->activate(in.x_gate.value, in.x_up.value);
  const Tensor scale = in.scale.value;
  const bool by_token = scale.defined() && scale.dim(0) == tokens;
  Tensor of_pairs;
  if (scale.defined()) {
    require(pass->width() % scale.dim(1) == 0 && (by_token || scale.dim(0) == in.slots.numel()),
            "modulated_experts: multipliers {}, expected {} or {} rows of a divisor of {}", scale.shape(), tokens,
            in.slots.numel(), pass->width());
    of_pairs = Tensor::empty({pass->plan().num_pairs, scale.dim(1)}, scale.dtype());
    const Tensor& row = by_token ? pass->plan().pair_token : pass->plan().pair_index;
    run(ExpandPairs{.x = scale, .pair_visit = row, .y = of_pairs});
  }
  bool trains = false;
  for (const Expert& e : layer.experts) trains = trains || e.gate_up->trainable || e.down->trainable;
  const bool wants_x = in.x_gate.needs_grad() || in.x_up.needs_grad();
  const Var y = Tape::output(pass->forward(of_pairs, in.gates.value, tokens, hidden),
                             wants_x || in.gates.needs_grad() || in.scale.needs_grad() || trains);
  tape.record(y, [=, x_gate = Saved(in.x_gate), x_up = Saved(in.x_up), d_gate = in.x_gate.grad, d_up = in.x_up.grad,
                  dgates = in.gates.grad, dscale = in.scale.grad](const Tensor& dy) {
    const ModulatedRun::Gradients g = pass->backward(x_gate.get(), x_up.get(), dy, wants_x);
    if (d_gate) d_gate->add(g.x_gate);
    if (d_up) d_up->add(g.x_up);
    if (dgates) dgates->add(g.gates);
    if (!dscale) return;
    const Tensor d = Tensor::zeros(scale.shape(), scale.dtype());
    if (by_token) {
      run(Combine{.x = g.m, .index = pass->plan().index_pair, .y = d});
    } else {
      run(ScatterRows{.x = g.m, .index = pass->plan().pair_index, .y = d});
    }
    dscale->add(d);
  });
  return y;
}

Tensor unit_activations(const MoeLayer& layer, const Tensor& x, const Tensor& slots, GemmCompute compute) {
  ModulatedRun pass(layer, slots, compute);
  pass.activate(x, x);
  const Tensor all = Tensor::zeros({slots.numel(), pass.width()}, x.dtype());
  run(ScatterRows{.x = pass.a(), .index = pass.plan().pair_index, .y = all});
  return all;
}

}  // namespace lightmoe
