#include "model/moe_fused.h"

#include <algorithm>
#include <set>

#include "kernels/adapter_chain.h"
#include "model/moe_op.h"
#include "model/moe_pass.h"
#include "runtime/trace.h"

namespace lightmoe {
namespace {

using Member = ParameterPtr Adapter::*;

DType rows_type(DType x, GemmCompute compute) {
  return x == DType::kF32 && compute == GemmCompute::kBF16 ? DType::kBF16 : x;
}

class MoeFused : private MoePass {
 public:
  MoeFused(const MoeLayer& layer, GemmCompute compute, const Var& x, const Tensor& slots, const Tensor& gates,
           const DispatchPlan* plan);
  Tensor forward(const Tensor& x, bool keep);
  bool reads_x() const { return rank_ > 0 || any_trainable(groups_, ExpertHalf::kGateUp); }
  // dx undefined: x needs no gradient. Returns the gradient of the gates.
  Tensor backward(const Tensor& x, const Tensor& dy, const Tensor& dx, bool accumulate_dx);

 private:
  Tensor as_rows(const Tensor& t) const { return t.dtype() == dtype_ ? t : t.to(dtype_); }
  Tensor pair_rows(int64_t width) const { return rank_ > 0 ? empty(plan_.num_pairs, width) : Tensor(); }
  ParameterPtr parameter(size_t position, Member member) const {
    return adapters_[position].b_gate != nullptr ? adapters_[position].*member : nullptr;
  }
  std::vector<Tensor> values(Member member) const;
  // c = rows of `a`'s tokens times the adapters' matrices, one product for each rank.
  void pair_product(const Tensor& a, Member member, bool trans_b, const Tensor& c) const;
  // The gradient of a matrix that meets the layer's input or output: op's b or a is R wide.
  void pair_gradient(Member member, const GroupedGemmK& op) const;
  void chain_gradients(const Tensor& ds, const Tensor& e) const;
  std::vector<ParameterPtr> trained(Member member) const;

  // Marks groups of one lane without adapter.
  void find_simple_groups();
  bool any_group(uint8_t mark) const { return std::find(simple_.begin(), simple_.end(), mark) != simple_.end(); }
  GemmEpilogue epilogue(GemmEpilogueKind kind) const {
    return {.kind = kind, .scales = gates_, .scale_rows = plan_.visit_index, .h = {}, .activated = {}, .dots = {}};
  }

