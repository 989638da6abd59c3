#include "compress/unit_pruning.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "compress/decomposition.h"
#include "compress/linear_algebra.h"
#include "compress/originals.h"
#include "loaders/json.h"
#include "model/weights.h"

namespace lightmoe {
namespace {

// W - B A with the factors that the model has.
void take_off(const Adapter& adapter, const Expert& expert) {
  for (const AdapterPart& part : parts_of(adapter)) add_product(matrix_of(expert, part.matrix), part.b, part.a, -1);
}

// On the old one's device, f32.
ParameterPtr parameter_like(const ParameterPtr& old, const Tensor& value) {
  const MemoryScope scope(MemoryCategory::kWeights);
  auto p = std::make_shared<Parameter>();
  p->name = old->name, p->trainable = old->trainable;
  p->value = value.to(DType::kF32).on(old->value.device());
  return p;
}

Tensor on_host(const Tensor& t) { return t.on(DeviceKind::kCpu); }

Tensor stacked(const Tensor& gate, const Tensor& up) {
  const int64_t f = gate.dim(0);
  const Tensor both = Tensor::empty({2 * f, gate.dim(1)}, gate.dtype());
  both.slice(0, f).copy_from(gate);
  both.slice(f, 2 * f).copy_from(up);
  return both;
}

int32_t adapter_of(const MoeLayer& moe, size_t entry) {
  for (const Slot& slot : moe.slots) {
    if (slot.kind == SlotKind::kExpert && slot.expert == static_cast<int32_t>(entry)) return slot.adapter;
  }
  return -1;
}

// Rows (or columns) of a matrix in another order, the first `count` of them, in its own type.
Tensor picked(const Tensor& w, const std::vector<int32_t>& order, int64_t count, bool columns) {
  const Tensor x = columns ? transpose(on_host(w).to(DType::kF64)) : on_host(w);
  const Tensor y = Tensor::empty({count, x.dim(1)}, x.dtype());
  for (int64_t i = 0; i < count; ++i) y.row(i).copy_from(x.row(order[static_cast<size_t>(i)]));
  return columns ? transpose(y).to(w.dtype()) : y;
}

}  // namespace

UnitPruner::UnitPruner(Olmoe& model, const CompressionRecord& record, const std::filesystem::path& base, int64_t steps)
    : model_(model), steps_(steps) {
  const Checkpoint checkpoint(base);
  check(model_fingerprint(checkpoint) == record.model, ErrorKind::kInput, "{}: not the model that was compressed",
        base.string());
  const OlmoeConfig config = read_config(base);
  const ExpertSource experts(checkpoint, config);
  const Statistics none = uniform_statistics(config.num_layers, config.num_experts, config.hidden_size);
  const MethodInput input{.config = config, .statistics = none, .options = record.options, .experts = &experts};
  // Made again on the host, whatever the device.
  const auto whole_expert = [&](size_t l, size_t j, int64_t rank) {
    const DeviceScope host(DeviceKind::kCpu);
    const auto layer = static_cast<int64_t>(l);
    const BankEntry& group = record.plan.layers[l].bank[j];
    const ExpertMatrices whole =
        with_units(merged_expert(input, layer, group, {.align = true}), decompose(input, layer, group, rank).order);
    return Expert{.gate_up = parameter_like(model_.blocks[l].moe.experts[j].gate_up, stacked(whole.gate, whole.up)),
                  .down = parameter_like(model_.blocks[l].moe.experts[j].down, whole.down)};
  };
  for (size_t l = 0; l < model.blocks.size(); ++l) {
    MoeLayer& moe = model.blocks[l].moe;
    for (size_t j = 0; j < moe.experts.size(); ++j) {
      const int64_t units = moe.experts[j].down->value.dim(1);
      if (units == config.intermediate_size) continue;
      const Adapter& adapter = moe.adapters[static_cast<size_t>(adapter_of(moe, j))];
      moe.experts[j] = whole_expert(l, j, adapter.rank());
      take_off(adapter, moe.experts[j]);
      parts_.push_back({l, j, units, std::vector<double>(static_cast<size_t>(config.intermediate_size), 0.0)});
    }
  }
}

int64_t UnitPruner::units_at(int64_t step, int64_t last) const {
  const auto half = static_cast<double>(std::max<int64_t>(1, steps_ / 2));
  const double left = 1 - std::min(1.0, static_cast<double>(step) / half);
  return last + std::llround(static_cast<double>(model_.config.intermediate_size - last) * left * left * left);
}

std::vector<int32_t> UnitPruner::by_importance(const Part& part) const {
  std::vector<int32_t> order(part.importance.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    return part.importance[static_cast<size_t>(a)] > part.importance[static_cast<size_t>(b)];
  });
  return order;
}

