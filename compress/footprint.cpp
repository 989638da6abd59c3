#include "compress/footprint.h"

#include "compress/budget.h"
#include "model/summary.h"
#include "model/weights.h"

namespace lightmoe {
namespace {

// Weights of the products outside the experts that every token meets.
int64_t dense_weights(const OlmoeConfig& c) {
  const int64_t d = c.hidden_size, kv = c.num_kv_heads * c.head_dim();
  return c.num_layers * (2 * d * d + 2 * d * kv) + c.vocab_size * d;
}

int64_t attention_flops(const OlmoeConfig& c, int64_t context) {
  return c.num_layers * 4 * c.num_heads * c.head_dim() * context;
}

int64_t kv_bytes(const OlmoeConfig& c) { return c.num_layers * 2 * c.num_kv_heads * c.head_dim() * 4; }

void set_bytes(Footprint& f, const FootprintRequest& request) {
  f.stored_bytes = f.parameters * static_cast<int64_t>(size_of(request.stored));
  f.live_bytes = f.parameters * static_cast<int64_t>(size_of(request.live));
}

TrainingEstimate training_of(const Olmoe& model, const FootprintRequest& request) {
  for (const ParameterPtr& p : model.parameters()) {
    p->trainable = !request.train_experts_only || p->name.find(".mlp.experts.") != std::string::npos ||
                   p->name.find(".mlp.bank.") != std::string::npos;
    if (!p->trainable) p->value = Tensor::borrow(nullptr, p->value.shape(), request.live);
  }
  return estimate_training(model.config, model.parameters(), request.train_tokens, request.recompute);
}

}  // namespace

Footprint plan_footprint(const OlmoeConfig& config, const std::vector<LayerShape>& layers,
                         const FootprintRequest& request) {
  std::vector<LayerShape> shapes = layers;
  std::vector<LayerSummary> summaries;
  for (const LayerShape& shape : layers) summaries.push_back(summarize_layer(shape, config));
  if (shapes.empty()) shapes.assign(static_cast<size_t>(config.num_layers), plain_layer_shape(config.num_experts));
  const std::unique_ptr<Olmoe> model = declare_model(config, shapes);
  const ModelSize size = model_size(config);
  const ActiveExperts met = most_active_experts(config, summaries);
  const int64_t routers = config.num_layers * config.num_experts * config.hidden_size;
  Footprint f{.parameters = model->num_parameters(), .active_parameters = size.rest + met.parameters};
  set_bytes(f, request);
  f.kv_bytes_per_token = kv_bytes(config);
  f.flops_per_token = 2 * (dense_weights(config) + routers + met.products) + attention_flops(config, request.context);
  if (request.train_tokens > 0) f.training = training_of(*model, request);
  return f;
}

Footprint plan_sections(const OlmoeConfig& config, int64_t sections, const FootprintRequest& request) {
  const int64_t d = config.hidden_size;
  check(sections >= 1 && d % sections == 0, ErrorKind::kUsage,
        "--sections {}: expected a divisor of the hidden width {}", sections, d);
  check(request.train_tokens == 0, ErrorKind::kUsage, "--sections: no training of such a model is planned");
  const ModelSize size = model_size(config);
  const int64_t routers = config.num_layers * config.num_experts * d;
  const int64_t experts = config.num_layers * sections * 3 * config.intermediate_size * (d / sections);
  Footprint f{.parameters = size.rest - routers + experts, .active_parameters = size.rest - routers + experts};
  set_bytes(f, request);
  f.kv_bytes_per_token = kv_bytes(config);
  f.flops_per_token = 2 * (dense_weights(config) + experts) + attention_flops(config, request.context);
  return f;
}

}  // namespace lightmoe
