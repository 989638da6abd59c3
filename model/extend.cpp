#include "model/extend.h"

#include "model/moe_widths.h"
#include "model/weights.h"

namespace lightmoe {

void check_extendable(const Olmoe& model, const ExtensionShape& shape) {
  check_extension(shape, model.config, ErrorKind::kUsage, "--extend");
  for (size_t l = 0; l < model.blocks.size(); ++l) {
    const MoeLayer& moe = model.blocks[l].moe;
    check(moe.extension == nullptr, ErrorKind::kUsage, "--extend {}: layer {} has the extension {} already", shape.kind,
          l, moe.extension == nullptr ? "" : moe.extension->shape().text());
    check(!find_extension(shape.kind).own_experts || (owns_its_experts(moe) && has_one_width(moe)), ErrorKind::kUsage,
          "--extend {}: layer {} has slots without an expert of their own, with adapters or of several widths",
          shape.kind, l);
  }
}

void extend_model(Olmoe& model, const ExtensionShape& shape, uint64_t seed) {
  check_extendable(model, shape);
  const MemoryScope scope(MemoryCategory::kWeights);
  const OlmoeConfig& c = model.config;
  const DType dtype = model.embedding->value.dtype() == DType::kF64 ? DType::kF64 : DType::kF32;
  for (size_t l = 0; l < model.blocks.size(); ++l) {
    MoeLayer& moe = model.blocks[l].moe;
    moe.extension =
        declare_extension(shape, {.hidden = c.hidden_size, .width = c.intermediate_size, .slots = c.num_experts});
    for (const ExtensionTensor& t : moe.extension->tensors())
      t.parameter->value = Tensor::empty(t.parameter->value.shape(), dtype);
    start_extension(*moe.extension, static_cast<int64_t>(l), seed);
  }
  name_parameters(model);
}

void train_extension_alone(const Olmoe& model) {
  for (const ParameterPtr& p : model.parameters()) p->trainable = false;
  for (const Block& block : model.blocks) {
    if (block.moe.extension == nullptr) continue;
    for (const ExtensionTensor& t : block.moe.extension->tensors()) t.parameter->trainable = true;
  }
}

ParameterPtr extension_parameter(const MoeLayer& layer, const std::string& name) {
  if (layer.extension == nullptr) return nullptr;
  for (const ExtensionTensor& t : layer.extension->tensors()) {
    if (t.name == name) return t.parameter;
  }
  return nullptr;
}

}  // namespace lightmoe
