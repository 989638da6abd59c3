#include "compress/recover.h"

#include <algorithm>

#include "compress/adapter.h"
#include "compress/text.h"
#include "compress/weights.h"
#include "kernels/gemm.h"
#include "loaders/json.h"
#include "loaders/output.h"
#include "model/weights.h"

namespace lightmoe {
namespace {

struct AdapterPart {
  ExpertMatrix matrix;
  Tensor a, b;  // views of the adapter's parameters
};

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

ParameterPtr frozen_copy(const std::string& name, const Tensor& value) {
  auto p = std::make_shared<Parameter>();
  p->name = name;
  p->value = value;
  p->trainable = false;
  return p;
}

// Marks what the method trains. Works on declared parameters as well.
void mark_trainable(const Olmoe& model, const CompressionRecord& record, bool routers) {
  const Trainable what = find_method(record.method).trainable;
  for (const ParameterPtr& p : model.parameters()) p->trainable = what == Trainable::kEverything;
  const bool adapters = what == Trainable::kAdapters || what == Trainable::kBasesAndAdapters;
  const bool bases = what == Trainable::kBases || what == Trainable::kBasesAndAdapters;
  for (size_t l = 0; l < model.blocks.size(); ++l) {
    const MoeLayer& moe = model.blocks[l].moe;
    moe.router->trainable |= routers;
    for (const Adapter& a : moe.adapters) {
      for (const ParameterPtr& p : {a.a_gate_up, a.b_gate, a.b_up, a.a_down, a.b_down}) p->trainable |= adapters;
    }
    if (!bases) continue;
    for (const int32_t base : record.plan.layers[l].bases) {
      moe.experts[static_cast<size_t>(base)].gate_up->trainable = true;
      moe.experts[static_cast<size_t>(base)].down->trainable = true;
    }
  }
}

}  // namespace

// The experts that fade, from the base model's files. Adapters that start with an effect keep a copy of their start until the
// originals are loaded, which happens at the first step that needs them (a run resumed after the annealing never does).
class Recovery::Originals {
 public:
  Originals(const std::filesystem::path& base, const Olmoe& model, const CompressionRecord& record, DType dtype)
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
        if (entry.adapter >= 0) {
          for (const AdapterPart& part : parts_of(moe.adapters[static_cast<size_t>(entry.adapter)])) {
            if (!is_zero(part.b)) start.parts.push_back({part.matrix, part.a.clone(), part.b.clone()});
          }
        }
        starts.push_back(std::move(start));
      }
    }
  }

  void load(Olmoe& model) {
    const MemoryScope scope(MemoryCategory::kWeights);
    for (size_t l = 0; l < model.blocks.size(); ++l) {
      for (const Start& start : starts_[l])
        model.blocks[l].moe.annealed.push_back(load_slot(static_cast<int64_t>(l), start));
    }
    starts_.clear();
    loaded = true;
  }

  bool loaded = false;

 private:
  struct Start {
    int32_t slot = -1;
    std::vector<AdapterPart> parts;  // with B0 other than zero
  };

  AnnealedSlot load_slot(int64_t layer, const Start& start) const {
    const int64_t f = config_.intermediate_size, d = config_.hidden_size;
    const DType dtype = start.parts.empty() ? dtype_ : DType::kF32;
    Expert original{.gate_up = frozen_copy("", Tensor::empty({2 * f, d}, dtype)),
                    .down = frozen_copy("", Tensor::empty({d, f}, dtype))};
    for (const ExpertMatrix matrix : kExpertMatrices) {
      source_.place(layer, start.slot, matrix).read_rows(0, matrix_of(original, matrix));
    }
    for (const AdapterPart& part : start.parts) add_product(matrix_of(original, part.matrix), part.b, part.a, -1);
    return {.slot = start.slot, .original = original};
  }

  Checkpoint checkpoint_;
  OlmoeConfig config_;
  ExpertSource source_;
  DType dtype_;
  std::vector<std::vector<Start>> starts_;
};

Recovery::Recovery(const std::filesystem::path& compressed, const std::filesystem::path& base, int64_t steps,
                   const RecoveryOptions& options)
    : compressed_(compressed), steps_(steps), options_(options), record_(read_record(compressed)) {
  const Method& method = find_method(record_.method);
  annealing_ = options.annealing.value_or(Annealing{.eps = method.anneal});
  annealing_.check_valid();
  model_ = load_model(compressed, options.dtype);
  add_adapters();
  choose_trainable();
  if (record_.plan.experts_to_keep > 0)
    pruner_ = std::make_unique<TaskPruner>(*model_, record_.plan.experts_to_keep, steps);
  if (record_.plan.fading() > 0 && annealing_.beta(0, steps) > 0) {
    originals_ = std::make_unique<Originals>(base, *model_, record_, options.dtype);
  }
}

