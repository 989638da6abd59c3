#include "model/moe_extension.h"

#include "model/moe_op.h"
#include "model/moe_widths.h"

namespace lightmoe {

ParameterPtr declared_parameter(const Shape& shape) {
  auto p = std::make_shared<Parameter>();
  p->value = Tensor::borrow(nullptr, shape, DType::kF32);
  return p;
}

Var beside_experts(Tape& tape, const MoeCall& call, const Var& side) {
  return add_in_place(tape, side, moe_experts(tape, call.x, call.layer, call.slots, call.gates, call.compute));
}

MoeResult run_moe(Tape& tape, const MoeCall& call) {
  const MoeExtension* extension = call.layer.extension.get();
  if (extension == nullptr) {
    return {.y = moe_experts(tape, call.x, call.layer, call.slots, call.gates, call.compute, call.plan), .open = {}};
  }
  const ExtensionKind& kind = find_extension(extension->shape().kind);
  check(!kind.own_experts || (owns_its_experts(call.layer) && has_one_width(call.layer)), ErrorKind::kUsage,
        "extension {} needs slots with experts of their own, all of one width and without adapters", kind.name);
  return extension->run(tape, call);
}

}  // namespace lightmoe
