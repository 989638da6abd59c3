#include "model/dump.h"

#include <algorithm>

#include "autograd/ops.h"
#include "kernels/labels.h"
#include "loaders/safetensors.h"
#include "model/weights.h"

namespace lightmoe {
namespace {

std::vector<int32_t> read_integers(const SafetensorsFile& file, const std::string& name,
                                   const std::vector<int64_t>& shape) {
  const TensorInfo& info = *file.find(name);
  check(info.shape == shape, ErrorKind::kInput, "{}: \"{}\" has another shape than input_ids [{}, {}]",
        file.path().string(), name, shape[0], shape[1]);
  check(info.dtype() && !is_floating(*info.dtype()), ErrorKind::kInput, "{}: \"{}\" is {}, expected integers",
        file.path().string(), name, info.file_dtype);
  const Tensor t = file.read(name, DType::kI32).on(DeviceKind::kCpu);
  return {t.data<int32_t>(), t.data<int32_t>() + t.numel()};
}

void check_ids(const std::string& where, const std::vector<int32_t>& ids, int64_t vocabulary, bool may_be_ignored) {
  for (size_t i = 0; i < ids.size(); ++i) {
    check((ids[i] >= 0 && ids[i] < vocabulary) || (may_be_ignored && ids[i] == kIgnoredLabel), ErrorKind::kInput,
          "{}: entry {} is {}, expected 0 to {}{} (config.json: vocab_size)", where, i, ids[i], vocabulary - 1,
          may_be_ignored ? " or -100" : "");
  }
}

Tensor as_i64(const Tensor& slots, const Shape& shape) {
  const Tensor narrow = slots.on(DeviceKind::kCpu), wide = Tensor::empty(shape, DType::kI64, DeviceKind::kCpu);
  std::copy_n(narrow.data<int32_t>(), narrow.numel(), wide.data<int64_t>());
  return wide;
}

Tensor scalar(double value) { return Tensor::from<double>({value}, {1}); }

}  // namespace

DumpInput read_dump_input(const std::filesystem::path& path, const OlmoeConfig& config) {
  const SafetensorsFile file(path);
  const TensorInfo* info = file.find("input_ids");
  check(info != nullptr, ErrorKind::kInput, "{}: no tensor \"input_ids\"", path.string());
  check(info->shape.size() == 2 && info->numel() > 0, ErrorKind::kInput,
        "{}: \"input_ids\" must be [B, S], at least [1, 1]", path.string());
  DumpInput input{.rows = info->shape[0],
                  .length = info->shape[1],
                  .ids = read_integers(file, "input_ids", info->shape),
                  .labels = {},
                  .mask = {}};
  check_ids(path.string() + ": \"input_ids\"", input.ids, config.vocab_size, false);
  if (file.find("labels") != nullptr) {
    input.labels = read_integers(file, "labels", info->shape);
    check_ids(path.string() + ": \"labels\"", input.labels, config.vocab_size, true);
  }
  if (file.find("attention_mask") != nullptr) {
    for (const int32_t m : read_integers(file, "attention_mask", info->shape)) input.mask.push_back(m != 0);
  }
  return input;
}

std::vector<std::pair<std::string, Tensor>> dump_model(Olmoe& model, const DumpInput& input, bool gradients) {
  check(!gradients || !input.labels.empty(), ErrorKind::kUsage,
        "gradients need labels: the input has no tensor \"labels\"");
  const int64_t rows = input.rows, length = input.length;
  const Batch batch = make_batch(input.ids, rows, length, input.labels, input.mask);
  std::vector<std::pair<std::string, Tensor>> out;
  const auto put = [&](const std::string& name, const Tensor& t) {
    out.emplace_back(name, t.reshape({rows, length, t.dim(1)}));
  };
  std::vector<Var> probs;
  std::vector<Tensor> slots;
  Observer observer;
  observer.on_hidden = [&](int i, const Tensor& x) { put(fmt::format("hidden_states.{}", i), x); };
  observer.on_router = [&](const RouterView& view) {
    put(fmt::format("router_logits.{}", view.layer), view.logits);
    out.emplace_back(fmt::format("selected_experts.{}", view.layer),
                     as_i64(view.slots, {rows, length, view.slots.dim(1)}));
    put(fmt::format("routing_weights.{}", view.layer), view.gates);
    probs.push_back(Tape::constant(view.probs));
    slots.push_back(view.slots);
  };
  const Tensor hidden = model.forward(batch, {.observer = &observer});
  put("logits", model.logits(hidden, {}));
  Tape tape(false);
  const double aux = load_balance_loss(tape, probs, slots, batch.mask, 1).value();
  out.emplace_back("loss_aux", scalar(aux));
  if (input.labels.empty()) return out;

  const Tensor host_labels = batch.labels.on(DeviceKind::kCpu);
  const int32_t* labels = host_labels.data<int32_t>();
  const int64_t count =
      std::count_if(labels, labels + batch.tokens(), [](int32_t label) { return label != kIgnoredLabel; });
  check(count > 0, ErrorKind::kInput,
        "labels: every position is ignored (-100), or none is left after the shift by one");
  const double scale = 1.0 / static_cast<double>(count);
  const double ce = scale * lm_head_loss(tape, Tape::constant(hidden), model.lm_head, batch.labels, 1, {}).value();
  out.emplace_back("loss_ce", scalar(ce));
  out.emplace_back("loss_total", scalar(ce + model.config.router_aux_loss_coef * aux));
  if (!gradients) return out;

  model.set_trainable([](const std::string&) { return true; });
  for (const ParameterPtr& p : model.parameters()) p->zero_grad();
  model.forward_backward(batch, {.loss_scale = scale, .aux_coef = model.config.router_aux_loss_coef});
  for (const StoredTensor& stored : stored_tensors(model))
    out.emplace_back("grad." + stored.name, stored.view(stored.parameter->grad));
  return out;
}

}  // namespace lightmoe