Recovery::~Recovery() = default;

void Recovery::add_adapters() {
  const std::vector<LayerShape> shapes = with_adapters(record_.plan.shapes(), record_.rank);
  const OlmoeConfig& c = model_->config;
  for (size_t l = 0; l < model_->blocks.size(); ++l) {
    MoeLayer& moe = model_->blocks[l].moe;
    for (size_t s = 0; s < moe.slots.size(); ++s) {
      const int32_t index = shapes[l].slots[s].adapter;
      if (moe.slots[s].adapter == index) continue;
      moe.slots[s].adapter = index;
      if (index < static_cast<int32_t>(moe.adapters.size())) continue;  // shared with an earlier slot
      require(index == static_cast<int32_t>(moe.adapters.size()), "recover: adapter {} of layer {}", index, l);
      const int64_t width = shapes[l].width_of_adapter(static_cast<size_t>(index), c.intermediate_size);
      moe.adapters.push_back(make_adapter(c.hidden_size, width, record_.rank));
      for (const AdapterPart& part : parts_of(moe.adapters.back())) {
        const AdapterSite site{.layer = static_cast<int64_t>(l),
                               .slot = static_cast<int64_t>(s),
                               .matrix = part.matrix,
                               .out = part.b.dim(0),
                               .in = part.a.dim(1),
                               .rank = record_.rank};
        const AdapterFactors start = gaussian_factors(site, record_.options.adapter_std, record_.options.seed);
        part.a.copy_from(start.a);
        part.b.copy_from(start.b);
      }
    }
  }
  name_parameters(*model_);
}

void Recovery::choose_trainable() {
  mark_trainable(*model_, record_, options_.train_routers);
  const MemoryScope scope(MemoryCategory::kWeights);
  for (const ParameterPtr& p : model_->parameters()) {
    if (p->trainable && p->value.dtype() != DType::kF32) p->value = p->value.to(DType::kF32);
  }
}

int64_t Recovery::original_bytes() const {
  int64_t bytes = 0;
  for (const Block& block : model_->blocks) {
    for (const AnnealedSlot& slot : block.moe.annealed)
      bytes += slot.original.gate_up->value.bytes() + slot.original.down->value.bytes();
  }
  return bytes;
}

void Recovery::set_beta(double beta) {
  if (beta > 0 && originals_ && !originals_->loaded) {
    originals_->load(*model_);
    if (options_.say) options_.say(fmt::format("annealing: {} of originals in memory", human_bytes(original_bytes())));
  }
  if (beta == 0 && originals_) {
    const int64_t before = memory_use(MemoryCategory::kWeights).live_bytes;
    for (Block& block : model_->blocks) block.moe.annealed.clear();
    originals_.reset();
    trim_memory_cache();
    const int64_t after = memory_use(MemoryCategory::kWeights).live_bytes;
    if (options_.say && before != after) {
      options_.say(fmt::format("annealing: beta is 0, originals released, weights in memory {} -> {}",
                               human_bytes(before), human_bytes(after)));
    }
  }
  for (Block& block : model_->blocks) block.moe.beta = originals_ ? beta : 0;
}

TrainerHooks Recovery::hooks(DType saved_dtype) {
  TrainerHooks hooks;
  hooks.before_step = [this](int64_t step) {
    set_beta(annealing_.beta(step - 1, steps_));
    if (pruner_) pruner_->before_step(step);
  };
  if (pruner_) {
    hooks.save_extra = [this] { return pruner_->state(); };
    hooks.load_extra = [this](const Json& state) { pruner_->restore(state); };
  }
  hooks.log_fields = [this](const StepStats& stats) {
    return Json{{"beta", annealing_.beta(stats.step - 1, steps_)},
                {"weight_bytes", memory_use(MemoryCategory::kWeights).live_bytes}};
  };
  // While slots anneal there is no model of fewer parameters to write; the checkpoint's own state is whole either way.
  hooks.save_model = [this, saved_dtype](const std::filesystem::path& directory) {
    if (original_bytes() == 0) save(directory, saved_dtype, Json{{"unfinished", true}});
  };
  return hooks;
}

TrainLosses Recovery::Observed::forward_backward(const Batch& batch, const TrainOptions& options) {
  TrainOptions observed = options;
  if (recovery_.pruner_) observed.observer = recovery_.pruner_->observer();
  return recovery_.model_->forward_backward(batch, observed);
}

