#include "kernels/dispatch_plan.h"

#include <algorithm>
#include <numeric>

namespace lightmoe {
namespace {

// Position of every slot in slot_order, -1 for slots without a group.
std::vector<int32_t> positions_in(const std::vector<int32_t>& slot_order, size_t num_slots) {
  std::vector<int32_t> position(num_slots, -1);
  for (size_t s = 0; s < slot_order.size(); ++s) position[static_cast<size_t>(slot_order[s])] = static_cast<int32_t>(s);
  return position;
}

std::vector<int32_t> order_slots(const std::vector<int32_t>& group_of_slot) {
  std::vector<int32_t> order;
  for (size_t s = 0; s < group_of_slot.size(); ++s) {
    if (group_of_slot[s] >= 0) order.push_back(static_cast<int32_t>(s));
  }
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    return group_of_slot[static_cast<size_t>(a)] < group_of_slot[static_cast<size_t>(b)];
  });
  return order;
}

// counts[i + 1] holds how many i has; afterwards counts[i] is where i begins.
void to_offsets(std::vector<int32_t>* counts) { std::partial_sum(counts->begin(), counts->end(), counts->begin()); }

Tensor tensor_of(const std::vector<int32_t>& values) {
  const DeviceScope host(DeviceKind::kCpu);
  return Tensor::from(values, {static_cast<int64_t>(values.size())});
}

class Planner {
 public:
  explicit Planner(const FillDispatchPlan& op)
      : slots_(op.slots.data<int32_t>()),
        tokens_(op.slots.dim(0)),
        top_k_(op.slots.dim(1)),
        num_groups_(static_cast<size_t>(op.num_groups)),
        group_of_slot_(op.group_of_slot),
        position_(op.position_of_slot),
        plan_(op.plan) {
    plan_.token_visit = Tensor::empty(op.slots.shape(), DType::kI32, DeviceKind::kCpu);
    plan_.index_pair = Tensor::empty(op.slots.shape(), DType::kI32, DeviceKind::kCpu);
  }

  void fill() {
    count();
    place_visits();
    place_pairs();
  }

 private:
  int32_t group(int64_t index) const { return group_of_slot_[static_cast<size_t>(slots_[index])]; }

  // Whether (t, k) is the first of its token to choose its group.
  bool opens_visit(int64_t t, int64_t k) const {
    const int32_t own = group(t * top_k_ + k);
    for (int64_t j = 0; j < k; ++j) {
      if (group(t * top_k_ + j) == own) return false;
    }
    return own >= 0;
  }

  void count() {
    slot_begin_.assign(plan_.slot_order.size() + 1, 0);
    group_begin_.assign(num_groups_ + 1, 0);
    pair_group_begin_.assign(num_groups_ + 1, 0);
    for (int64_t t = 0; t < tokens_; ++t) {
      for (int64_t k = 0; k < top_k_; ++k) {
        const int64_t index = t * top_k_ + k;
        require(slots_[index] >= 0 && static_cast<size_t>(slots_[index]) < group_of_slot_.size(),
                "dispatch_plan: token {} chose slot {} of {}", t, slots_[index], group_of_slot_.size());
        if (group(index) < 0) continue;
        ++slot_begin_[static_cast<size_t>(position_[static_cast<size_t>(slots_[index])]) + 1];
        ++pair_group_begin_[static_cast<size_t>(group(index)) + 1];
        if (opens_visit(t, k)) ++group_begin_[static_cast<size_t>(group(index)) + 1];
      }
    }
    to_offsets(&slot_begin_);
    to_offsets(&group_begin_);
    to_offsets(&pair_group_begin_);
    plan_.num_pairs = slot_begin_.back();
    plan_.num_visits = group_begin_.back();
    plan_.slot_offsets = tensor_of(slot_begin_);
    plan_.group_offsets = tensor_of(group_begin_);
    plan_.pair_group_offsets = tensor_of(pair_group_begin_);
  }

  void place_visits() {
    plan_.visit_token = Tensor::empty({plan_.num_visits}, DType::kI32, DeviceKind::kCpu);
    plan_.visit_index = Tensor::empty({plan_.num_visits}, DType::kI32, DeviceKind::kCpu);
    int32_t *visit_token = plan_.visit_token.data<int32_t>(), *token_visit = plan_.token_visit.data<int32_t>();
    int32_t* visit_index = plan_.visit_index.data<int32_t>();
    std::vector<int32_t> next = group_begin_;
    for (int64_t t = 0; t < tokens_; ++t) {
      int64_t visits = 0;
      for (int64_t k = 0; k < top_k_; ++k) {
        if (!opens_visit(t, k)) continue;
        const int32_t visit = next[static_cast<size_t>(group(t * top_k_ + k))]++;
        visit_token[visit] = static_cast<int32_t>(t);
        visit_index[visit] = static_cast<int32_t>(t * top_k_ + k);
        token_visit[t * top_k_ + visits++] = visit;
      }
      std::fill(token_visit + t * top_k_ + visits, token_visit + (t + 1) * top_k_, -1);
    }
  }

