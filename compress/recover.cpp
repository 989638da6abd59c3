#include "compress/recover.h"

#include <algorithm>

#include "autograd/distillation.h"
#include "compress/adapter.h"
#include "compress/originals.h"
#include "compress/router_kd.h"
#include "compress/text.h"
#include "loaders/json.h"
#include "loaders/output.h"
#include "model/extend.h"
#include "model/training_pass.h"
#include "model/weights.h"

namespace lightmoe {
namespace {

// Marks what the method trains. Works on declared parameters as well.
void mark_trainable(const Olmoe& model, const CompressionRecord& record, const RecoveryOptions& options) {
  if (options.router_kd) return train_routers_alone(model);
  if (options.extend) return train_extension_alone(model);
  const Trainable what = find_method(record.method).trainable;
  for (const ParameterPtr& p : model.parameters()) p->trainable = what == Trainable::kEverything;
  const bool factors = what == Trainable::kBasesAndFactors, bases = factors || what == Trainable::kBasesAndAdapters;
  const bool adapters = what == Trainable::kAdapters || bases;
  const auto is_trained = [&](AdapterFactor factor) { return adapters && (record.factors & factor) != 0; };
  for (size_t l = 0; l < model.blocks.size(); ++l) {
    const MoeLayer& moe = model.blocks[l].moe;
    moe.router->trainable |= options.train_routers;
    for (const Adapter& a : moe.adapters) {
      a.b_gate->trainable |= is_trained(kBGate), a.b_up->trainable |= is_trained(kBUp);
      a.b_down->trainable |= is_trained(kBDown), a.a_down->trainable |= is_trained(kADown);
      a.a_gate_up->trainable |= is_trained(kAGateUp);
    }
    if (!bases) continue;
    for (const int32_t base : record.plan.layers[l].bases) {
      moe.experts[static_cast<size_t>(base)].gate_up->trainable = true;
      moe.experts[static_cast<size_t>(base)].down->trainable = true;
    }
  }
}

// Of all layers.
int64_t extension_size(const ExtensionShape& shape, const ModelSize& size) {
  return size.layers * extension_parameters(shape, {.hidden = size.hidden, .width = size.width, .slots = size.slots});
}

}  // namespace

Recovery::Recovery(const std::filesystem::path& compressed, const std::filesystem::path& base, int64_t steps,
                   const RecoveryOptions& options)
    : compressed_(compressed), options_(options), record_(read_record(compressed)) {
  const Method& method = find_method(record_.method);
  annealing_ = options.annealing.value_or(Annealing{.eps = options.router_kd ? 0 : method.anneal});
  annealing_.check_valid();
  clock_ = AnnealingClock(annealing_, steps);
  check_distillation();
  model_ = load_model(compressed, options.dtype);
  if (record_.plan.units_go_in_recovery && adds_adapters())
    unit_pruner_ = std::make_unique<UnitPruner>(*model_, record_, base, steps);
  if (options.router_kd) {
    teacher_ = load_teacher(base, record_, options.dtype);
    options_.distill = 1;
  }
  if (options.extend) extend_model(*model_, *options.extend, options.seed.value_or(record_.options.seed));
  if (adds_adapters()) {
    if (options.seed) redraw_adapters(*options.seed);
    add_adapters();
  } else {
    options_.merge = false;
  }
  choose_trainable();
  if (record_.plan.experts_to_keep > 0)
    pruner_ = std::make_unique<TaskPruner>(*model_, record_.plan.experts_to_keep, steps);
  if (record_.plan.fading() > 0 && annealing_.beta(0, steps) > 0) {
    originals_ = std::make_unique<Originals>(base, *model_, record_, options.dtype);
  }
}

Recovery::~Recovery() = default;

void Recovery::check_distillation() const {
  const double w = options_.distill, t = options_.distill_temperature;
  check(w >= 0 && w <= 1 && t > 0 && std::isfinite(t), ErrorKind::kUsage,
        "--distill {:g} --distill-temperature {:g}: expected a weight from 0 to 1 and a temperature above 0", w, t);
  check(
      !options_.router_kd || (w == 0 && annealing_.eps == 0), ErrorKind::kUsage,
      "--router-kd trains the routers towards the original alone: --distill {:g} and --anneal {:g} have no place in it",
      w, annealing_.eps);
  check(!options_.router_kd || !options_.extend, ErrorKind::kUsage, "give either --router-kd or --extend");
  if (w == 0) return;
  check(annealing_.eps > 0 && record_.plan.fading() > 0 && record_.plan.fading() == record_.plan.replaced(),
        ErrorKind::kUsage,
        "--distill needs the originals of all replaced experts in memory: method {} with --anneal {:g} has {} of {}",
        record_.method, annealing_.eps, annealing_.eps > 0 ? record_.plan.fading() : 0, record_.plan.replaced());
}

// Adapters of the plan that start without effect, drawn again; the others hold what compression found.
void Recovery::redraw_adapters(uint64_t seed) {
  for (size_t l = 0; l < model_->blocks.size(); ++l) {
    const LayerPlan& plan = record_.plan.layers[l];
    for (size_t a = 0; a < plan.adapter_slot.size(); ++a) {
      const std::vector<AdapterPart> parts = parts_of(model_->blocks[l].moe.adapters[a]);
      const auto entry = static_cast<size_t>(plan.shape.slots[static_cast<size_t>(plan.adapter_slot[a])].expert);
      const bool zero_base = plan.bank[entry].is_zero();
      const bool no_effect =
          is_zero(parts[2].b) && (zero_base || (is_zero(parts[0].b) && is_zero(parts[1].b)));  // gate, up, down
      if (!no_effect) continue;
      for (const AdapterPart& part : parts) {
        const AdapterSite site{.layer = static_cast<int64_t>(l),
                               .slot = plan.adapter_slot[a],
                               .matrix = part.matrix,
                               .out = part.b.dim(0),
                               .in = part.a.dim(1),
                               .rank = part.a.dim(0),
                               .zero_base = zero_base};
        const AdapterFactors drawn = gaussian_factors(site, record_.options.adapter_std, seed);
        part.a.copy_from(drawn.a.to(part.a.dtype()));
        part.b.copy_from(drawn.b.to(part.b.dtype()));
      }
    }
  }
}

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
        const AdapterFactors start =
            gaussian_factors(site, record_.options.adapter_std, options_.seed.value_or(record_.options.seed));
        part.a.copy_from(start.a);
        part.b.copy_from(start.b);
      }
    }
  }
  name_parameters(*model_);
}