  std::vector<Adapter> adapters_;  // in plan.slot_order; null members: none
  std::vector<uint8_t> simple_;    // [G]
  AdapterMatrices matrices_;
  int64_t rank_ = 0;  // the largest
  Tensor h0_, u_, w_;
};

MoeFused::MoeFused(const MoeLayer& layer, GemmCompute compute, const Var& x, const Tensor& slots, const Tensor& gates,
                   const DispatchPlan* plan)
    : MoePass(layer, compute, rows_type(x.value.dtype(), compute), slots, gates, plan) {
  for (const int32_t slot : plan_.slot_order) {
    const auto s = static_cast<size_t>(slot);
    const bool merged_away = !groups_.lane_of_slot.empty() && groups_.lane_of_slot[s] != slot;
    const int32_t adapter = merged_away ? -1 : groups_.adapter_of_slot[s];
    adapters_.push_back(adapter >= 0 ? layer.adapters[static_cast<size_t>(adapter)] : Adapter{});
    if (adapter >= 0) rank_ = std::max(rank_, adapters_.back().rank());
  }
  matrices_ = {values(&Adapter::b_gate), values(&Adapter::b_up), values(&Adapter::a_down)};
  find_simple_groups();
}

void MoeFused::find_simple_groups() {
  for (size_t g = 0; g < groups_.groups.size(); ++g) {
    int lanes = 0;
    bool adapted = groups_.groups[g].bank.gate_up == nullptr || groups_.groups[g].bank.down == nullptr;
    for (auto i = static_cast<size_t>(plan_.group_positions[g]); i < static_cast<size_t>(plan_.group_positions[g + 1]);
         ++i) {
      const int32_t slot = plan_.slot_order[i];
      const auto s = static_cast<size_t>(slot);
      if (!groups_.lane_of_slot.empty() && groups_.lane_of_slot[s] != slot) continue;
      ++lanes;
      adapted = adapted || groups_.adapter_of_slot[s] >= 0;
    }
    simple_.push_back(lanes == 0 || (lanes == 1 && !adapted));
  }
}

std::vector<Tensor> MoeFused::values(Member member) const {
  std::vector<Tensor> list(adapters_.size());
  for (size_t i = 0; i < list.size(); ++i) {
    if (const ParameterPtr p = parameter(i, member)) list[i] = p->value;
  }
  return list;
}

std::vector<ParameterPtr> MoeFused::trained(Member member) const {
  std::vector<ParameterPtr> list(adapters_.size());
  for (size_t i = 0; i < list.size(); ++i) {
    if (const ParameterPtr p = parameter(i, member); p != nullptr && p->trainable) list[i] = p;
  }
  return list;
}

// Calls f with a copy of `list` for each shape in it, the others left out.
template <class T, class ShapeOf, class F>
void for_each_shape(const std::vector<T>& list, const ShapeOf& shape_of, F&& f) {
  std::vector<Shape> done;
  for (const T& first : list) {
    if (!first || std::find(done.begin(), done.end(), shape_of(first)) != done.end()) continue;
    std::vector<T> some(list.size());
    for (size_t i = 0; i < list.size(); ++i) {
      if (list[i] && shape_of(list[i]) == shape_of(first)) some[i] = list[i];
    }
    f(some);
    done.push_back(shape_of(first));
  }
}

void MoeFused::pair_product(const Tensor& a, Member member, bool trans_b, const Tensor& c) const {
  GroupedGemmM op{.a = a,
                  .a_rows = plan_.pair_token,
                  .offsets = plan_.slot_offsets,
                  .c = c,
                  .trans_b = trans_b,
                  .compute = compute_};
  for_each_shape(
      values(member), [](const Tensor& t) { return t.shape(); },
      [&](const std::vector<Tensor>& some) {
        op.b = some;
        run(op);
      });
}

void MoeFused::pair_gradient(Member member, const GroupedGemmK& product) const {
  for_each_shape(
      trained(member), [](const ParameterPtr& p) { return p->value.shape(); },
      [&](const std::vector<ParameterPtr>& some) {
        GroupedGemmK op = product;
        op.offsets = plan_.slot_offsets, op.compute = compute_, op.beta = grad_beta_of(some);
        for (const ParameterPtr& p : some) op.c.push_back(p != nullptr ? p->grad : Tensor());
        run(op);
      });
}

Tensor MoeFused::forward(const Tensor& x, bool keep) {
  const TraceRange trace(TraceLevel::kOp, "moe.experts", plan_.num_pairs);
  const bool chained = any_group(0);
  const Tensor rows = as_rows(x), h0 = keep || chained ? visit_rows(2 * width_) : Tensor(), u = pair_rows(2 * rank_),
               w = pair_rows(rank_);
  const Tensor s = empty(plan_.num_visits, width_);
  GroupedGemmM gate_up{.a = rows, .a_rows = plan_.visit_token, .offsets = {}, .b = {}, .c = h0, .trans_b = true};
  if (chained) {
    visit_product(gate_up, ExpertHalf::kGateUp, {simple_, 0});
    pair_product(rows, &Adapter::a_gate_up, true, u);
    run(AdapterChain{
        .plan = plan_, .adapters = matrices_, .h0 = h0, .u = u, .gates = gates_, .s = s, .w = w, .done = simple_});
  }
  if (any_group(1)) {
    if (!keep) gate_up.c = {};
    gate_up.epilogue = epilogue(GemmEpilogueKind::kSwiGlu);
    gate_up.epilogue.activated = s;
    visit_product(gate_up, ExpertHalf::kGateUp, {simple_, 1});
  }
  if (keep) h0_ = h0, u_ = u, w_ = w;
  const Tensor y = Tensor::empty(x.shape(), x.dtype()), visits = visit_rows(x.dim(1));
  visit_product(s, {}, ExpertHalf::kDown, true, visits);
  run(LowRankCombine{.plan = plan_, .rows = visits, .z = w, .matrices = values(&Adapter::b_down), .y = y});
  if (constants_->any()) constants_->add_to_y(gates_, y);
  return y;
}

void MoeFused::chain_gradients(const Tensor& ds, const Tensor& e) const {
  AdapterGradients op{.plan = plan_,
                      .adapters = matrices_,
                      .h0 = h0_,
                      .u = u_,
                      .gates = gates_,
                      .ds = ds,
                      .e = e,
                      .gradients = {},
                      .beta = {}};
  const Member members[3] = {&Adapter::b_gate, &Adapter::b_up, &Adapter::a_down};
  std::vector<Tensor>* targets[3] = {&op.gradients.b_gate, &op.gradients.b_up, &op.gradients.a_down};
  bool any = false;
  for (size_t m = 0; m < 3; ++m) {
    const std::vector<ParameterPtr> parameters = trained(members[m]);
    op.beta[m] = grad_beta_of(parameters);
    for (const ParameterPtr& p : parameters) {
      targets[m]->push_back(p != nullptr ? p->grad : Tensor());
      any = any || p != nullptr;
    }
  }
  if (any) run(op);
}

Tensor MoeFused::backward(const Tensor& x_value, const Tensor& dy_value, const Tensor& dx, bool accumulate_dx) {
  const TraceRange trace(TraceLevel::kOp, "moe.experts.backward", plan_.num_pairs);
  const Tensor dy = as_rows(dy_value), dgates = Tensor::zeros(gates_.shape(), gates_.dtype());
  const bool train_down = any_trainable(groups_, ExpertHalf::kDown), chained = any_group(0);
  const Tensor ds = chained ? visit_rows(width_) : Tensor(), e = pair_rows(rank_), du = pair_rows(2 * rank_);
  const Tensor dh0 = empty(plan_.num_visits, 2 * width_), s = train_down ? empty(plan_.num_visits, width_) : Tensor();
  GroupedGemmM down{.a = dy, .a_rows = plan_.visit_token, .offsets = {}, .b = {}, .c = ds};
  if (chained) {
    visit_product(down, ExpertHalf::kDown, {simple_, 0});
    pair_product(dy, &Adapter::b_down, false, e);
    run(AdapterChainBackward{.plan = plan_,
                             .adapters = matrices_,
                             .h0 = h0_,
                             .u = u_,
                             .gates = gates_,
                             .ds = ds,
                             .e = e,
                             .dh0 = dh0,
                             .du = du,
                             .dgates = dgates,
                             .s = s,
                             .done = simple_});
  }
  if (any_group(1)) {
    down.c = dh0;
    down.epilogue = epilogue(GemmEpilogueKind::kSwiGluBackward);
    down.epilogue.h = h0_, down.epilogue.activated = s, down.epilogue.dots = dgates;
    visit_product(down, ExpertHalf::kDown, {simple_, 1});
  }
  if (constants_->any()) constants_->backward(dy_value, gates_, dgates);
  if (train_down) weight_gradient(ExpertHalf::kDown, {.a = dy, .a_rows = plan_.visit_token, .b = s});
  pair_gradient(&Adapter::b_down, {.a = dy, .a_rows = plan_.pair_token, .b = w_});
  if (rank_ > 0) chain_gradients(ds, e);
  if (reads_x()) {
    const Tensor x = as_rows(x_value);
    pair_gradient(&Adapter::a_gate_up, {.a = du, .b = x, .b_rows = plan_.pair_token});
    if (any_trainable(groups_, ExpertHalf::kGateUp)) {
      weight_gradient(ExpertHalf::kGateUp, {.a = dh0, .b = x, .b_rows = plan_.visit_token});
    }
  }
  if (!dx.defined()) return unmerged(dgates);
  const Tensor visits = visit_rows(dx.dim(1));
  visit_product(dh0, {}, ExpertHalf::kGateUp, false, visits);
  run(LowRankCombine{.plan = plan_,
                     .rows = visits,
                     .z = du,
                     .matrices = values(&Adapter::a_gate_up),
                     .transposed = true,
                     .accumulate = accumulate_dx,
                     .y = dx});
  return unmerged(dgates);
}

}  // namespace

bool takes_fused(const MoeLayer& layer, DeviceKind device) {
  if (!layer.latents.empty()) return false;
  std::set<int64_t> widths;
  std::set<DType> types;
  std::set<int32_t> used;
  for (const Expert& expert : layer.experts) {
    if (expert.down != nullptr) widths.insert(expert.down->value.dim(1));
  }
  for (const Adapter& a : layer.adapters) {
    if (a.rank() < 1 || a.rank() > kMaxAdapterRank) return false;
    widths.insert(a.b_gate->value.dim(0));
    for (const ParameterPtr& p : {a.a_gate_up, a.b_gate, a.b_up, a.a_down, a.b_down}) types.insert(p->value.dtype());
  }
  for (const Slot& slot : layer.slots) {
    if (slot.adapter >= 0 && !used.insert(slot.adapter).second) return false;
  }
  if (widths.size() > 1 || types.size() > 1) return false;
  // Each annealed slot is a group of its own; without base_once so is every slot.
  const size_t slots = layer.slots.size();
  const size_t groups = layer.experts.size() + layer.annealed.size() + (moe_execution().base_once ? 0 : slots);
  return device == DeviceKind::kCpu || std::max(groups, slots) <= kMaxChainSlots;
}

Var moe_experts_fused(Tape& tape, const Var& x, const MoeLayer& layer, const Tensor& slots, const Var& gates,
                      GemmCompute compute, const DispatchPlan* plan) {
  const bool needs = x.needs_grad() || gates.needs_grad() || any_trainable(layer);
  const bool keep = tape.recording() && needs;
  const auto pass = std::make_shared<MoeFused>(layer, compute, x, slots, gates.value, plan);
  const Var y = Tape::output(pass->forward(x.value, keep), needs);
  if (!keep) return y;
  tape.record(y, [pass, x = pass->reads_x() ? Saved(x) : Saved(), dx = x.grad, dgates = gates.grad](const Tensor& dy) {
    bool accumulate = false;
    const Tensor target = dx ? dx->target(dy.shape(), dy.dtype(), &accumulate) : Tensor();
    const Tensor d = pass->backward(x.get(), dy, target, accumulate);
    if (dgates) dgates->add(d);
  });
  return y;
}

}  // namespace lightmoe