  void place_pairs() {
    const Shape shape{plan_.num_pairs};
    plan_.pair_token = Tensor::empty(shape, DType::kI32, DeviceKind::kCpu);
    plan_.pair_index = Tensor::empty(shape, DType::kI32, DeviceKind::kCpu);
    plan_.pair_visit = Tensor::empty(shape, DType::kI32, DeviceKind::kCpu);
    int32_t *pair_token = plan_.pair_token.data<int32_t>(), *pair_index = plan_.pair_index.data<int32_t>();
    int32_t *pair_visit = plan_.pair_visit.data<int32_t>(), *index_pair = plan_.index_pair.data<int32_t>();
    std::vector<int32_t> next = slot_begin_, current(num_groups_, -1), next_visit = group_begin_;
    for (int64_t t = 0; t < tokens_; ++t) {
      for (int64_t k = 0; k < top_k_; ++k) {
        const int64_t index = t * top_k_ + k;
        index_pair[index] = -1;
        if (group(index) < 0) continue;
        const size_t own = static_cast<size_t>(group(index));
        if (opens_visit(t, k)) current[own] = next_visit[own]++;
        const int32_t pair = next[static_cast<size_t>(position_[static_cast<size_t>(slots_[index])])]++;
        pair_token[pair] = static_cast<int32_t>(t);
        pair_index[pair] = static_cast<int32_t>(index);
        pair_visit[pair] = current[own];
        index_pair[index] = pair;
      }
    }
  }

  const int32_t* slots_;
  int64_t tokens_, top_k_;
  size_t num_groups_;
  const std::vector<int32_t>&group_of_slot_, &position_;
  std::vector<int32_t> slot_begin_, group_begin_, pair_group_begin_;
  DispatchPlan& plan_;
};

void fill_cpu(const FillDispatchPlan& op) { Planner(op).fill(); }
const RegisterKernel<FillDispatchPlan> register_fill{DeviceKind::kCpu, &fill_cpu};

}  // namespace

namespace {

DispatchSort& chosen_sort() {
  static DispatchSort sort = DispatchSort::kCounting;
  return sort;
}

}  // namespace

void set_dispatch_sort(DispatchSort sort) { chosen_sort() = sort; }
DispatchSort dispatch_sort() { return chosen_sort(); }

FillDispatchPlan begin_dispatch_plan(const Tensor& slots, const std::vector<int32_t>& group_of_slot, int64_t num_groups,
                                     DispatchPlan& plan) {
  require(slots.rank() == 2, "dispatch_plan: slots is {}, expected [T, K]", slots.shape());
  require_tensor(slots, "dispatch_plan", "slots", slots.shape(), DType::kI32);
  require(slots.numel() <= INT32_MAX, "dispatch_plan: {} pairs do not fit 32-bit indices", slots.numel());
  for (size_t s = 0; s < group_of_slot.size(); ++s) {
    require(group_of_slot[s] >= -1 && group_of_slot[s] < num_groups, "dispatch_plan: slot {} is in group {} of {}", s,
            group_of_slot[s], num_groups);
  }
  plan.slot_order = order_slots(group_of_slot);
  plan.group_positions.assign(static_cast<size_t>(num_groups) + 1, 0);
  for (const int32_t slot : plan.slot_order) {
    ++plan.group_positions[static_cast<size_t>(group_of_slot[static_cast<size_t>(slot)]) + 1];
  }
  to_offsets(&plan.group_positions);
  return {.slots = slots,
          .group_of_slot = group_of_slot,
          .position_of_slot = positions_in(plan.slot_order, group_of_slot.size()),
          .num_groups = num_groups,
          .plan = plan};
}

DispatchPlan make_dispatch_plan(const Tensor& slots, const std::vector<int32_t>& group_of_slot, int64_t num_groups) {
  DispatchPlan plan;
  dispatch(begin_dispatch_plan(slots, group_of_slot, num_groups, plan), slots.device(), "dispatch_plan");
  return plan;
}

}  // namespace lightmoe