void Recovery::choose_trainable() {
  mark_trainable(*model_, record_, options_);
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
    if (options_.distill > 0) teacher_ = originals_->teacher(*model_);
    if (options_.say) options_.say(fmt::format("annealing: {} of originals in memory", human_bytes(original_bytes())));
  }
  if (beta == 0 && originals_) {
    const int64_t before = memory_use(MemoryCategory::kWeights).live_bytes;
    for (Block& block : model_->blocks) block.moe.annealed.clear();
    originals_.reset(), teacher_.reset();
    trim_memory_cache();
    const int64_t after = memory_use(MemoryCategory::kWeights).live_bytes;
    if (options_.say && before != after) {
      options_.say(fmt::format("annealing: beta is 0, originals released, weights in memory {} -> {}",
                               human_bytes(before), human_bytes(after)));
    }
  }
  for (Block& block : model_->blocks) block.moe.beta = originals_ ? beta : 0;
}

// What is neither in the weights nor a function of the step.
Json Recovery::state() const {
  const AnnealingClock::State& clock = clock_.state();
  Json json = {{"annealing", {clock.progress, clock.mean, clock.lowest}}};
  if (pruner_) json["pruner"] = pruner_->state();
  if (unit_pruner_) json["unit_pruner"] = unit_pruner_->state();
  return json;
}

void Recovery::restore(const Json& state) {
  const Json& clock = state.at("annealing");
  clock_.restore({clock.at(0).get<double>(), clock.at(1).get<double>(), clock.at(2).get<double>()});
  if (pruner_) pruner_->restore(state.at("pruner"));
  if (unit_pruner_) unit_pruner_->restore(state.at("unit_pruner"));
}

TrainerHooks Recovery::hooks(DType saved_dtype) {
  TrainerHooks hooks;
  const bool adaptive = annealing_.shape == AnnealShape::kAdaptive;
  hooks.before_step = [this, adaptive](int64_t step) {
    if (!adaptive) clock_.observe(step - 1, 0);
    beta_ = clock_.beta();
    set_beta(beta_);
    if (pruner_) pruner_->before_step(step);
  };
  if (adaptive) hooks.after_step = [this](const StepStats& stats) { clock_.observe(stats.step, stats.loss); };
  if (unit_pruner_) hooks.after_step = [this](const StepStats& stats) { unit_pruner_->after_step(stats.step); };
  if (pruner_ || unit_pruner_ || adaptive) {
    hooks.save_extra = [this] { return state(); };
    hooks.load_extra = [this](const Json& extra) { restore(extra); };
  }
  hooks.log_fields = [this](const StepStats&) {
    Json fields = {{"beta", beta_}, {"weight_bytes", memory_use(MemoryCategory::kWeights).live_bytes}};
    if (options_.distill > 0) fields["kl"] = kl_;
    return fields;
  };
  // While slots anneal or units go there is no model of fewer parameters to write; the checkpoint's own state is whole either way.
  hooks.save_model = [this, saved_dtype](const std::filesystem::path& directory) {
    if (original_bytes() == 0 && !unit_pruner_) save(directory, saved_dtype, Json{{"unfinished", true}});
  };
  return hooks;
}