void UnitPruner::prune(const Part& part, int64_t units) {
  const Expert& expert = expert_of(part);
  const Tensor &rows = expert.gate_up->value, down = on_host(expert.down->value);
  const std::vector<int32_t> order = by_importance(part);
  const int64_t f = down.dim(1);
  for (auto i = static_cast<size_t>(units); i < order.size(); ++i) {
    rows.row(order[i]).fill_zero();
    rows.row(f + order[i]).fill_zero();
    for (int64_t k = 0; k < down.dim(0); ++k) down.data<float>()[k * f + order[i]] = 0;
  }
  if (!down.shares_buffer_with(expert.down->value)) expert.down->value.copy_from(down);
}

void UnitPruner::after_step(int64_t step) {
  for (Part& part : parts_) {
    const Expert& expert = expert_of(part);
    const int64_t f = expert.down->value.dim(1), d = expert.down->value.dim(0);
    if (!expert.gate_up->grad.defined() || !expert.down->grad.defined()) continue;  // no token ever came here
    const Tensor rows = on_host(expert.gate_up->value), down = on_host(expert.down->value),
                 drows = on_host(expert.gate_up->grad), ddown = on_host(expert.down->grad);
    const auto product = [](const Tensor& w, const Tensor& g, int64_t i) {
      return std::abs(static_cast<double>(w.data<float>()[i]) * static_cast<double>(g.data<float>()[i]));
    };
    for (int64_t u = 0; u < f; ++u) {
      double sum = 0;
      for (int64_t k = 0; k < d; ++k) {
        sum +=
            product(rows, drows, u * d + k) + product(rows, drows, (f + u) * d + k) + product(down, ddown, k * f + u);
      }
      double& mean = part.importance[static_cast<size_t>(u)];
      mean = kBeta * mean + (1 - kBeta) * sum;
    }
    prune(part, units_at(step, part.units));
  }
}

void UnitPruner::cut(const Part& part) {
  MoeLayer& moe = model_.blocks[part.layer].moe;
  Expert& expert = moe.experts[part.entry];
  const DeviceScope host(DeviceKind::kCpu);
  const std::vector<int32_t> order = by_importance(part);
  const int64_t f = expert.down->value.dim(1);
  const auto both = [&](const Tensor& w) {
    return stacked(picked(w.slice(0, f), order, part.units, false),
                   picked(w.slice(f, 2 * f), order, part.units, false));
  };
  expert = {.gate_up = parameter_like(expert.gate_up, both(expert.gate_up->value)),
            .down = parameter_like(expert.down, picked(expert.down->value, order, part.units, true))};
  const Adapter& adapter = moe.adapters[static_cast<size_t>(adapter_of(moe, part.entry))];
  for (const ParameterPtr& p : {adapter.b_gate, adapter.b_up}) p->value.copy_from(picked(p->value, order, f, false));
  adapter.a_down->value.copy_from(picked(adapter.a_down->value, order, f, true));
}

void UnitPruner::finish() {
  for (const Part& part : parts_) cut(part);
  name_parameters(model_);
}

Json UnitPruner::state() const {
  Json importance = Json::array();
  for (const Part& part : parts_) importance.push_back(part.importance);
  return Json{{"unit_importance", importance}};
}

void UnitPruner::restore(const Json& state) {
  check(state.is_object() && state.contains("unit_importance") && state["unit_importance"].size() == parts_.size(),
        ErrorKind::kResume, "the checkpoint has no state of the units' importance; it is of another method");
  for (size_t i = 0; i < parts_.size(); ++i) {
    parts_[i].importance = state["unit_importance"][i].get<std::vector<double>>();
  }
}

}  // namespace lightmoe
