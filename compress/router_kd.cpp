#include "compress/router_kd.h"

#include "compress/weights.h"

namespace lightmoe {

std::unique_ptr<Olmoe> load_teacher(const std::filesystem::path& base, const CompressionRecord& record, DType dtype) {
  const std::string fingerprint = model_fingerprint(Checkpoint(base));
  check(fingerprint == record.model, ErrorKind::kInput,
        "{}: not the model that was compressed (fingerprint {}, compression.json has {})", base.string(), fingerprint,
        record.model);
  std::unique_ptr<Olmoe> teacher = load_model(base, dtype);
  teacher->set_trainable([](const std::string&) { return false; });
  return teacher;
}

void train_routers_alone(const Olmoe& model) {
  for (const ParameterPtr& p : model.parameters()) p->trainable = false;
  for (const Block& block : model.blocks) block.moe.router->trainable = true;
}

int64_t live_router_parameters(const std::vector<LayerShape>& layers, int64_t hidden) {
  int64_t rows = 0;
  for (const LayerShape& layer : layers) {
    for (const Slot& slot : layer.slots) rows += slot.kind != SlotKind::kRemoved ? 1 : 0;
  }
  return rows * hidden;
}

}  // namespace lightmoe