TrainLosses Recovery::Observed::forward_backward(const Batch& batch, const TrainOptions& options) {
  const Recovery& r = recovery_;
  recovery_.kl_ = 0;
  TrainOptions observed = options;
  if (r.pruner_) observed.observer = r.pruner_->observer();
  if (r.teacher_ == nullptr) return r.model_->forward_backward(batch, observed);
  const Distillation distillation{.teacher = r.teacher_->forward(batch, {.compute = options.compute}),
                                  .head = r.teacher_->lm_head->value,
                                  .weight = r.options_.distill,
                                  .temperature = r.options_.distill_temperature};
  return forward_backward_with(*r.model_, batch, observed, [&](Tape& tape, const Var& states) {
    const DistillationLoss loss = distillation_loss(tape, states, r.model_->lm_head, batch.labels, distillation,
                                                    {options.loss_scale, options.compute});
    return [this, loss, labels = std::max<int64_t>(1, batch.num_labels)] {
      recovery_.kl_ = loss.kl_sum() / static_cast<double>(labels);
      return loss.ce_sum();
    };
  });
}

std::map<std::string, std::string> Recovery::fingerprint() const {
  return {{"base model", record_.model},
          {"method", record_.method},
          {"statistics", record_.statistics},
          {"compressed weights", model_fingerprint(Checkpoint(compressed_))},
          {"routers", options_.router_kd       ? "alone"
                      : options_.train_routers ? "trained"
                                               : "frozen"},
          {"extension", options_.extend ? options_.extend->text() : "none"},
          {"annealing", fmt::format("{} {:g} {:g}", name_of(annealing_.shape), annealing_.eps, annealing_.gamma)},
          {"distillation", fmt::format("{:g} {:g}", options_.distill, options_.distill_temperature)},
          {"adapters", options_.seed ? fmt::format("seed {}", *options_.seed) : "as compressed"}};
}

void Recovery::finish() {
  if (finished_) return;
  finished_ = true;
  set_beta(0);
  teacher_.reset();
  if (pruner_) record_.plan = pruner_->finish();
  if (unit_pruner_) {
    unit_pruner_->finish();
    record_.plan.units_go_in_recovery = false;
  }
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
  if (options_.router_kd) record.trainable_parameters = live_router_parameters(shapes, size.hidden);
  if (options_.extend) record.trainable_parameters = extension_size(*options_.extend, size);
  record.stored_parameters = stored_parameters(record.plan.shapes(), size);
  record.stored_bytes = record.stored_parameters * static_cast<int64_t>(size_of(dtype));
  save_model(*model_, directory, dtype, int64_t{5} << 30);
  copy_side_files(compressed_, directory);
  write_file_atomically(directory / kRecordFile, record_to_json(record, result));
}

RecoveryEstimate estimate_recovery(const std::filesystem::path& compressed, const RecoveryOptions& options,
                                   DType saved_dtype, int64_t tokens_per_pass, Recompute recompute,
                                   GemmCompute compute) {
  const CompressionRecord record = read_record(compressed);
  const Method& method = find_method(record.method);
  OlmoeConfig config = read_config(compressed);
  const bool adapters = !options.router_kd && !options.extend;
  std::vector<LayerShape> shapes = with_adapters(record.plan.shapes(), adapters ? record.rank : 0);
  for (LayerShape& shape : shapes) {
    if (options.extend) shape.extension = *options.extend;
  }
  std::vector<LayerShape> in_training = shapes;
  for (LayerShape& shape : in_training) {
    if (record.plan.units_go_in_recovery && adapters) shape.widths.clear(), shape.wide_adapters = false;
  }
  const std::unique_ptr<Olmoe> model = declare_model(config, in_training);
  mark_trainable(*model, record, options);
  RecoveryEstimate estimate;
  for (const ParameterPtr& p : model->parameters()) {
    if (!p->trainable) p->value = Tensor::borrow(nullptr, p->value.shape(), options.dtype);
  }
  estimate.training = estimate_training(config, model->parameters(), tokens_per_pass, recompute,
                                        StepExecution::of_this_process(compute));
  const ModelSize size = model_size(config);
  const Annealing annealing = options.annealing.value_or(Annealing{.eps = options.router_kd ? 0 : method.anneal});
  const bool svd = record.options.adapter_init != AdapterInit::kGaussian;
  const auto bytes = static_cast<int64_t>(size_of(svd ? DType::kF32 : options.dtype));
  if (annealing.eps > 0) estimate.original_bytes = record.plan.fading() * size.expert * bytes;
  if (options.router_kd) estimate.teacher_bytes = size.total() * static_cast<int64_t>(size_of(options.dtype));
  estimate.stored_parameters =
      stored_parameters(options.merge && adapters ? merged_shapes(record.plan, record.rank) : shapes, size);
  if (const int64_t keep = record.plan.experts_to_keep; keep > 0) {  // the others go while training
    estimate.stored_parameters -= size.layers * (size.slots - keep) * size.expert;
  }
  estimate.stored_bytes = estimate.stored_parameters * static_cast<int64_t>(size_of(saved_dtype));
  return estimate;
}

}  // namespace lightmoe
