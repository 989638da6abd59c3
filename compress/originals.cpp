#include "compress/originals.h"

#include <algorithm>

#include "compress/merging.h"
#include "kernels/gemm.h"
#include "model/weights.h"

namespace lightmoe {
namespace {

ParameterPtr frozen_copy(const std::string& name, const Tensor& value) {
  auto p = std::make_shared<Parameter>();
  p->name = name;
  p->value = value;
  p->trainable = false;
  return p;
}

// The expert whose order the members of a base have; -1 where that is the slot's own.
int32_t first_member(const LayerPlan& plan, int32_t base, int32_t slot) {
  const std::vector<int32_t>& members = plan.bank[static_cast<size_t>(base)].experts;
  return members.size() < 2 || members[0] == slot ? -1 : members[0];
}

}  // namespace

// The three factor pairs of an adapter; A of gate and up are rows of one parameter.
std::vector<AdapterPart> parts_of(const Adapter& adapter) {
  const int64_t r = adapter.rank();
  return {{ExpertMatrix::kGate, adapter.a_gate_up->value.slice(0, r), adapter.b_gate->value},
          {ExpertMatrix::kUp, adapter.a_gate_up->value.slice(r, 2 * r), adapter.b_up->value},
          {ExpertMatrix::kDown, adapter.a_down->value, adapter.b_down->value}};
}

// The matrix as rows of an expert's parameters.
Tensor matrix_of(const Expert& expert, ExpertMatrix matrix) {
  const int64_t f = expert.gate_up->value.dim(0) / 2;
  if (matrix == ExpertMatrix::kDown) return expert.down->value;
  return matrix == ExpertMatrix::kGate ? expert.gate_up->value.slice(0, f) : expert.gate_up->value.slice(f, 2 * f);
}

bool is_zero(const Tensor& t) {
  const Tensor x = t.on(DeviceKind::kCpu).to(DType::kF32);
  return std::all_of(x.data<float>(), x.data<float>() + x.numel(), [](float v) { return v == 0; });
}

// w += scale B A, computed in f32 and rounded once to w's type.
void add_product(const Tensor& w, const Tensor& b, const Tensor& a, double scale) {
  const Tensor sum = w.dtype() == DType::kF32 ? w : w.to(DType::kF32);
  run(Gemm{.a = b.to(DType::kF32), .b = a.to(DType::kF32), .c = sum, .alpha = scale, .beta = 1});
  if (w.dtype() != DType::kF32) w.copy_from(sum);
}

Adapter make_adapter(int64_t d, int64_t f, int64_t rank) {
  const auto make = [](const Shape& shape) { return make_parameter("", shape, DType::kF32); };
  return {.a_gate_up = make({2 * rank, d}),
          .b_gate = make({f, rank}),
          .b_up = make({f, rank}),
          .a_down = make({rank, f}),
          .b_down = make({d, rank})};
}

Originals::Originals(const std::filesystem::path& base, const Olmoe& model, const CompressionRecord& record,
                     DType dtype)
    : checkpoint_(base), config_(read_config(base)), source_(checkpoint_, config_), dtype_(dtype) {
  const std::string fingerprint = model_fingerprint(checkpoint_);
  check(fingerprint == record.model, ErrorKind::kInput,
        "{}: not the model that was compressed (fingerprint {}, compression.json has {})", base.string(), fingerprint,
        record.model);
  for (size_t l = 0; l < model.blocks.size(); ++l) {
    const MoeLayer& moe = model.blocks[l].moe;
    auto& starts = starts_.emplace_back();
    for (const int32_t slot : record.plan.layers[l].replaced) {
      const Slot& entry = moe.slots[static_cast<size_t>(slot)];
      if (!record.plan.layers[l].fades(slot)) continue;
      Start start{.slot = slot};
      if (record.options.align) start.align_to = first_member(record.plan.layers[l], entry.expert, slot);
      if (entry.adapter >= 0) {
        for (const AdapterPart& part : parts_of(moe.adapters[static_cast<size_t>(entry.adapter)])) {
          if (!is_zero(part.b)) start.parts.push_back({part.matrix, part.a.clone(), part.b.clone()});
        }
      }
      starts.push_back(std::move(start));
    }
  }
}

void Originals::load(Olmoe& model) {
  const MemoryScope scope(MemoryCategory::kWeights);
  for (size_t l = 0; l < model.blocks.size(); ++l) {
    auto& kept = start_adapters_.emplace_back();
    for (const Start& start : starts_[l]) {
      model.blocks[l].moe.annealed.push_back(load_slot(static_cast<int64_t>(l), start));
      if (!start.parts.empty()) kept.emplace_back(start.slot, frozen_adapter(start));
    }
  }
  starts_.clear();
  loaded = true;
}

std::unique_ptr<Olmoe> Originals::teacher(const Olmoe& student) const {
  auto teacher = std::make_unique<Olmoe>(student);
  for (size_t l = 0; l < student.blocks.size(); ++l) {
    const MoeLayer& from = student.blocks[l].moe;
    MoeLayer& moe = teacher->blocks[l].moe;
    moe.annealed.clear(), moe.experts.clear(), moe.extension.reset();
    moe.adapters.clear(), moe.beta = 0;
    for (size_t s = 0; s < from.slots.size(); ++s) {
      moe.experts.push_back(from.experts[static_cast<size_t>(from.slots[s].expert)]);
      moe.slots[s] = {.expert = static_cast<int32_t>(s)};
    }
    for (const AnnealedSlot& slot : from.annealed) moe.experts[static_cast<size_t>(slot.slot)] = slot.original;
    for (const auto& [slot, adapter] : start_adapters_[l]) {
      moe.slots[static_cast<size_t>(slot)].adapter = static_cast<int32_t>(moe.adapters.size());
      moe.adapters.push_back(adapter);
    }
  }
  return teacher;
}

AnnealedSlot Originals::load_slot(int64_t layer, const Start& start) const {
  const int64_t f = config_.intermediate_size, d = config_.hidden_size;
  const DType dtype = start.parts.empty() ? dtype_ : DType::kF32;
  Expert original{.gate_up = frozen_copy("", Tensor::empty({2 * f, d}, dtype)),
                  .down = frozen_copy("", Tensor::empty({d, f}, dtype))};
  for (const ExpertMatrix matrix : kExpertMatrices) {
    source_.place(layer, start.slot, matrix).read_rows(0, matrix_of(original, matrix));
  }
  if (start.align_to >= 0) {
    const ExpertMatrices own = read_expert(source_, layer, start.slot, DType::kF64),
                         aligned = with_units(
                             own, aligned_units(read_expert(source_, layer, start.align_to, DType::kF64), own));
    matrix_of(original, ExpertMatrix::kGate).copy_from(aligned.gate.to(dtype));
    matrix_of(original, ExpertMatrix::kUp).copy_from(aligned.up.to(dtype));
    matrix_of(original, ExpertMatrix::kDown).copy_from(aligned.down.to(dtype));
  }
  for (const AdapterPart& part : start.parts) add_product(matrix_of(original, part.matrix), part.b, part.a, -1);
  return {.slot = start.slot, .original = original};
}

Adapter Originals::frozen_adapter(const Start& start) const {
  Adapter adapter = make_adapter(config_.hidden_size, config_.intermediate_size, start.parts.front().a.dim(0));
  for (const ParameterPtr& p : {adapter.a_gate_up, adapter.b_gate, adapter.b_up, adapter.a_down, adapter.b_down}) {
    p->value.fill_zero(), p->trainable = false;
  }
  for (const AdapterPart& to : parts_of(adapter)) {
    for (const AdapterPart& part : start.parts) {
      if (part.matrix == to.matrix) to.a.copy_from(part.a.to(DType::kF32)), to.b.copy_from(part.b.to(DType::kF32));
    }
  }
  return adapter;
}

}  // namespace lightmoe