std::map<std::string, std::string> Recovery::fingerprint() const {
  return {{"base model", record_.model},
          {"method", record_.method},
          {"statistics", record_.statistics},
          {"compressed weights", model_fingerprint(Checkpoint(compressed_))},
          {"routers", options_.train_routers ? "trained" : "frozen"},
          {"annealing", fmt::format("{} {:g} {:g}", annealing_.shape == AnnealShape::kLinear ? "linear" : "exponential",
                                    annealing_.eps, annealing_.gamma)}};
}

void Recovery::finish() {
  if (finished_) return;
  finished_ = true;
  set_beta(0);
  if (pruner_) record_.plan = pruner_->finish();
  if (!options_.merge) return;
  const std::vector<std::vector<uint8_t>> all_mergeable = mergeable_adapters(shapes_of(*model_), record_.plan);
  for (size_t l = 0; l < model_->blocks.size(); ++l) {
    MoeLayer& moe = model_->blocks[l].moe;
    const std::vector<uint8_t>& mergeable = all_mergeable[l];
    std::vector<int32_t> new_index(moe.adapters.size(), -2);  // -1: merged
    std::vector<Adapter> kept;
    for (Slot& slot : moe.slots) {
      if (slot.adapter < 0) continue;
      const auto old = static_cast<size_t>(slot.adapter);
      if (new_index[old] == -2 && mergeable[old]) {
        for (const AdapterPart& part : parts_of(moe.adapters[old])) {
          add_product(matrix_of(moe.experts[static_cast<size_t>(slot.expert)], part.matrix), part.b, part.a, 1);
        }
        new_index[old] = -1;
      } else if (new_index[old] == -2) {
        new_index[old] = static_cast<int32_t>(kept.size());
        kept.push_back(moe.adapters[old]);
      }
      slot.adapter = new_index[old];
    }
    moe.adapters = std::move(kept);
  }
  name_parameters(*model_);
}

void Recovery::save(const std::filesystem::path& directory, DType dtype, const Json& result) const {
  CompressionRecord record = record_;
  const ModelSize size = model_size(model_->config);
  const std::vector<LayerShape> shapes = shapes_of(*model_);
  for (size_t l = 0; l < model_->blocks.size(); ++l) {
    const MoeLayer& moe = model_->blocks[l].moe;
    LayerPlan& plan = record.plan.layers[l];
    plan.shape = shapes[l];
    plan.adapter_slot.assign(moe.adapters.size(), -1);
    for (size_t s = 0; s < moe.slots.size(); ++s) {
      if (moe.slots[s].adapter < 0) continue;
      int32_t& first = plan.adapter_slot[static_cast<size_t>(moe.slots[s].adapter)];
      if (first < 0) first = static_cast<int32_t>(s);
    }
  }
  record.stored_parameters = stored_parameters(record.plan.shapes(), size);
  record.stored_bytes = record.stored_parameters * static_cast<int64_t>(size_of(dtype));
  save_model(*model_, directory, dtype, int64_t{5} << 30);
  copy_side_files(compressed_, directory);
  write_file_atomically(directory / kRecordFile, record_to_json(record, result));
}

RecoveryEstimate estimate_recovery(const std::filesystem::path& compressed, const RecoveryOptions& options,
                                   DType saved_dtype, int64_t tokens_per_pass, Recompute recompute) {
  const CompressionRecord record = read_record(compressed);
  const Method& method = find_method(record.method);
  OlmoeConfig config = read_config(compressed);
  const std::vector<LayerShape> shapes = with_adapters(record.plan.shapes(), record.rank);
  const std::unique_ptr<Olmoe> model = declare_model(config, shapes);
  mark_trainable(*model, record, options.train_routers);
  RecoveryEstimate estimate;
  for (const ParameterPtr& p : model->parameters()) {
    if (!p->trainable) p->value = Tensor::borrow(nullptr, p->value.shape(), options.dtype);
  }
  estimate.training = estimate_training(config, model->parameters(), tokens_per_pass, recompute);
  const ModelSize size = model_size(config);
  const Annealing annealing = options.annealing.value_or(Annealing{.eps = method.anneal});
  const bool svd = record.options.adapter_init == AdapterInit::kSvd;
  const auto bytes = static_cast<int64_t>(size_of(svd ? DType::kF32 : options.dtype));
  if (annealing.eps > 0) estimate.original_bytes = record.plan.fading() * size.expert * bytes;
  estimate.stored_parameters =
      stored_parameters(options.merge ? merged_shapes(record.plan, record.rank) : shapes, size);
  if (const int64_t keep = record.plan.experts_to_keep; keep > 0) {  // the others go while training
    estimate.stored_parameters -= size.layers * (size.slots - keep) * size.expert;
  }
  estimate.stored_bytes = estimate.stored_parameters * static_cast<int64_t>(size_of(saved_dtype));
  return estimate;
}

}  // namespace lightmoe
